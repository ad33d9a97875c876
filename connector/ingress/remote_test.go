package ingress

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

func body(service string) []byte {
	return fmt.Appendf(nil, `{"ingress":[{"service":%q}]}`, service)
}

func TestConfigure(t *testing.T) {
	a, b := server(t, echoSocket(t, "a")), server(t, echoSocket(t, "b"))
	file := filepath.Join(t.TempDir(), "remote.json")
	cfg := HandlerConfig{Local: rulesOf(t, "ingress:\n  - service: http_status:418\n"), Remote: true, File: file}
	bed := openBed(t, cfg)
	bed.SetPermit(permitAll{})
	ctx := t.Context()
	status := func(want int) {
		t.Helper()
		if got, text := bed.get("http://a.test/"); got != want {
			t.Errorf("got %d %q, want %d", got, text, want)
		}
	}
	state := func(want Status) {
		t.Helper()
		if got := bed.Status(); got != want {
			t.Errorf("status: got %+v, want %+v", got, want)
		}
	}
	status(418)
	state(Status{Source: SourceLocal, Rules: 1})
	for _, tt := range []struct {
		version uint64
		body    []byte
		says    string // empty: it is taken
		want    string // what answers
		now     uint64
	}{
		{3, body(a.URL), "", "a", 3},
		{3, body(a.URL), "", "a", 3},
		{3, body(b.URL), "other content", "a", 3},
		{2, body(b.URL), "version 2 is stale: version 3 is in force", "a", 3},
		{0, body(b.URL), "stale", "a", 3},
		{4, []byte(`{"ingress":[{"service":"ftp://a"}]}`), "ingress[0].service", "a", 3},
		{4, []byte(`{"ingress":[{"hostname":"x.y","service":"hello_world"}]}`), "the last rule", "a", 3},
		{4, []byte("\xff"), "not valid YAML", "a", 3},
		{4, body("unix:/run/docker.sock"), "own file", "a", 3},
		{9, body(b.URL), "", "b", 9},
		{8, body(a.URL), "stale", "b", 9},
	} {
		err := bed.Configure(ctx, tt.version, tt.body)
		if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("version %d %s: got %v, want %q", tt.version, tt.body, err, tt.says)
		}
		if _, text := bed.get("http://a.test/"); text != tt.want {
			t.Errorf("version %d %s: %q answers, want %q", tt.version, tt.body, text, tt.want)
		}
		state(Status{Source: SourceRemote, Version: tt.now, Rules: 1})
	}

	// The file outlives the process, and says nothing to others.
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the kept file: %v, %v", info, err)
	}
	again := openBed(t, cfg)
	again.SetPermit(permitAll{})
	if _, text := again.get("http://a.test/"); text != "b" || again.Version() != 9 {
		t.Errorf("after a restart %q answers by version %d, want b by 9", text, again.Version())
	}
	if err := again.Configure(ctx, 8, body(a.URL)); err == nil {
		t.Error("a stale version was taken after a restart")
	}

	// A configuration without rules gives way to the local file.
	must(t, bed.Configure(ctx, 10, []byte("{}")))
	status(418)
	state(Status{Source: SourceLocal, Version: 10, Rules: 1})
	if version, c, err := Kept(file); version != 10 || c.Len() != 0 || err != nil {
		t.Errorf("Kept: got %d, %d rules, %v", version, c.Len(), err)
	}
}

func TestConfigureSwitchedOff(t *testing.T) {
	bed := newBed(t, "ingress:\n  - service: hello_world\n")
	if err := bed.Configure(t.Context(), 1, body("http_status:404")); err == nil || !strings.Contains(err.Error(), "remote_config") {
		t.Errorf("got %v", err)
	}
}

func TestKeptFileIsBroken(t *testing.T) {
	for _, text := range []string{"", "{", `{"version":0,"body":{}}`, `{"version":1,"body":{"ingress":[{"service":"unix:/x"}]}}`} {
		file := filepath.Join(t.TempDir(), "remote.json")
		must(t, os.WriteFile(file, []byte(text), 0o600))
		bed := openBed(t, HandlerConfig{Local: rulesOf(t, "ingress:\n  - service: hello_world\n"), Remote: true, File: file})
		if s := bed.Status(); s.Source != SourceLocal || s.Version != 0 {
			t.Errorf("%q: got %+v, want the local rules", text, s)
		}
		wantHas(t, "log", bed.log.String(), "cannot be used")
	}
}

// Many edges push at once: all see success, and the highest version stays.
func TestConfigureTogether(t *testing.T) {
	bed := openBed(t, HandlerConfig{Remote: true, File: filepath.Join(t.TempDir(), "r")})
	bed.SetPermit(permitAll{})
	var wg sync.WaitGroup
	for v := uint64(1); v <= 20; v++ {
		for range 2 {
			wg.Go(func() {
				err := bed.Configure(t.Context(), v, body(fmt.Sprintf("http_status:%d", 200+v)))
				if err != nil && !strings.Contains(err.Error(), "stale") {
					t.Errorf("version %d: %v", v, err)
				}
			})
		}
	}
	wg.Wait()
	if status, _ := bed.get("http://a.test/"); status != 220 || bed.Version() != 20 {
		t.Errorf("got %d by version %d, want 220 by 20", status, bed.Version())
	}
}

// Rules from the edge reach what the list permits, judged when they come and at each connection.
func TestRemoteIsBounded(t *testing.T) {
	o := server(t, func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "in") })
	addr := netip.MustParseAddrPort(o.Listener.Addr().String())
	bed := openBed(t, HandlerConfig{Remote: true})
	if err := bed.Configure(t.Context(), 1, body(o.URL)); !errors.Is(err, ErrDenied) {
		t.Errorf("without a permit: got %v, want ErrDenied", err)
	}
	bed.SetPermit(permitNone{})
	if err := bed.Configure(t.Context(), 1, body(o.URL)); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), "ingress[0].service") {
		t.Errorf("not permitted: got %v, want ErrDenied that names the rule", err)
	}
	must(t, bed.Configure(t.Context(), 1, body("http_status:204"))) // reaches nothing
	bed.SetPermit(permitAll{})
	must(t, bed.Configure(t.Context(), 2, body(o.URL)))
	if status, text := bed.get("http://a.test/"); status != 200 || text != "in" {
		t.Errorf("got %d %q", status, text)
	}
	if cut := bed.SetPermit(onlyAddr(addr)); cut != 0 {
		t.Errorf("%d connections were cut that are still permitted", cut)
	}
	// The connection that waits for requests is cut, and no new one is made.
	if cut := bed.SetPermit(permitNone{}); cut != 1 {
		t.Errorf("%d connections were cut, want 1", cut)
	}
	if status, text := bed.get("http://a.test/"); status != 502 || !strings.Contains(text, "not permitted") {
		t.Errorf("got %d %q, want 502", status, text)
	}
	// A name is judged by what it resolves to.
	bed.SetPermit(nameOnly{})
	must(t, bed.Configure(t.Context(), 3, body(fmt.Sprintf("http://localhost:%d", addr.Port()))))
	if status, _ := bed.get("http://a.test/"); status != 502 {
		t.Errorf("a name that leads where nothing is permitted: got %d, want 502", status)
	}
}

// The permit goes and comes while connections are made: each is refused or cut, and none is remembered in the end.
func TestPermitWhileDialling(t *testing.T) {
	l, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer l.Close()
	o := server(t, func(http.ResponseWriter, *http.Request) {})
	far := openBed(t, HandlerConfig{Remote: true})
	far.SetPermit(permitAll{})
	must(t, far.Configure(t.Context(), 1, fmt.Appendf(nil, `{"ingress":[{"hostname":"udp.test","service":"udp://%s"},{"hostname":"tcp.test","service":"tcp://%s"},{"service":"http_status:404"}]}`,
		l.LocalAddr(), o.Listener.Addr())))
	var dialling sync.WaitGroup
	for range 4 {
		dialling.Go(func() {
			for range 100 {
				if c, err := far.DialPacket(t.Context(), tunnel.Flow{Kind: tunnel.KindIngressUDP, Service: "udp", Host: "udp.test", Port: 1}); err == nil {
					c.Close()
				} else if !errors.Is(err, ErrDenied) {
					t.Error(err)
				}
				if c, err := far.Dial(t.Context(), tunnel.Flow{Kind: tunnel.KindIngress, Service: "tcp", Host: "tcp.test", Port: 1}); err == nil {
					c.Close()
				} else if !errors.Is(err, ErrDenied) {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		dialling.Wait()
		close(done)
	}()
	for over := false; !over; {
		far.SetPermit(permitNone{})
		far.SetPermit(permitAll{})
		select {
		case <-done:
			over = true
		default:
		}
	}
	if n := far.SetPermit(nil); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

type onlyAddr netip.AddrPort

func (onlyAddr) Name(string, uint16) bool { return false }
func (o onlyAddr) Addr(name string, to netip.AddrPort) bool {
	return name == "" && to == netip.AddrPort(o)
}

type nameOnly struct{ permitNone }

func (nameOnly) Name(string, uint16) bool { return true }

// Rules that stay keep their connections over a change, those that go lose theirs, and what is in flight ends in peace.
func TestChangeOfRules(t *testing.T) {
	var mu sync.Mutex
	conns := map[string]map[string]bool{"stays": {}, "goes": {}}
	release := make(chan struct{})
	origin := func(name string) string {
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			conns[name][r.RemoteAddr] = true
			mu.Unlock()
			if r.URL.Path == "/slow" {
				fmt.Fprint(w, "begun ")
				http.NewResponseController(w).Flush() //nolint:errcheck // the test notices
				<-release
			}
			fmt.Fprint(w, name)
		}))
		s.Config.ConnState = func(c net.Conn, st http.ConnState) {
			if st == http.StateClosed {
				mu.Lock()
				defer mu.Unlock()
				delete(conns[name], c.RemoteAddr().String())
			}
		}
		s.Start()
		t.Cleanup(s.Close)
		return s.URL
	}
	stays, goes := origin("stays"), origin("goes")
	open := func(name string) int {
		mu.Lock()
		defer mu.Unlock()
		return len(conns[name])
	}
	bed := newBed(t, "ingress:\n  - {hostname: goes.test, service: '"+goes+"'}\n  - service: "+stays+"\n")
	bed.get("http://goes.test/")
	bed.get("http://a.test/")
	res, err := bed.client().Get("http://goes.test/slow") // on the same connection, or another
	must(t, err)
	defer res.Body.Close()
	if _, err := io.ReadFull(res.Body, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	must(t, bed.SetLocal(rulesOf(t, "ingress:\n  - {hostname: goes.test, service: http_status:410}\n  - service: "+stays+"\n")))
	if status, _ := bed.get("http://goes.test/"); status != 410 {
		t.Errorf("a later request: got %d, want 410", status)
	}
	close(release)
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != "goes" {
		t.Errorf("the request in flight: %q, %v", b, err)
	}
	eventually(t, "the old rule's connections are closed", func() bool { return open("goes") == 0 })
	bed.get("http://a.test/")
	if n := open("stays"); n != 1 {
		t.Errorf("the rule that stays has %d connections, want the one from before", n)
	}
	if err := bed.SetLocal(rulesOf(t, "ingress:\n  - service: https://a\n    origin: {ca_pool: /nonexistent}\n")); err == nil {
		t.Error("rules with a missing file were taken")
	}
	if status, _ := bed.get("http://goes.test/"); status != 410 {
		t.Errorf("after refused rules: got %d, want 410", status)
	}
}

func TestDial(t *testing.T) {
	echo := func(c net.Conn) {
		b, err := io.ReadAll(c) // to the half-close
		if err == nil {
			fmt.Fprintf(c, "%s!", b)
		}
	}
	addr := rawOrigin(t, func(c *net.TCPConn) { echo(c) })
	announced := rawOrigin(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		line, _ := r.ReadString('\n')
		io.Copy(io.Discard, r) //nolint:errcheck // to the half-close
		fmt.Fprint(c, line)
	})
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	must(t, err)
	defer ln.Close()
	go func() {
		if c, err := ln.Accept(); err == nil {
			echo(c)
			c.Close()
		}
	}()
	bed := newBed(t, fmt.Sprintf(`
ingress:
  - {hostname: path.test, path: ^/x, service: hello_world}
  - {hostname: path.test, service: "tcp://%[1]s"}
  - {hostname: "*.tcp.test", service: "tcp://%[1]s"}
  - {hostname: who.test, service: "tcp://%[2]s", origin: {proxy_protocol: v1}}
  - {hostname: unix.test, service: "unix:%[3]s"}
  - {hostname: down.test, service: "tcp://%[4]s"}
  - service: http_status:404
`, addr, announced, path, downAddr(t)))
	for _, tt := range []struct{ host, want string }{
		{"path.test", "hello!"}, {"a.tcp.test", "hello!"}, {"unix.test", "hello!"}, {"who.test", "PROXY TCP4 203.0.113.5 127.0.0.1 99 "},
	} {
		mine, theirs := pair(t)
		origin, err := bed.Dial(t.Context(), tunnel.Flow{Kind: tunnel.KindIngress, Service: "tcp", Host: tt.host, Visitor: netip.MustParseAddrPort("203.0.113.5:99")})
		if err != nil {
			t.Errorf("%s: %v", tt.host, err)
			continue
		}
		done := make(chan error, 1)
		go func() { _, _, err := tunnel.Splice(t.Context(), theirs, origin); done <- err }()
		fmt.Fprint(mine, "hello")
		must(t, mine.CloseWrite())
		b, err := io.ReadAll(mine)
		if err != nil || !strings.HasPrefix(string(b), tt.want) {
			t.Errorf("%s: got %q, %v, want %q", tt.host, b, err, tt.want)
		}
		mine.Close()
		<-done
	}
	for host, want := range map[string]error{"other.test": ErrNoService, "": ErrNoService, "*.x": ErrNoService} {
		if _, err := bed.Dial(t.Context(), tunnel.Flow{Host: host}); !errors.Is(err, want) {
			t.Errorf("%q: got %v, want %v", host, err, want)
		}
	}
	if _, err := bed.Dial(t.Context(), tunnel.Flow{Host: "down.test"}); err == nil {
		t.Error("a service that is down: no error")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := bed.Dial(ctx, tunnel.Flow{Host: "a.tcp.test"}); !errors.Is(err, context.Canceled) && !strings.Contains(fmt.Sprint(err), "cancel") {
		t.Errorf("an edge that gave up: got %v", err)
	}
}

// After Close, flows are cut, those of upgraded connections too, and new ones refused.
func TestClose(t *testing.T) {
	o := server(t, echoSocket(t, "x"))
	h, err := New(HandlerConfig{Local: rulesOf(t, "ingress:\n  - service: "+o.URL+"\n")})
	must(t, err)
	bed := &bed{t: t, Handler: h}
	c := bed.open(netip.AddrPort{})
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 101 {
		t.Fatalf("got %v, %v", res, err)
	}
	must(t, h.Close())
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("the open flow: got %v, want a reset", err)
	}
	late := bed.open(netip.AddrPort{})
	if _, err := late.Read(make([]byte, 1)); err == nil {
		t.Error("a flow after Close was served")
	}
	if err := h.Configure(t.Context(), 1, body("hello_world")); err == nil {
		t.Error("a configuration was taken after Close")
	}
}

// FuzzKept stands for a disk that lies: what is read back is refused or is a configuration from an edge.
func FuzzKept(f *testing.F) {
	f.Add([]byte(`{"version":3,"body":{"ingress":[{"service":"hello_world"}]}}`))
	f.Add([]byte(`{"version":3,"body":{"ingress":[{"service":"unix:/x"}]}}`))
	path := filepath.Join(f.TempDir(), "remote.json")
	f.Fuzz(func(t *testing.T, b []byte) {
		must(t, os.WriteFile(path, b, 0o600))
		version, c, err := Kept(path)
		if err != nil {
			return
		}
		if version == 0 {
			t.Fatal("version 0 was taken")
		}
		for _, target := range c.Targets() {
			if target.Service.Scheme == ingressconf.Unix {
				t.Fatal("a socket was taken from an edge")
			}
		}
	})
}
