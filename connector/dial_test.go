package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// names is a Resolver with a fixed answer for each name; a missing name does not exist.
type names map[string][]string

func (n names) LookupNetIP(ctx context.Context, _, host string) (addrs []netip.Addr, err error) {
	if host == "slow.example" {
		<-ctx.Done()
		return nil, &net.DNSError{Err: "i/o timeout", Name: host, IsTimeout: true}
	}
	if host == "broken.example" {
		return nil, &net.DNSError{Err: "server misbehaving", Name: host, IsTemporary: true}
	}
	list, ok := n[host]
	if !ok {
		return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
	}
	for _, s := range list {
		addrs = append(addrs, netip.MustParseAddr(s))
	}
	return addrs, nil
}

func listen(t *testing.T, addr string) (net.Listener, uint16) {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln, ln.Addr().(*net.TCPAddr).AddrPort().Port()
}

// closedPort returns a port of 127.0.0.1 where nobody listens.
func closedPort(t *testing.T) uint16 {
	t.Helper()
	ln, port := listen(t, "127.0.0.1:0")
	ln.Close()
	return port
}

func TestParseTarget(t *testing.T) {
	for _, tt := range []struct{ host, addr, name string }{
		{"10.1.2.3", "10.1.2.3", ""},
		{"::ffff:10.1.2.3", "10.1.2.3", ""},
		{"fd00::1", "fd00::1", ""},
		{"DB.Example.", "", "db.example"},
	} {
		got, err := parseTarget(tunnel.Flow{Host: tt.host, Port: 1})
		addr := ""
		if got.addr.IsValid() {
			addr = got.addr.String()
		}
		if err != nil || addr != tt.addr || got.name != tt.name {
			t.Errorf("parseTarget(%q): got %+v, %v", tt.host, got, err)
		}
	}
	// Spellings that some resolver takes for an address are refused before any resolver sees them.
	for _, host := range []string{"", "fe80::1%lo", "127.1", "0x7f.1", "2130706433", "017700000001", "*.example", "a b", "[::1]", "127.0.0.1.", "１２７.0.0.1"} {
		if got, err := parseTarget(tunnel.Flow{Host: host, Port: 1}); resultOf(err) != tunnel.ResultDenied {
			t.Errorf("parseTarget(%q): got %+v, %v, want a denial", host, got, err)
		}
	}
}

func TestDial(t *testing.T) {
	ln, open := listen(t, "127.0.0.1:0")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	shut := closedPort(t)
	resolver := names{
		"one.example":     {"127.0.0.1"},
		"mapped.example":  {"::ffff:127.0.0.1"},
		"mixed.example":   {"127.0.0.99", "10.99.99.99", "127.0.0.1"}, // only the last is permitted
		"rebound.example": {"127.0.0.99"},
		"nothing.example": {},
		"two.example":     {"127.0.0.2", "127.0.0.1"},
	}
	allow := mustAllow(t,
		Rule{To: "127.0.0.1", Ports: []Ports{AllPorts}},
		Rule{To: "127.0.0.2", Ports: []Ports{AllPorts}, VNet: "two"},
		Rule{To: "*.example", Ports: []Ports{AllPorts}},
	)
	d := &dialer{resolver: resolver}
	for _, tt := range []struct {
		vnet, host string
		port       uint16
		want       tunnel.Result
	}{
		{"v", "127.0.0.1", open, tunnel.ResultOK},
		{"v", "127.0.0.1", shut, tunnel.ResultRefused},
		{"v", "127.0.0.2", open, tunnel.ResultDenied},
		{"v", "169.254.169.254", 80, tunnel.ResultDenied},
		{"v", "one.example", open, tunnel.ResultOK},
		{"v", "ONE.example.", open, tunnel.ResultOK},
		{"v", "mapped.example", open, tunnel.ResultOK},
		{"v", "mixed.example", open, tunnel.ResultOK},
		{"v", "rebound.example", open, tunnel.ResultDenied},
		{"v", "one.example", shut, tunnel.ResultRefused},
		{"v", "nothing.example", open, tunnel.ResultNameNotFound},
		{"v", "missing.example", open, tunnel.ResultNameNotFound},
		{"v", "broken.example", open, tunnel.ResultInternal},
		{"v", "slow.example", open, tunnel.ResultTimedOut},
		{"two", "two.example", open, tunnel.ResultOK}, // 127.0.0.2 refuses, 127.0.0.1 does not
	} {
		t.Run(tt.host, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			if tt.want == tunnel.ResultTimedOut {
				ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
			}
			defer cancel()
			target, err := parseTarget(tunnel.Flow{VNet: "v", Host: tt.host, Port: tt.port})
			if err != nil {
				t.Fatal(err)
			}
			target.vnet = "v"
			if tt.vnet == "two" {
				target.vnet = "two"
			}
			conn, err := d.dial(ctx, allow, target)
			if got := resultOf(err); got != tt.want {
				t.Fatalf("got %v (%v), want %v", got, err, tt.want)
			}
			if err == nil {
				if got, want := conn.RemoteAddr().String(), fmt.Sprintf("127.0.0.1:%d", open); got != want {
					t.Errorf("connected to %s, want %s", got, want)
				}
				conn.Close()
			}
		})
	}
}

// TestDialChecked answers each question for the name with another address: what was checked must be what is dialled.
func TestDialChecked(t *testing.T) {
	_, port := listen(t, "127.0.0.1:0")
	asked := 0
	d := &dialer{resolver: resolverFunc(func() []netip.Addr {
		if asked++; asked == 1 {
			return []netip.Addr{netip.MustParseAddr("127.0.0.1")}
		}
		return []netip.Addr{netip.MustParseAddr("127.0.0.99")}
	})}
	allow := mustAllow(t, Rule{To: "127.0.0.1", Ports: []Ports{AllPorts}})
	conn, err := d.dial(t.Context(), allow, target{vnet: "v", name: "a.example", port: port})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if asked != 1 {
		t.Errorf("the name was resolved %d times, want once", asked)
	}
}

type resolverFunc func() []netip.Addr

func (f resolverFunc) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	return f(), nil
}

func TestInterleave(t *testing.T) {
	parse := func(list ...string) (out []netip.AddrPort) {
		for _, s := range list {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr(s), 1))
		}
		return out
	}
	for _, tt := range []struct{ in, want []netip.AddrPort }{
		{parse("::1", "::2", "1.1.1.1", "2.2.2.2"), parse("::1", "1.1.1.1", "::2", "2.2.2.2")},
		{parse("1.1.1.1", "2.2.2.2", "3.3.3.3", "::1"), parse("1.1.1.1", "::1", "2.2.2.2", "3.3.3.3")},
		{parse("1.1.1.1"), parse("1.1.1.1")},
		{parse("0.0.0.1", "0.0.0.2", "0.0.0.3", "0.0.0.4", "0.0.0.5", "0.0.0.6", "0.0.0.7", "0.0.0.8", "0.0.0.9"),
			parse("0.0.0.1", "0.0.0.2", "0.0.0.3", "0.0.0.4", "0.0.0.5", "0.0.0.6", "0.0.0.7", "0.0.0.8")},
	} {
		if got := interleave(tt.in); fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("interleave(%v): got %v, want %v", tt.in, got, tt.want)
		}
	}
}

// TestConnectBeside gives the first address a socket that never answers: the second must win beside it.
func TestConnectBeside(t *testing.T) {
	_, port := listen(t, "127.0.0.1:0")
	silent := silentAddr(t, port)
	d := &dialer{}
	conn, err := d.connect(t.Context(), []netip.AddrPort{silent, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, want := conn.RemoteAddr().String(), fmt.Sprintf("127.0.0.1:%d", port); got != want {
		t.Errorf("connected to %s, want %s", got, want)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.connect(ctx, []netip.AddrPort{silent}); resultOf(err) != tunnel.ResultTimedOut {
		t.Errorf("the silent address: got %v, want a time-out", err)
	}
}

// silentAddr returns an address whose listener's queue is full, so that the kernel answers no further connection.
func silentAddr(t *testing.T, port uint16) netip.AddrPort {
	t.Helper()
	to := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.7"), port)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: int(port), Addr: to.Addr().As4()}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		c, err := net.DialTimeout("tcp", to.String(), 100*time.Millisecond)
		if err != nil {
			return to
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue of the listener does not fill")
	return to
}

func TestResultOf(t *testing.T) {
	wrap := func(e error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", e)}
	}
	for _, tt := range []struct {
		err  error
		want tunnel.Result
	}{
		{nil, tunnel.ResultOK},
		{errDenied, tunnel.ResultDenied},
		{wrap(syscall.ECONNREFUSED), tunnel.ResultRefused},
		{wrap(syscall.ETIMEDOUT), tunnel.ResultTimedOut},
		{wrap(syscall.EHOSTUNREACH), tunnel.ResultNoRoute},
		{wrap(syscall.ENETUNREACH), tunnel.ResultNoRoute},
		{wrap(syscall.EACCES), tunnel.ResultDenied},
		{wrap(syscall.EMFILE), tunnel.ResultLimit},
		{context.DeadlineExceeded, tunnel.ResultTimedOut},
		{&net.DNSError{IsNotFound: true}, tunnel.ResultNameNotFound},
		{&net.DNSError{IsTimeout: true}, tunnel.ResultTimedOut},
		{&net.DNSError{IsTemporary: true}, tunnel.ResultInternal},
		{errors.New("other"), tunnel.ResultInternal},
	} {
		if got := resultOf(tt.err); got != tt.want {
			t.Errorf("resultOf(%v): got %v, want %v", tt.err, got, tt.want)
		}
	}
}
