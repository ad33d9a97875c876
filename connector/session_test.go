package connector

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestBackoff(t *testing.T) {
	var b backoff
	var ceilings []time.Duration
	for range 10 {
		ceilings = append(ceilings, b.ceiling())
		if d := b.next(); d < 0 || d > ceilings[len(ceilings)-1] {
			t.Errorf("delay %v is outside 0 to %v", d, ceilings[len(ceilings)-1])
		}
	}
	ms := time.Millisecond
	want := []time.Duration{250 * ms, 500 * ms, 1000 * ms, 2000 * ms, 4000 * ms, 8000 * ms, 15000 * ms, 15000 * ms, 15000 * ms, 15000 * ms}
	if !slices.Equal(ceilings, want) {
		t.Errorf("ceilings: got %v, want %v", ceilings, want)
	}
	// Full jitter: the delays fill the whole range.
	var low, high int
	for range 1000 {
		switch d := b.next(); {
		case d > backoffCap:
			t.Fatalf("delay %v is above the cap", d)
		case d < backoffCap/10:
			low++
		case d > backoffCap*9/10:
			high++
		}
	}
	if low < 40 || high < 40 {
		t.Errorf("of 1000 delays %d are in the lowest and %d in the highest tenth, want about 100 each", low, high)
	}
	if b.reset(); b.ceiling() != 250*ms {
		t.Errorf("after reset the ceiling is %v, want 250ms", b.ceiling())
	}
	if b.max(); b.ceiling() != refusedCap {
		t.Errorf("after max the ceiling is %v, want %v", b.ceiling(), refusedCap)
	}
	if b.next(); b.ceiling() != backoffCap {
		t.Errorf("after the pause that follows a refusal the ceiling is %v, want %v", b.ceiling(), backoffCap)
	}
}

// identities makes an authority and the identities of an edge and a connector.
func identities(t testing.TB) (authority *mtls.Authority, edge, conn *mtls.Source) {
	t.Helper()
	authority, err := mtls.InitAuthority(t.TempDir(), "test.example")
	if err != nil {
		t.Fatal(err)
	}
	source := func(kind mtls.Kind, name string) *mtls.Source {
		key, csr, err := mtls.NewKeyCSR()
		if err != nil {
			t.Fatal(err)
		}
		chain, err := authority.IssueCSR(csr, mtls.Identity{TrustDomain: "test.example", Kind: kind, Name: name}, 0)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := mtls.WriteIdentity(dir, key, chain, authority.RootPEM()); err != nil {
			t.Fatal(err)
		}
		s, err := mtls.OpenDir(dir, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	return authority, source(mtls.KindEdge, "edge-1"), source(mtls.KindConnector, "site-1")
}

// TestOutage keeps the edge away for two hours: no pause may be above the cap, and afterwards all sessions must be back
// within it.
func TestOutage(t *testing.T) {
	start := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC) // when a bubble's time begins
	d := &dials{answer: func(tunnel.DialConfig) (session, error) {
		if time.Since(start) < 2*time.Hour {
			return nil, tunnel.ErrNoAnswer
		}
		return newFake(), nil
	}}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(time.Hour)
		if err := c.Ready(t.Context()); !errors.Is(err, tunnel.ErrNoAnswer) {
			t.Errorf("Ready during the outage: got %v, want ErrNoAnswer", err)
		}
		time.Sleep(time.Hour + backoffCap)
		synctest.Wait()
		if err := c.Ready(t.Context()); err != nil {
			t.Errorf("Ready: got %v, want nil", err)
		}
		for i, s := range c.Status().Sessions {
			if s.State != StateConnected || s.Index != i {
				t.Errorf("session %d: got %+v, want it connected", i, s)
			}
			list := d.of(i)
			if len(list) < 240 { // two hours at 30 s at most
				t.Errorf("session %d was tried %d times, want 240 at least", i, len(list))
			}
			for j := 1; j < len(list); j++ {
				if gap := list[j].at.Sub(list[j-1].at); gap > backoffCap {
					t.Errorf("session %d: a pause of %v", i, gap)
				}
			}
			if list[1].at.Sub(list[0].at) > backoffBase {
				t.Errorf("session %d: the first pause is %v, want at most %v", i, list[1].at.Sub(list[0].at), backoffBase)
			}
		}
	})
}

// TestSteady loses sessions early and late: only one that lived for a minute starts the back-off anew.
func TestSteady(t *testing.T) {
	d := &dials{answer: func(tunnel.DialConfig) (session, error) { return newFake(), nil }}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		lose := func() *attempt {
			synctest.Wait()
			list := d.of(0)
			last := list[len(list)-1]
			last.s.lose(errors.New("lost"))
			return &last
		}
		for range 20 { // flapping
			lose()
			time.Sleep(backoffCap)
		}
		time.Sleep(steady)
		lose()
		lost := time.Now()
		time.Sleep(backoffBase)
		synctest.Wait()
		list := d.of(0)
		if gap := list[len(list)-1].at.Sub(lost); gap < 0 || gap > backoffBase {
			t.Errorf("after a steady session the pause is %v, want at most %v", gap, backoffBase)
		}
	})
	// The flapping part: with a session lost at once each time, 1 minute holds few attempts.
	d = &dials{answer: func(tunnel.DialConfig) (session, error) {
		s := newFake()
		s.lose(errors.New("lost at once"))
		return s, nil
	}}
	bubble(t, d, Config{}, func(*Connector, func()) {
		time.Sleep(10 * time.Minute)
		if n := len(d.of(0)); n < 20 || n > 200 {
			t.Errorf("a session that is lost at once was dialled %d times in ten minutes, want about 45", n)
		}
	})
}

// TestRefused gives every attempt a refusal that only a person can mend.
func TestRefused(t *testing.T) {
	for _, tt := range []struct {
		err  error
		says string
	}{
		{tunnel.ErrRevoked, "revoked"},
		{tunnel.ErrUnknown, "does not know this connector"},
		{tunnel.ErrCertificate, "right edge"},
		{tunnel.ErrNotAllowed, "operator"},
		{tunnel.ErrVersion, "update"},
	} {
		t.Run(tt.err.Error(), func(t *testing.T) {
			var log bytes.Buffer
			d := &dials{answer: func(tunnel.DialConfig) (session, error) { return nil, fmt.Errorf("dial: %w", tt.err) }}
			cfg := Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}
			bubble(t, d, cfg, func(_ *Connector, stop func()) {
				time.Sleep(time.Hour)
				stop()
				if n := len(d.of(0)); n < 120 || n > 500 {
					t.Errorf("%d attempts in an hour, want about 240", n)
				}
				text := log.String()
				if n := strings.Count(text, "level=ERROR"); n < 4 || n > 64 || !strings.Contains(text, tt.says) || !strings.Contains(text, "remedy=") {
					t.Errorf("%d error lines in an hour, want 4 to 64 that say %q:\n%.600s", n, tt.says, text)
				}
			})
		})
	}
}

// TestOutageLogged gives every attempt an error that names another port, as those of resolvers do.
func TestOutageLogged(t *testing.T) {
	var log bytes.Buffer
	var mu sync.Mutex
	port := 0
	d := &dials{answer: func(tunnel.DialConfig) (session, error) {
		mu.Lock()
		defer mu.Unlock()
		port++
		return nil, fmt.Errorf("read udp 192.0.2.9:%d->192.0.2.53:53: i/o timeout", port)
	}}
	bubble(t, d, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(_ *Connector, stop func()) {
		time.Sleep(time.Hour)
		stop()
		if n := strings.Count(log.String(), "level=WARN"); n < 4 || n > 64 {
			t.Errorf("%d warnings in an hour, want 4 to 64", n)
		}
	})
}

// TestExpired runs with a certificate that nobody renewed.
func TestExpired(t *testing.T) {
	var log bytes.Buffer
	d := &dials{answer: func(tunnel.DialConfig) (session, error) { return nil, tunnel.ErrNoAnswer }}
	bubble(t, d, Config{Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(_ *Connector, stop func()) {
		time.Sleep(25 * time.Hour)
		stop()
		if text := log.String(); !strings.Contains(text, "new join token") {
			t.Errorf("the log does not say how to mend an expired certificate:\n%.2000s", text)
		}
	})
}

// TestAddresses resolves the edge anew at each try and spreads the sessions.
func TestAddresses(t *testing.T) {
	answer := []string{"192.0.2.2", "192.0.2.1", "::ffff:192.0.2.2"}
	var mu sync.Mutex
	resolver := resolverFunc(func() (list []netip.Addr) {
		mu.Lock()
		defer mu.Unlock()
		for _, s := range answer {
			list = append(list, netip.MustParseAddr(s))
		}
		return list
	})
	d := &dials{answer: func(tunnel.DialConfig) (session, error) { return newFake(), nil }}
	bubble(t, d, Config{Edges: []string{"edge.example:4433"}, Resolver: resolver}, func(c *Connector, _ func()) {
		synctest.Wait()
		for i, want := range []string{"192.0.2.1:4433", "192.0.2.2:4433", "192.0.2.1:4433", "192.0.2.2:4433"} {
			if got := d.of(i)[0].addr; got != want {
				t.Errorf("session %d went to %s, want %s", i, got, want)
			}
		}
		mu.Lock()
		answer = []string{"2001:db8::7"}
		mu.Unlock()
		d.of(2)[0].s.lose(errors.New("the edge moved"))
		time.Sleep(time.Second)
		synctest.Wait()
		if got, want := d.of(2)[1].addr, "[2001:db8::7]:4433"; got != want {
			t.Errorf("after the move: got %s, want %s", got, want)
		}
		if a, b := d.of(0)[0].reg, d.of(3)[0].reg; a.Instance != b.Instance || a.Instance == "" {
			t.Errorf("instances %q and %q, want the same", a.Instance, b.Instance)
		}
	})
	// One address that does not answer must not keep a session from the other.
	answer = []string{"192.0.2.1", "192.0.2.2"}
	d = &dials{answer: func(c tunnel.DialConfig) (session, error) {
		if strings.HasPrefix(c.Addr, "192.0.2.1:") {
			return nil, tunnel.ErrNoAnswer
		}
		return newFake(), nil
	}}
	bubble(t, d, Config{Edges: []string{"edge.example"}, Resolver: resolver}, func(c *Connector, _ func()) {
		synctest.Wait()
		for _, s := range c.Status().Sessions {
			if s.State != StateConnected || s.Remote.String() != "192.0.2.2:7844" {
				t.Errorf("got %+v, want all sessions at 192.0.2.2", s)
			}
		}
	})
}

// TestEdgeDrains expects a replacement beside the session that an edge drains, and our own drain to end both.
func TestEdgeDrains(t *testing.T) {
	d := &dials{answer: func(tunnel.DialConfig) (session, error) { return newFake(), nil }}
	bubble(t, d, Config{}, func(c *Connector, stop func()) {
		synctest.Wait()
		for i := range SessionsPerEdge {
			d.of(i)[0].s.startDrain()
		}
		synctest.Wait()
		if err := c.Ready(t.Context()); err == nil {
			t.Error("ready while every session drains")
		}
		time.Sleep(backoffBase)
		synctest.Wait()
		if err := c.Ready(t.Context()); err != nil {
			t.Errorf("Ready: got %v, want nil", err)
		}
		for i := range SessionsPerEdge {
			if list := d.of(i); len(list) != 2 {
				t.Errorf("session %d was dialled %d times, want twice", i, len(list))
			}
		}
		stop()
		for _, a := range d.list {
			if !a.s.drained.Load() || a.s.cut {
				t.Errorf("session %d: drained %v, cut %v, want it drained", a.reg.Index, a.s.drained.Load(), a.s.cut)
			}
		}
	})
}

// TestIndexes has several entries, which may lead to one edge: an edge ends the older of two sessions with the same
// instance and index, and retires those of other instances.
func TestIndexes(t *testing.T) {
	d := &dials{answer: func(tunnel.DialConfig) (session, error) { return newFake(), nil }}
	bubble(t, d, Config{Edges: []string{"192.0.2.1", "192.0.2.2", "192.0.2.3"}}, func(c *Connector, _ func()) {
		synctest.Wait()
		if got := len(c.Status().Sessions); got != 6 {
			t.Errorf("%d sessions, want 6", got)
		}
		for _, i := range []int{0, 1, 4, 5, 8, 9} {
			first := d.of(0)[0].reg.Instance
			if list := d.of(i); len(list) != 1 || list[0].reg.Instance != first || list[0].addr != fmt.Sprintf("192.0.2.%d:7844", 1+i/4) {
				t.Errorf("index %d: %+v, want one session of instance %s", i, list, first)
			}
		}
	})
	_, _, identity := identities(t)
	if _, err := New(Config{Identity: identity, Edges: make([]string, 65)}); err == nil || !strings.Contains(err.Error(), "at most 64") {
		t.Errorf("65 edges: %v, want an error that names the limit", err)
	}
}

// TestRenewUnanswered: edges that do not answer do not keep the connector from asking another.
func TestRenewUnanswered(t *testing.T) {
	d := &dials{answer: func(c tunnel.DialConfig) (session, error) {
		s := newFake()
		s.mute = c.Registration.Index > 0
		return s, nil
	}}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		time.Sleep(time.Second)
		if chain, err := c.renew(context.Background(), []byte("csr")); err != nil || len(chain) != 1 {
			t.Errorf("one of four sessions answers: %q, %v", chain, err)
		}
		d.of(0)[0].s.lose(nil)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		if _, err := c.renew(ctx, []byte("csr")); !errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil {
			t.Errorf("no session answers: %v, want an error before the caller gives up", err)
		}
	})
}

// TestGrace has sessions whose flows do not end.
func TestGrace(t *testing.T) {
	d := &dials{answer: func(tunnel.DialConfig) (session, error) {
		s := newFake()
		s.hang = true
		return s, nil
	}}
	bubble(t, d, Config{DrainTimeout: 7 * time.Second}, func(c *Connector, stop func()) {
		synctest.Wait()
		d.of(1)[0].s.startDrain() // one that its edge drains already
		synctest.Wait()
		start := time.Now()
		stop()
		if took := time.Since(start); took != 7*time.Second {
			t.Errorf("the drain took %v, want 7s", took)
		}
		for _, a := range d.list {
			if a.s != nil && (!a.s.drained.Load() || !a.s.cut) {
				t.Errorf("session %d: drained %v, cut %v, want both", a.reg.Index, a.s.drained.Load(), a.s.cut)
			}
		}
		for _, s := range c.Status().Sessions {
			if s.State != StateStopped {
				t.Errorf("session %d: got %s, want stopped", s.Index, s.State)
			}
		}
	})
}

func TestNewErrors(t *testing.T) {
	_, _, id := identities(t)
	for _, tt := range []struct {
		name string
		cfg  Config
		says string
	}{
		{"no identity", Config{Edges: []string{"a"}}, "identity"},
		{"no edges", Config{Identity: id}, "edge"},
		{"bad edge", Config{Identity: id, Edges: []string{"a:b:c"}}, "host:port"},
		{"bad port", Config{Identity: id, Edges: []string{"a:0"}}, "port"},
		{"twice", Config{Identity: id, Edges: []string{"a", "a:7844"}}, "twice"},
		{"negative", Config{Identity: id, Edges: []string{"a"}, DialTimeout: -1}, "negative"},
	} {
		if _, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want an error that says %q", tt.name, err, tt.says)
		}
	}
}

func TestParseEdge(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"edge.example", "edge.example 7844"}, {"edge.example:443", "edge.example 443"}, {"192.0.2.1", "192.0.2.1 7844"},
		{"2001:db8::1", "2001:db8::1 7844"}, {"[2001:db8::1]:443", "2001:db8::1 443"},
	} {
		host, port, err := ParseEdge(tt.in)
		if got := fmt.Sprint(host, " ", port); err != nil || got != tt.want {
			t.Errorf("ParseEdge(%q): got %s, %v, want %s", tt.in, got, err, tt.want)
		}
	}
	for _, in := range []string{"", ":443", "a:", "a:70000", "a:x", "https://a", "a:1:2"} {
		if host, port, err := ParseEdge(in); err == nil {
			t.Errorf("ParseEdge(%q): got %s %d, want an error", in, host, port)
		}
	}
}
