package signer

import (
	"crypto"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// clock is a Policy's clock that the test sets.
type clock struct{ now atomic.Pointer[time.Time] }

func newClock(text string) *clock {
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		panic(err)
	}
	c := new(clock)
	c.now.Store(&at)
	return c
}

func (c *clock) Now() time.Time { return *c.now.Load() }

func (c *clock) add(d time.Duration) {
	at := c.Now().Add(d)
	c.now.Store(&at)
}

// limited is a rule that allows edgeOne to sign with p256.
func limited(edit func(*ClientRule)) ClientRule {
	r := ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"sign"}, Schemes: []string{"*"}, SNIs: []string{"*"}}
	edit(&r)
	return r
}

func policyOn(t testing.TB, o Options, rules ...ClientRule) *Policy {
	t.Helper()
	p, err := NewPolicy(rules, o)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// spend takes n times and returns how often it was allowed, and why not the last time.
func spend(p *Policy, key *Entry, n int) (allowed int, last Reason) {
	for range n {
		if last = p.take(edgeOne, OpSign, key, Algorithm{ECDSA, crypto.SHA256}, ""); last == Allowed {
			allowed++
		}
	}
	return allowed, last
}

func TestParseRate(t *testing.T) {
	for text, want := range map[string]Rate{
		"100/s":             {100, time.Second, 100},
		"1/s":               {1, time.Second, 1},
		"100/s burst 200":   {100, time.Second, 200},
		"100/s burst 1":     {100, time.Second, 1},
		"6000/m":            {6000, time.Minute, 100},
		"30/m":              {30, time.Minute, 1},
		"10/h burst 10":     {10, time.Hour, 10},
		"1000000/s":         {1000000, time.Second, 1000000},
		"5/s burst 1000000": {5, time.Second, 1000000},
	} {
		if got, err := ParseRate(text); err != nil || got != want {
			t.Errorf("%q: got %+v, %v; want %+v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "100", "/s", "100/", "0/s", "-1/s", "+1/s", "01/s", "1.5/s", "1e3/s", "1000001/s", "100 /s", "100/ s", "100/d", "100/sec",
		"100/s burst", "100/s burst ", "100/s burst 0", "100/s burst 1000001", "100/s  burst 2", "100/s Burst 2", "100/s burst 2 ", " 100/s", "99999999999999999999/s"} {
		if got, err := ParseRate(text); err == nil || !strings.Contains(err.Error(), "write one such as") {
			t.Errorf("%q: got %+v and error %v, want an error with a remedy", text, got, err)
		}
	}
}

// FuzzRate is an operator who mistypes: what is accepted must be what its canonical text says.
func FuzzRate(f *testing.F) {
	for _, s := range []string{"100/s", "6000/m", "10/h burst 20", "/", "1/s burst "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRate(s)
		if err != nil {
			return
		}
		again, err := ParseRate(r.String())
		if err != nil || again != r || r.N < 1 || r.Burst < 1 || !strings.HasPrefix(r.String(), s) {
			t.Errorf("%q is %+v (%s), and that is %+v, %v", s, r, r, again, err)
		}
	})
}

func TestLimitErrors(t *testing.T) {
	for field, edit := range map[string]func(*ClientRule){
		"rate":       func(r *ClientRule) { r.Rate = "fast" },
		"daily":      func(r *ClientRule) { r.Daily = -1 },
		"windows[1]": func(r *ClientRule) { r.Windows = []string{"00:00-24:00", "06:00-06:00"} },
	} {
		_, err := NewPolicy([]ClientRule{limited(func(*ClientRule) {}), limited(edit)}, Options{})
		var re *RuleError
		if !errors.As(err, &re) || re.Rule != 1 || re.Key != field {
			t.Errorf("%s: got %v", field, err)
		}
	}
}

func TestRate(t *testing.T) {
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	c := newClock("2026-11-23T12:00:00Z")
	p := policyOn(t, Options{Clock: c.Now}, limited(func(r *ClientRule) { r.Rate = "10/s burst 20" }))
	steps := []struct {
		after time.Duration
		want  int
	}{
		{0, 20},                        // the burst
		{100 * time.Millisecond, 1},    // a tenth of a second's worth
		{99 * time.Millisecond, 0},     // not quite the next
		{time.Millisecond, 1},          // now
		{time.Second, 10},              // a second's worth
		{time.Hour, 20},                // never more than the burst
		{-time.Hour, 0},                // the clock goes back
		{time.Hour - time.Second, 0},   // on the way forward again
		{time.Second, 0},               // where it was
		{300 * time.Millisecond, 3},    // and on
		{24 * time.Hour * 36500, 20},   // far away
		{-24 * time.Hour * 36500, 0},   // and back
		{24 * time.Hour * 36499, 0},    // still before
		{48*time.Hour + time.Hour, 20}, // after
	}
	for i, s := range steps {
		c.add(s.after)
		got, last := spend(p, key, 40)
		if got != s.want || last != RefusedRate {
			t.Errorf("step %d: got %d, and %q; want %d, and %q", i, got, last, s.want, RefusedRate)
		}
	}
}

func TestDaily(t *testing.T) {
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	c := newClock("2026-11-23T23:59:58Z")
	p := policyOn(t, Options{Clock: c.Now}, limited(func(r *ClientRule) { r.Daily = 5 }))
	steps := []struct {
		name  string
		after time.Duration
		want  int
	}{
		{"the day's", 0, 5},
		{"last second", time.Second, 0},
		{"midnight in UTC", time.Second, 5},
		{"clock goes back over midnight", -2 * time.Second, 0},
		{"and forward again", 2 * time.Second, 0},
		{"the same day", 23 * time.Hour, 0},
		{"the next", time.Hour, 5},
		{"a clock that runs ahead", 24 * time.Hour * 3650, 5},
		{"is put right: what was used stays used", -24 * time.Hour * 3650, 0},
		{"and the day after is a day as any other", 24 * time.Hour, 5},
	}
	for _, s := range steps {
		c.add(s.after)
		if got, last := spend(p, key, 7); got != s.want || last != RefusedDaily {
			t.Errorf("%s: got %d, and %q; want %d, and %q", s.name, got, last, s.want, RefusedDaily)
		}
	}
	for text, want := range map[string]int64{"1970-01-01T00:00:00Z": 0, "1969-12-31T23:59:59Z": -1, "1970-01-02T00:00:00Z": 1, "2026-11-23T23:59:59Z": 20780, "2026-11-24T01:00:00+02:00": 20780} {
		if got := dayOf(newClock(text).Now()); got != want {
			t.Errorf("%s is day %d, want %d", text, got, want)
		}
	}
}

// TestLimitsAddUp holds rules to be additive: what one refuses another may allow, each operation counts once, and nothing that is refused counts.
func TestLimitsAddUp(t *testing.T) {
	reg := testRegistry(t, false)
	key, rsaKey := reg.BySKI(skiOf(t, "p256")), reg.BySKI(skiOf(t, "rsa"))
	c := newClock("2026-11-23T12:00:00Z")
	rate := limited(func(r *ClientRule) { r.Rate = "3/h burst 3" })
	daily := limited(func(r *ClientRule) { r.Daily = 4 })
	both := limited(func(r *ClientRule) { r.Rate, r.Daily = "5/h burst 5", 2 })
	free := limited(func(*ClientRule) {})
	elsewhere := limited(func(r *ClientRule) { r.Rate, r.Keys = "100/s", []string{"rsa"} })
	closed := limited(func(r *ClientRule) { r.Rate, r.Windows = "100/s", []string{"13:00-14:00"} })
	otherScheme := limited(func(r *ClientRule) { r.Rate, r.Schemes = "100/s", []string{"ed25519"} })
	tests := []struct {
		name  string
		rules []ClientRule
		want  int
		last  Reason
	}{
		{"one", []ClientRule{rate}, 3, RefusedRate},
		{"two", []ClientRule{rate, daily}, 7, RefusedRate},
		{"two with one limit are two", []ClientRule{rate, rate}, 6, RefusedRate},
		{"both limits of one rule hold", []ClientRule{both}, 2, RefusedDaily},
		{"one without a limit is enough", []ClientRule{rate, free, daily}, 20, Allowed},
		{"rules for something else lend nothing", []ClientRule{elsewhere, closed, otherScheme, rate}, 3, RefusedRate},
		{"no rule allows it", []ClientRule{closed}, 0, RefusedWindow},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := policyOn(t, Options{Clock: c.Now}, tt.rules...)
			if got, last := spend(p, key, 20); got != tt.want || last != tt.last {
				t.Errorf("got %d, and %q; want %d, and %q", got, last, tt.want, tt.last)
			}
		})
	}
	p := policyOn(t, Options{Clock: c.Now}, rate, elsewhere)
	spend(p, key, 20)
	alg := Algorithm{PSS, crypto.SHA256}
	for range 100 {
		if got := p.take(edgeOne, OpSign, rsaKey, alg, ""); got != Allowed {
			t.Fatalf("the other rule: got %q", got)
		}
	}
}

func TestQuotasSurviveReload(t *testing.T) {
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	c := newClock("2026-11-23T12:00:00Z")
	o := Options{Clock: c.Now, Quotas: new(Quotas)}
	rate, daily := limited(func(r *ClientRule) { r.Rate = "10/h burst 10" }), limited(func(r *ClientRule) { r.Daily = 10 })
	spend(policyOn(t, o, rate), key, 4)
	widened := rate
	widened.SNIs, widened.Rate = []string{"*", "www.example.com"}, "10/h burst 10"
	if got, _ := spend(policyOn(t, o, widened), key, 20); got != 6 {
		t.Errorf("the same limit after a reload: got %d, want the 6 that were left", got)
	}
	respelled := rate
	respelled.Rate = "5/h burst 5"
	if got, _ := spend(policyOn(t, o, respelled), key, 20); got != 5 {
		t.Errorf("another limit: got %d, want all 5", got)
	}
	spend(policyOn(t, o, daily), key, 7)
	if got, _ := spend(policyOn(t, o, rate, daily), key, 20); got != 3 {
		t.Errorf("got %d, want 0 of the rate and 3 of the day", got)
	}
	stranger := daily
	stranger.ID = edgeTwo
	if p := policyOn(t, o, stranger); p.take(edgeTwo, OpSign, key, Algorithm{ECDSA, crypto.SHA256}, "") != Allowed {
		t.Error("another client has another budget")
	}

	// While keys are exchanged, an operation counts once, and against both policies' limits.
	o = Options{Clock: c.Now, Quotas: new(Quotas)}
	before, after := policyOn(t, o, rate), policyOn(t, o, rate, daily)
	if got, _ := spend(before.And(after), key, 8); got != 8 {
		t.Errorf("both policies: got %d, want 8", got)
	}
	if got, _ := spend(before, key, 8); got != 2 {
		t.Errorf("afterwards: got %d, want the 2 that were left", got)
	}
	narrow := policyOn(t, o, limited(func(r *ClientRule) { r.Rate = "2/h burst 2" }))
	free := policyOn(t, o, limited(func(*ClientRule) {}))
	if got, _ := spend(free.And(narrow), key, 8); got != 2 {
		t.Errorf("the narrower policy: got %d, want 2", got)
	}
	for name, both := range map[string]*Policy{"first": narrow.And(free), "second": free.And(narrow)} {
		if g := both.grant(edgeOne, OpSign, key, ""); !g.limited(OpSign, Algorithm{ECDSA, crypto.SHA256}) {
			t.Errorf("a limit of the %s policy is not seen", name)
		}
	}
}

func TestQuotasConcurrently(t *testing.T) {
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	c := newClock("2026-11-23T12:00:00Z")
	p := policyOn(t, Options{Clock: c.Now}, limited(func(r *ClientRule) { r.Rate = "300/h burst 300" }), limited(func(r *ClientRule) { r.Daily = 200 }))
	var wg sync.WaitGroup
	var total atomic.Int64
	for range 8 {
		wg.Go(func() {
			n, _ := spend(p, key, 100)
			total.Add(int64(n))
		})
	}
	wg.Wait()
	if total.Load() != 500 {
		t.Errorf("got %d of 800 operations, want the 500 of both limits", total.Load())
	}
}

func TestQuotaDoesNotAllocate(t *testing.T) {
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	p := policyOn(t, Options{},
		limited(func(r *ClientRule) { r.Rate, r.Daily, r.Windows = "1/h", 1, []string{"00:00-24:00 Europe/Zurich"} }),
		limited(func(r *ClientRule) {
			r.Rate, r.Daily, r.Windows = "1000000/s", 1<<40, []string{"00:00-24:00 Europe/Zurich"}
		}))
	alg := Algorithm{ECDSA, crypto.SHA256}
	n := testing.AllocsPerRun(100, func() {
		if p.Check(edgeOne, OpSign, key, alg, "WWW.example.com") != Allowed || p.take(edgeOne, OpSign, key, alg, "WWW.example.com") != Allowed {
			t.Fatal("refused")
		}
	})
	if n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

func BenchmarkQuota(b *testing.B) {
	key := testRegistry(b, false).BySKI(skiOf(b, "p256"))
	p := policyOn(b, Options{}, limited(func(r *ClientRule) { r.Rate, r.Daily = "1000000/s", 1<<40 }))
	b.ReportAllocs()
	for b.Loop() {
		p.take(edgeOne, OpSign, key, Algorithm{ECDSA, crypto.SHA256}, "www.example.com")
	}
}
