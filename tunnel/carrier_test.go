package tunnel

import (
	"bufio"
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// countAdmits admits everybody and counts.
func countAdmits(n *atomic.Int32) func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
	return func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
		n.Add(1)
		return nil
	}
}

// TestRaceUDPBlocked dials where UDP packets vanish: TCP must have a session in well under five seconds.
func TestRaceUDPBlocked(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	silent := listenSilent(t)
	var admits atomic.Int32
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: countAdmits(&admits), TCPAddr: silent.LocalAddr().String()})
	dc := dialOver(e, "", p.source(mtls.KindConnector, "c1", 0), accept(echo))
	dc.Addr = silent.LocalAddr().String()
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	c, err := Dial(ctx, dc)
	if err != nil {
		t.Fatalf("Dial: %v", err)
	}
	defer c.Close(CloseShutdown)
	if c.Carrier() != CarrierTCP || e.session().Carrier() != CarrierTCP {
		t.Errorf("carrier %q, want %q", c.Carrier(), CarrierTCP)
	}
	if n := admits.Load(); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
}

// TestRaceLoser lets QUIC come to an edge so late that TCP has registered: it must not register too.
func TestRaceLoser(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	addr := freeAddr(t)
	r := newRelay(t, addr, 200*time.Millisecond)
	var admits atomic.Int32
	e := startEdge(t, ListenConfig{Addr: addr, TCPAddr: r.addr(), Identity: p.source(mtls.KindEdge, "e1", 0), Admit: countAdmits(&admits)})
	dc := dialOver(e, "", p.source(mtls.KindConnector, "c1", 0), accept(echo))
	dc.Addr, dc.RaceDelay = r.addr(), time.Millisecond
	c := startConnector(t, dc)
	if e.session(); c.Carrier() != CarrierTCP {
		t.Errorf("carrier %q, want %q", c.Carrier(), CarrierTCP)
	}
	time.Sleep(time.Second) // what was under way arrives
	eventually(t, "no connection pending", func() bool { return e.ln.pending.Load() == 0 })
	if n := admits.Load(); n != 1 {
		t.Errorf("%d registrations, want 1", n)
	}
}

func TestRaceOrder(t *testing.T) {
	t.Parallel()
	p := newPKI(t)
	src := p.source(mtls.KindConnector, "c1", 0)
	edge := p.source(mtls.KindEdge, "e1", 0)
	t.Run("QUIC first", func(t *testing.T) {
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll})
		dc := dialOver(e, "", src, accept(echo))
		dc.RaceDelay = patience
		if c := startConnector(t, dc); c.Carrier() != CarrierQUIC {
			t.Errorf("carrier %q, want %q", c.Carrier(), CarrierQUIC)
		}
	})
	t.Run("no TCP", func(t *testing.T) {
		e := startEdge(t, ListenConfig{Identity: edge, Admit: admitAll, TCPAddr: "-"})
		if a := e.ln.TCPAddr(); a != nil {
			t.Errorf("TCPAddr() = %v", a)
		}
		dc := dialOver(e, "", src, accept(echo))
		dc.RaceDelay = time.Nanosecond
		if c := startConnector(t, dc); c.Carrier() != CarrierQUIC {
			t.Errorf("carrier %q, want %q", c.Carrier(), CarrierQUIC)
		}
	})
	t.Run("refused once", func(t *testing.T) {
		var asked atomic.Int32
		e := startEdge(t, ListenConfig{Identity: edge, Admit: func(context.Context, mtls.Identity, *x509.Certificate, Registration) error {
			asked.Add(1)
			return ErrUnknown
		}})
		dc := dialOver(e, "", src, accept(echo))
		dc.RaceDelay = time.Millisecond
		if _, err := Dial(context.Background(), dc); !errors.Is(err, ErrUnknown) {
			t.Errorf("Dial: %v, want ErrUnknown", err)
		}
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times, want once", n)
		}
	})
	t.Run("both fail", func(t *testing.T) {
		silent := listenSilent(t)
		_, err := Dial(context.Background(), DialConfig{Addr: silent.LocalAddr().String(), Identity: src, Registration: testRegistration, Handle: accept(echo)})
		if !errors.Is(err, ErrNoAnswer) || !strings.Contains(err.Error(), "quic: ") || !strings.Contains(err.Error(), "tcp: ") {
			t.Errorf("Dial: %v, want what both carriers met", err)
		}
	})
	t.Run("unknown carrier", func(t *testing.T) {
		if _, err := Dial(context.Background(), DialConfig{Addr: "127.0.0.1:1", Carrier: "sctp", Identity: src, Registration: testRegistration, Handle: accept(echo)}); err == nil {
			t.Error("Dial over an unknown carrier succeeded")
		}
	})
}

// connectProxy is an HTTP proxy that answers each CONNECT as answer says; "" lets it through.
func connectProxy(t *testing.T, answer func(r *http.Request) string) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	serve := func(c net.Conn) {
		defer c.Close()
		br := bufio.NewReader(c)
		r, err := http.ReadRequest(br)
		if err != nil {
			return
		}
		if a := answer(r); a != "" {
			io.WriteString(c, a)
			return
		}
		to, err := net.Dial("tcp", r.RequestURI)
		if err != nil {
			t.Error(err)
			return
		}
		defer to.Close()
		io.WriteString(c, "HTTP/1.1 200 Connection established\r\nX-More: y\r\n\r\n")
		wg.Go(func() {
			io.Copy(to, br)
			to.(*net.TCPConn).CloseWrite()
		})
		io.Copy(c, to)
	}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { serve(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return "http://" + ln.Addr().String()
}

func TestProxy(t *testing.T) {
	t.Parallel()
	const canary = "s3cret-canary"
	p := newPKI(t)
	src := p.source(mtls.KindConnector, "c1", 0)
	e := startEdge(t, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll})
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte(canary+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	closed := freeAddr(t)
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("site:"+canary))
	auth := func(r *http.Request) string {
		if r.Header.Get("Proxy-Authorization") != basic {
			return "HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"
		}
		return ""
	}
	say := func(s string) func(*http.Request) string { return func(*http.Request) string { return s } }
	for name, tt := range map[string]struct {
		proxy ProxyConfig
		want  string // in the error; "": success
	}{
		"open":         {ProxyConfig{URL: connectProxy(t, say(""))}, ""},
		"password":     {ProxyConfig{URL: connectProxy(t, auth), User: "site", PasswordFile: password}, ""},
		"wrong user":   {ProxyConfig{URL: connectProxy(t, auth), User: "other", PasswordFile: password}, "does not accept"},
		"no user":      {ProxyConfig{URL: connectProxy(t, auth)}, "set user and password_file"},
		"forbidden":    {ProxyConfig{URL: connectProxy(t, say("HTTP/1.1 403 Forbidden\r\n\r\n"))}, "allow CONNECT"},
		"gateway":      {ProxyConfig{URL: connectProxy(t, say("HTTP/1.0 502 Bad Gateway\r\n\r\n"))}, "cannot reach"},
		"no HTTP":      {ProxyConfig{URL: connectProxy(t, say("220 smtp ready\r\n\r\n"))}, "is it an HTTP proxy"},
		"endless":      {ProxyConfig{URL: connectProxy(t, say("HTTP/1.1 200 OK\r\n"+strings.Repeat("X: y\r\n", 4000)))}, "head of more"},
		"hangs up":     {ProxyConfig{URL: connectProxy(t, say("HTTP"))}, "is it an HTTP proxy"},
		"unreachable":  {ProxyConfig{URL: "http://" + closed}, "cannot be reached"},
		"port":         {ProxyConfig{URL: "http://proxy.test:70000"}, "must be from 1 to 65535"},
		"no file":      {ProxyConfig{URL: connectProxy(t, auth), User: "site", PasswordFile: password + "x"}, "password file"},
		"user in URL":  {ProxyConfig{URL: "http://site:" + canary + "@127.0.0.1:1"}, "put it into user"},
		"bad URL":      {ProxyConfig{URL: "http://site:" + canary + "@%zz:1"}, "does not parse"},
		"other scheme": {ProxyConfig{URL: "socks5://127.0.0.1:1"}, "must be http://"},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			dc := dialOver(e, CarrierTCP, src, accept(echo))
			dc.Logger = slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			dc.Proxy = func() (*ProxyConfig, error) { return &tt.proxy, nil }
			c, err := Dial(context.Background(), dc)
			if err == nil {
				e.session()
				c.Close(CloseShutdown)
			}
			if tt.want == "" && err != nil {
				t.Errorf("Dial: %v", err)
			}
			if tt.want != "" && (!errors.Is(err, ErrProxy) || !strings.Contains(fmt.Sprint(err), tt.want)) {
				t.Errorf("Dial: %v, want ErrProxy with %q", err, tt.want)
			}
			if all := fmt.Sprint(err) + log.String(); strings.Contains(all, canary) || strings.Contains(all, basic[6:]) {
				t.Error("the password shows")
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		dc := dialOver(e, CarrierTCP, src, accept(echo))
		dc.Proxy = func() (*ProxyConfig, error) { return nil, nil }
		startConnector(t, dc)
		e.session()
	})
}

func TestDatagrams(t *testing.T) { overBoth(t, testDatagrams) }

func testDatagrams(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for name, way := range map[string][2]carrier{"to the connector": {s.car, c.car}, "to the edge": {c.car, s.car}} {
		for _, size := range []int{0, 1, 1000} {
			sent := bytes.Repeat([]byte{byte(size)}, size)
			if err := way[0].sendDatagram(sent); err != nil {
				t.Fatalf("%s: sendDatagram: %v", name, err)
			}
			got, err := way[1].receiveDatagram(ctx)
			if err != nil || !bytes.Equal(got, sent) {
				t.Errorf("%s: received %d bytes, %v; want %d", name, len(got), err, size)
			}
		}
		if err := way[0].sendDatagram(make([]byte, way[0].maxDatagram()+1)); err != errDatagramTooLarge {
			t.Errorf("%s: a datagram above the limit: %v", name, err)
		}
	}
	// Nobody reads: the sender never waits, and what there is no room for is counted.
	eventually(t, "datagrams dropped", func() bool {
		s.car.sendDatagram(make([]byte, 1000))
		return via == CarrierQUIC || c.DatagramsDropped() > 0
	})
	s.Close(CloseShutdown)
	if err := s.car.sendDatagram(nil); err == nil {
		t.Error("a closed carrier takes datagrams")
	}
}
