package main

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

const refusedConn = "connection refused"

// TestRefusals has clients of each kind refused: the log says who and why, and a flood of strangers changes little.
func TestRefusals(t *testing.T) {
	s := newSite(t)
	s.must("client", "add", "norule", "--ca-dir", s.path("ca"), "--out", s.path("norule"))
	s.must("ca", "init", "--ca-dir", s.path("ca2"), "--trust-domain", domain)
	s.must("client", "add", "one", "--ca-dir", s.path("ca2"), "--out", s.path("foreign"))
	p := s.start(s.write("ks.yaml", 0o600, s.config("clients:"+rule("one", "sign"))))
	s.must("client", "revoke", "one", "--ca-dir", s.path("ca"))

	foreign := s.tls("foreign")
	foreign.VerifyConnection = nil // it trusts the other authority
	bare := s.tls("one")
	bare.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return new(tls.Certificate), nil }
	for n, tt := range []struct {
		cfg     *tls.Config
		key, id string
		err     string
	}{
		{s.tls("norule"), "peer", "norule", "no rule"},
		{s.tls("one"), "peer", "one", "revoked"},
		{foreign, "claimed", "one", "unknown authority"},
		{bare, "peer", "", "certificate"},
	} {
		for range 2 { // of the same client the second is not logged
			if err := connect(t, p, tt.cfg); err == nil {
				t.Fatalf("%s: let in", tt.err)
			}
		}
		nth := n + 1
		if n == 3 {
			nth = 5 // both of the stranger before were
		}
		l := p.waitNth(refusedConn, nth)
		id, _ := l[tt.key].(string)
		if tt.id != "" {
			tt.id = "spiffe://" + domain + "/edge/" + tt.id
		}
		if id != tt.id || l["level"] != "WARN" || !strings.Contains(fmt.Sprint(l["err"]), tt.err) || !strings.HasPrefix(fmt.Sprint(l["conn"]), "127.0.0.1:") {
			t.Errorf("got %v, want %s %s because of %q", l, tt.key, tt.id, tt.err)
		}
	}
	for range 3 * strangerLines {
		c, err := net.Dial("tcp", p.addr())
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
		io.Copy(io.Discard, c) // until the server closes it, which comes after the line
		c.Close()
	}
	p.stop()
	if got, want := p.count(refusedConn), 2+strangerLines; got != want {
		t.Errorf("%d lines, want %d", got, want)
	}
}

// TestRefusalWindows tells what was left out, lets another client through in a flood, and has no endless memory.
func TestRefusalWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		r := newRefusals(slog.New(slog.NewTextHandler(&out, nil)))
		addr := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1}
		lines := func(n int, err error) string {
			out.Reset()
			for range n {
				r.refused(addr, tls.ConnectionState{}, err)
			}
			return out.String()
		}
		stranger := errors.New("no TLS")
		client := func(n int) error { return fmt.Errorf("%w: client %d", mtls.ErrRefused, n) }
		if got := strings.Count(lines(100, stranger), "level=WARN"); got != strangerLines {
			t.Errorf("got %d lines of strangers, want %d", got, strangerLines)
		}
		if got := strings.Count(lines(5, client(1)), "level=WARN"); got != 1 {
			t.Errorf("got %d lines of a client, want 1", got)
		}
		if got := lines(1, io.EOF); got != "" {
			t.Errorf("a peer that left is logged: %s", got)
		}
		time.Sleep(refusalWindow)
		if got := lines(2, stranger); strings.Count(got, "left_out=90") != 1 {
			t.Errorf("got %s, want one line that counts those left out", got)
		}
		if got := lines(1, client(1)); !strings.Contains(got, "left_out=4") {
			t.Errorf("got %s", got)
		}
		for n := range 2 * maxWindows {
			lines(1, client(n))
		}
		if got := len(r.clients); got != maxWindows {
			t.Errorf("%d clients are remembered, want %d", got, maxWindows)
		}
		time.Sleep(refusalWindow)
		lines(1, client(2*maxWindows))
		if got := len(r.clients); got != 1 {
			t.Errorf("%d clients are remembered long after, want 1", got)
		}
	})
}
