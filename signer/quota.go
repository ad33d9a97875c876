package signer

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// A Rate is how often something may be done: N times in Per on average, and Burst times at once. The zero value is no rate.
type Rate struct {
	N     int
	Per   time.Duration // a second, a minute or an hour
	Burst int
}

// maxRate bounds both numbers of a rate.
const maxRate = 1_000_000

var rateUnits = map[string]time.Duration{"s": time.Second, "m": time.Minute, "h": time.Hour}

// ParseRate reads a rate: "100/s", "6000/m", "100/s burst 200". Without a burst it is what comes in a second, and at least one.
func ParseRate(s string) (Rate, error) {
	bad := func(what string) (Rate, error) {
		return Rate{}, fmt.Errorf("%.64q is no rate: %s; write one such as 100/s, 6000/m or \"100/s burst 200\"", s, what)
	}
	text, burst, hasBurst := strings.Cut(s, " burst ")
	number, unit, ok := strings.Cut(text, "/")
	if !ok {
		return bad("the unit is missing")
	}
	r := Rate{Per: rateUnits[unit]}
	if r.Per == 0 {
		return bad("the unit is not s, m or h")
	}
	if r.N, ok = parseCount(number); !ok {
		return bad("the number is not one from 1 to 1000000")
	}
	perSecond := int(time.Duration(r.N) * time.Second / r.Per)
	r.Burst = max(perSecond, 1)
	if hasBurst {
		if r.Burst, ok = parseCount(burst); !ok {
			return bad("the burst is not a number from 1 to 1000000")
		}
	}
	return r, nil
}

// parseCount reads a number from 1 to maxRate, in its only spelling.
func parseCount(s string) (int, bool) {
	n, err := strconv.Atoi(s)
	return n, err == nil && n >= 1 && n <= maxRate && strconv.Itoa(n) == s
}

// String returns a text that [ParseRate] reads as the same rate, and "" for the zero value.
func (r Rate) String() string {
	for unit, d := range rateUnits {
		if d == r.Per {
			return fmt.Sprintf("%d/%s burst %d", r.N, unit, r.Burst)
		}
	}
	return ""
}

// Quotas counts what rules with a rate or a daily budget have allowed. A rule's counters outlive the policy: a later policy on the same
// Quotas finds them again for the rule of the same client with the same limit (the n-th such rule, if a client has several). A rule
// whose limit is changed starts anew.
//
// Rates are kept in memory alone. Daily budgets are also written to a file by [Quotas.Run].
//
// The zero value is ready. All methods may be called from several goroutines at once.
type Quotas struct {
	mu      sync.Mutex // guards all below, and what the maps point to
	rates   map[quotaKey]*bucket
	budgets map[quotaKey]*budget
	today   int64 // the day of what was counted last
	changed bool  // budgets differ from what was saved
}

// quotaKey names a counter.
type quotaKey struct {
	client string
	limit  string // what the counter is held against, in one spelling
	nth    int    // among the client's rules with the same limit
}

// A limit holds the counters of one rule; nil ones do not limit. Rules share a limit only by being the same rule.
type limit struct {
	rate  *bucket
	daily *budget
}

func (l limit) set() bool { return l != limit{} }

// A bucket holds what is left of a rate.
type bucket struct {
	rate   Rate
	tokens float64
	at     time.Time // when tokens was right
}

// A budget holds what was used of a day.
type budget struct {
	max  int64
	day  int64 // days since 1970, UTC
	used int64
}

// A limiter gives the rules of one policy their counters.
type limiter struct {
	quotas *Quotas
	seen   map[quotaKey]int
}

func (l *limiter) limit(client string, rate Rate, daily int64) (lim limit) {
	q := l.quotas
	q.mu.Lock()
	defer q.mu.Unlock()
	if rate != (Rate{}) {
		lim.rate = counter(&q.rates, l.key(client, rate.String()))
		if lim.rate.rate == (Rate{}) {
			*lim.rate = bucket{rate: rate, tokens: float64(rate.Burst)}
		}
	}
	if daily > 0 {
		lim.daily = counter(&q.budgets, l.key(client, strconv.FormatInt(daily, 10)+"/day"))
		lim.daily.max = daily
	}
	return lim
}

func (l *limiter) key(client, text string) quotaKey {
	k := quotaKey{client: client, limit: text}
	n := l.seen[k]
	l.seen[k]++
	k.nth = n
	return k
}

// counter returns the counter of that name, which is new if there is none.
func counter[T any](m *map[quotaKey]*T, k quotaKey) *T {
	if *m == nil {
		*m = make(map[quotaKey]*T)
	}
	c := (*m)[k]
	if c == nil {
		c = new(T)
		(*m)[k] = c
	}
	return c
}

// take counts one operation against the limit, or reports why it cannot and counts nothing.
func (q *Quotas) take(l limit, now time.Time) Reason {
	q.mu.Lock()
	defer q.mu.Unlock()
	if reason := l.refuses(now); reason != Allowed {
		return reason
	}
	if l.rate != nil {
		l.rate.tokens--
	}
	if l.daily != nil {
		l.daily.used++
		q.today, q.changed = dayOf(now), true
	}
	return Allowed
}

// peek is take without counting.
func (q *Quotas) peek(l limit, now time.Time) Reason {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l.daily != nil {
		copied := *l.daily
		l.daily = &copied
	}
	if l.rate != nil {
		copied := *l.rate
		l.rate = &copied
	}
	return l.refuses(now)
}

func (l limit) refuses(now time.Time) Reason {
	if l.daily != nil && !l.daily.left(now) {
		return RefusedDaily
	}
	if l.rate != nil && !l.rate.left(now) {
		return RefusedRate
	}
	return Allowed
}

// left fills the bucket up to now and reports whether it holds one. A time before that of the last call fills in nothing, nor does the
// way back from there.
func (b *bucket) left(now time.Time) bool {
	burst := float64(b.rate.Burst)
	if b.at.IsZero() {
		b.at = now
	}
	if d := now.Sub(b.at); d > 0 {
		b.tokens = min(burst, b.tokens+float64(d)*float64(b.rate.N)/float64(b.rate.Per))
		b.at = now
	}
	return b.tokens >= 1
}

// left reports whether something is left of the day of now. When the clock goes back over midnight, the later day goes on; when it
// goes back by more than a day, which was a wrong clock that was put right, its day goes on with what was used.
func (b *budget) left(now time.Time) bool {
	switch today := dayOf(now); {
	case today > b.day:
		b.day, b.used = today, 0
	case today < b.day-1:
		b.day = today
	}
	return b.used < b.max
}

// dayOf returns the number of the day in UTC.
func dayOf(t time.Time) int64 {
	const day = 24 * 60 * 60
	s := t.Unix()
	if s < 0 {
		s -= day - 1
	}
	return s / day
}
