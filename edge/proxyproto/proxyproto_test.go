package proxyproto

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/pires/go-proxyproto"
)

func TestHeader(t *testing.T) {
	v4, v4b := netip.MustParseAddrPort("192.0.2.1:1000"), netip.MustParseAddrPort("198.51.100.2:443")
	v6 := netip.MustParseAddrPort("[2001:db8::1]:1000")
	for _, tt := range []struct {
		version, network string
		src, dst         netip.AddrPort
		want             string // the addresses that a parser reads; "" for an error
	}{
		{"v1", "tcp", v4, v4b, "192.0.2.1:1000 198.51.100.2:443"},
		{"v2", "tcp", v4, v4b, "192.0.2.1:1000 198.51.100.2:443"},
		{"v2", "udp", v4, v4b, "192.0.2.1:1000 198.51.100.2:443"},
		{"v2", "tcp", v6, v4b, "[2001:db8::1]:1000 198.51.100.2:443"},
		{"v2", "tcp", netip.MustParseAddrPort("[::ffff:192.0.2.1]:7"), v4b, "192.0.2.1:7 198.51.100.2:443"},
		{"v1", "udp", v4, v4b, ""},
		{"v3", "tcp", v4, v4b, ""},
	} {
		b, err := Header(tt.version, tt.network, tt.src, tt.dst)
		if err != nil {
			if tt.want != "" {
				t.Errorf("%v: %v", tt, err)
			}
			continue
		}
		h, err := proxyproto.Read(bufio.NewReader(bytes.NewReader(b)))
		if err != nil {
			t.Errorf("%v: %v", tt, err)
			continue
		}
		if got := h.SourceAddr.String() + " " + h.DestinationAddr.String(); got != tt.want {
			t.Errorf("%v: a parser reads %s", tt, got)
		}
	}
	if b, err := Header("v1", "tcp", v4, v4b); err != nil || string(b) != "PROXY TCP4 192.0.2.1 198.51.100.2 1000 443\r\n" {
		t.Errorf("got %q, %v", b, err)
	}
}

// A service behind a session that takes no bytes holds nobody up for longer than it may.
func TestAnnounceEndsInTime(t *testing.T) {
	ours, theirs := net.Pipe() // nobody reads
	defer theirs.Close()
	defer ours.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	src := netip.MustParseAddrPort("192.0.2.1:1000")
	if err := Announce(ctx, ours, "v1", src, src); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want that the deadline has passed", err)
	}
	go io.Copy(io.Discard, theirs) //nolint:errcheck // it ends with the pipe
	if err := ours.SetWriteDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := Announce(t.Context(), ours, "v2", src, src); err != nil {
		t.Error(err)
	}
}

// accept sends what a load balancer might, and returns what Accept makes of it and what can be read then.
func accept(t *testing.T, sent string) (remote, rest string, err error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	theirs, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(theirs, sent); err != nil {
		t.Fatal(err)
	}
	if err := theirs.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	ours, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	c, err := Accept(ours, 5*time.Second)
	if err != nil {
		return "", "", err
	}
	b, err := io.ReadAll(c)
	if remote = c.RemoteAddr().String(); remote == theirs.LocalAddr().String() {
		remote = "itself"
	}
	return remote, string(b), err
}

func TestAccept(t *testing.T) {
	v2, err := Header("v2", "tcp", netip.MustParseAddrPort("[2001:db8::1]:99"), netip.MustParseAddrPort("[2001:db8::2]:443"))
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 4000)
	for _, tt := range []struct{ name, sent, remote, rest string }{
		{"v1", "PROXY TCP4 192.0.2.1 198.51.100.2 1000 443\r\nhello", "192.0.2.1:1000", "hello"},
		{"v2 and much more", string(v2) + long, "[2001:db8::1]:99", long},
		{"local", "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00check", "itself", "check"},
		{"none", "GET / HTTP/1.1\r\n", "", ""},
		{"unknown", "PROXY UNKNOWN\r\ncheck", "itself", "check"},
		{"a datagram's", "\r\n\r\n\x00\r\nQUIT\n\x21\x12\x00\x0c\x01\x02\x03\x04\x01\x02\x03\x04\x00\x01\x00\x01", "", ""},
		{"cut", "PROXY TCP4 192.0.2.1", "", ""},
		{"endless", "PROXY TCP4 " + long, "", ""},
		{"nothing", "", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			remote, rest, err := accept(t, tt.sent)
			if remote != tt.remote || rest != tt.rest || (err == nil) != (tt.remote != "") {
				t.Errorf("got %q, %d bytes, %v", remote, len(rest), err)
			}
		})
	}
}

func TestSilenceEnds(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	defer theirs.Close()
	if _, err := Accept(ours, 20*time.Millisecond); err == nil {
		t.Error("a header that never came was accepted")
	}
}

func TestTrust(t *testing.T) {
	tr, err := ParseTrust([]string{"192.0.2.0/24", "2001:db8::/32"})
	if err != nil {
		t.Fatal(err)
	}
	for a, want := range map[string]bool{"192.0.2.9": true, "::ffff:192.0.2.9": true, "192.0.3.9": false, "2001:db8::1": true, "::1": false} {
		if got := tr.Has(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %v", a, got)
		}
	}
	if Trust(nil).Has(netip.MustParseAddr("127.0.0.1")) {
		t.Error("an empty list trusts somebody")
	}
	if _, err := ParseTrust([]string{"192.0.2.1"}); err == nil {
		t.Error("an address was taken for a prefix")
	}
}

// The header comes from a load balancer, or from who has taken its address.
func FuzzAccept(f *testing.F) {
	f.Add([]byte("PROXY TCP4 192.0.2.1 198.51.100.2 1000 443\r\nhello"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x01\x02\x03\x04\x01\x02\x03\x04\x00\x01\x00\x01"))
	f.Add([]byte("\r\n\r\n\x00\r\nQUIT\n\x20\x00\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Accept(&fixed{Reader: bytes.NewReader(b)}, time.Second)
		if err != nil {
			return
		}
		if c.RemoteAddr() == nil || c.LocalAddr() == nil || c.RemoteAddr().String() == "" {
			t.Fatal("accepted without an address")
		}
	})
}

// fixed is a connection that sends some bytes.
type fixed struct {
	net.Conn
	*bytes.Reader
}

func (f *fixed) Read(p []byte) (int, error)      { return f.Reader.Read(p) }
func (f *fixed) SetReadDeadline(time.Time) error { return nil }
func (f *fixed) RemoteAddr() net.Addr            { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }
func (f *fixed) LocalAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }
