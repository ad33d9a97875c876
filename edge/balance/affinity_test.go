package balance

import (
	"crypto/sha256"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
)

func requestWith(cookies ...*http.Cookie) *http.Request {
	r, _ := http.NewRequest("GET", "https://a.test/", nil)
	for _, c := range cookies {
		r.AddCookie(c)
	}
	return r
}

func TestCookieKeepsAVisitor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := poolOf("p", 1, 1, 1, 1, 1)
		cfg.Affinity = &spec.Affinity{Type: spec.AffinityCookie, TTL: spec.Duration(time.Hour)}
		b := newBalancer(t, newSite(), cfg)
		first := pick(t, b, "p", Visit{Request: requestWith()})
		c := first.Cookie
		if c == nil || !c.Secure || !c.HttpOnly || c.MaxAge != 3600 {
			t.Fatalf("cookie %v", c)
		}
		if strings.Contains(c.Value, "p-") || strings.Contains(c.Name, "p-") {
			t.Errorf("the cookie tells of the inside: %v", c)
		}
		stays := func() {
			t.Helper()
			for range 30 {
				if l := pick(t, b, "p", Visit{Request: requestWith(c)}); l.Endpoint().Name != first.Endpoint().Name || l.Cookie != nil {
					t.Fatalf("moved from %s to %s, with cookie %v", first.Endpoint().Name, l.Endpoint().Name, l.Cookie)
				}
			}
		}
		set := func(change func(*spec.Endpoint)) {
			t.Helper()
			for i := range cfg.Endpoints {
				if cfg.Endpoints[i].Name == first.Endpoint().Name {
					change(&cfg.Endpoints[i])
				}
			}
			if err := b.Set([]spec.PoolConfig{cfg}); err != nil {
				t.Fatal(err)
			}
		}
		set(func(e *spec.Endpoint) { e.Drain = true })
		stays() // drain keeps affinity until it ends
		for range 50 {
			if l := pick(t, b, "p", Visit{Request: requestWith()}); l.Endpoint().Name == first.Endpoint().Name {
				t.Fatal("a new visitor at a draining endpoint")
			}
		}
		set(func(e *spec.Endpoint) { e.Disabled = true })
		l := pick(t, b, "p", Visit{Request: requestWith(c)}) // disabled ends it at once
		if l.Endpoint().Name == first.Endpoint().Name || l.Cookie == nil {
			t.Error("the visitor stayed at a disabled endpoint, or got no new cookie")
		}
		set(func(e *spec.Endpoint) { e.Disabled, e.Drain = false, false })
		stays()
		time.Sleep(61 * time.Minute)
		if l := pick(t, b, "p", Visit{Request: requestWith(c)}); l.Cookie == nil {
			t.Error("the cookie outlived its time")
		}
	})
}

// A visitor who sends many cookies costs no more than one who sends a few.
func TestFewCookiesAreLookedAt(t *testing.T) {
	cfg := poolOf("p", 1, 1, 1)
	cfg.Affinity = &spec.Affinity{Type: spec.AffinityCookie, Name: "stay"}
	b := newBalancer(t, newSite(), cfg)
	good := pick(t, b, "p", Visit{Request: requestWith()}).Cookie
	bad := *good
	bad.Value = strings.Repeat("A", cookieChars)
	for n, kept := range map[int]bool{maxCookies - 1: true, maxCookies: false} {
		list := append(slices.Repeat([]*http.Cookie{&bad}, n), good)
		if l := pick(t, b, "p", Visit{Request: requestWith(list...)}); (l.Cookie == nil) != kept {
			t.Errorf("behind %d others the good cookie counts: got %v, want %v", n, l.Cookie == nil, kept)
		}
	}
}

// A cookie of one pool, of another key, or changed in any bit, is worth nothing.
func TestCookiesCannotBeForged(t *testing.T) {
	p, q := poolOf("p", 1, 1, 1), poolOf("q", 1, 1, 1)
	p.Affinity = &spec.Affinity{Type: spec.AffinityCookie, Name: "stay"}
	q.Affinity = p.Affinity
	b := newBalancer(t, newSite(), p, q)
	c := pick(t, b, "p", Visit{Request: requestWith()}).Cookie
	if _, ok := b.openCookie("p", c.Value, time.Now()); !ok {
		t.Fatal("the cookie itself is not good")
	}
	if _, ok := b.openCookie("q", c.Value, time.Now()); ok {
		t.Error("a cookie of p is good in q")
	}
	for i := range c.Value {
		for _, ch := range []byte("AB-_z0") {
			if c.Value[i] == ch {
				continue
			}
			if _, ok := b.openCookie("p", c.Value[:i]+string(ch)+c.Value[i+1:], time.Now()); ok {
				t.Fatalf("a cookie with another byte %d is good", i)
			}
		}
	}
	other, err := New(Config{Dialer: newSite()})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := other.openCookie("p", c.Value, time.Now()); ok {
		t.Error("a cookie of another installation is good")
	}
}

func TestIPCookieBeginsWithTheAddress(t *testing.T) {
	cfg := poolOf("p", 1, 1, 1, 1)
	cfg.Affinity = &spec.Affinity{Type: spec.AffinityIPCookie}
	b := newBalancer(t, newSite(), cfg)
	v := Visit{IP: netip.MustParseAddr("192.0.2.7"), Request: requestWith()}
	want := pick(t, b, "p", v).Endpoint().Name
	for range 30 {
		if got := pick(t, b, "p", v).Endpoint().Name; got != want {
			t.Fatalf("got %s after %s", got, want)
		}
	}
}

func TestHeaderAffinity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := poolOf("p", 1, 1, 1, 1, 1)
		cfg.Affinity = &spec.Affinity{Type: spec.AffinityHeader, Name: "X-Session", TTL: spec.Duration(time.Minute)}
		b, twin := newBalancer(t, newSite(), cfg), newBalancer(t, newSite(), cfg)
		at := func(b *Balancer, value string) string {
			r := requestWith()
			r.Header.Set("X-Session", value)
			return pick(t, b, "p", Visit{Request: r}).Endpoint().Name
		}
		want := map[string]string{}
		for i := range 40 {
			v := strconv.Itoa(i)
			want[v] = at(b, v)
			if got := at(twin, v); got != want[v] {
				t.Errorf("two edges send %q to %s and %s", v, want[v], got)
			}
		}
		cfg.Endpoints = append(cfg.Endpoints, spec.Endpoint{Name: "new", Host: "p-new", Port: 80})
		if err := b.Set([]spec.PoolConfig{cfg}); err != nil {
			t.Fatal(err)
		}
		for v, w := range want {
			if got := at(b, v); got != w {
				t.Errorf("%q moved from %s to %s", v, w, got)
			}
		}
		time.Sleep(2 * time.Minute)
		at(b, "0")
		p := b.now.Load().pools["p"]
		if n := p.state.values.order.Len(); n != 1 {
			t.Errorf("%d values are remembered after their time", n)
		}
	})
}

func TestHeaderTableIsBounded(t *testing.T) {
	var a affinities
	now := time.Now()
	for i := range maxValues + 100 {
		a.put(sha256.Sum256([]byte(strconv.Itoa(i))), id{1}, now)
	}
	if len(a.byKey) != maxValues || a.order.Len() != maxValues {
		t.Errorf("%d values, want %d", len(a.byKey), maxValues)
	}
	if _, ok := a.get(sha256.Sum256([]byte("0")), now, time.Hour); ok {
		t.Error("the oldest value is still there")
	}
}

// The cookie comes from a visitor, who would like to choose an endpoint, or to end the edge.
func FuzzCookie(f *testing.F) {
	b, err := New(Config{Dialer: newSite(), Key: make([]byte, keySize)})
	if err != nil {
		f.Fatal(err)
	}
	now := time.Unix(1_800_000_000, 0)
	f.Add(b.sealCookie("p", id{1, 2, 3}, now.Add(time.Hour)))
	f.Add("")
	f.Add(strings.Repeat("A", cookieChars))
	f.Fuzz(func(t *testing.T, s string) {
		e, ok := b.openCookie("p", s, now)
		if ok && b.sealCookie("p", e, now.Add(time.Hour)) != s {
			// The end of validity may differ, and nothing else.
			if got, ok := b.openCookie("p", s, now.Add(7*24*time.Hour)); ok && got != e {
				t.Fatalf("%q is read as two endpoints", s)
			}
		}
	})
}
