package update

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A window is hours of the day, in minutes since midnight. Its end may be before its start: then it goes over midnight.
// The zero value is the whole day.
type window struct{ from, to int }

var hours = regexp.MustCompile(`^([01][0-9]|2[0-3]):([0-5][0-9])-([01][0-9]|2[0-3]):([0-5][0-9])$`)

func parseWindow(s string) (window, error) {
	if s == "" {
		return window{}, nil
	}
	m := hours.FindStringSubmatch(s)
	if m == nil {
		return window{}, fmt.Errorf("update: schedule %q is no time of the day; write from and to, such as 03:00-05:00", s)
	}
	minute := func(i int) int {
		h, _ := strconv.Atoi(m[i]) // two digits each
		n, _ := strconv.Atoi(m[i+1])
		return h*60 + n
	}
	return window{minute(1), minute(3)}, nil
}

func (w window) always() bool { return w.from == w.to }

// left returns how much of the window is left at t, 0 outside of it. It counts what a clock on the wall shows.
func (w window) left(t time.Time) time.Duration {
	if w.always() {
		return 24 * time.Hour
	}
	now := time.Duration(t.Hour())*time.Hour + time.Duration(t.Minute())*time.Minute + time.Duration(t.Second())*time.Second
	from, to := time.Duration(w.from)*time.Minute, time.Duration(w.to)*time.Minute
	switch {
	case from < to && now >= from && now < to:
		return to - now
	case from > to && now >= from:
		return 24*time.Hour - now + to
	case from > to && now < to:
		return to - now
	}
	return 0
}

// plausible reports whether the clock can be right: after the system that runs was built, and not decades later. A Pi has
// no clock of its own and wakes up in 1970, or when it was switched off.
func plausible(now, built time.Time) bool {
	return now.After(built) && now.Before(built.AddDate(30, 0, 0))
}

// Staged reports whether a device belongs to the first percent of all devices, in an order that salt decides.
func Staged(salt, device string, percent int) bool {
	h := sha256.Sum256([]byte(salt + "\x00" + device))
	return int(binary.BigEndian.Uint64(h[:8])%100) < percent
}

// chance returns a time between 0 and d.
func chance(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return rand.N(d)
}

// backoff is how long to wait after failures in a row.
func backoff(first time.Duration, failures int, most time.Duration) time.Duration {
	d := first
	for range max(failures-1, 0) {
		if d *= 2; d >= most {
			return most
		}
	}
	return min(d, most)
}

// A Gate says what a new version has to show to be kept: For with the tunnel up in a row, Within the time since its start.
type Gate struct{ For, Within time.Duration }

// complete fills in what is zero: from kh.health=FOR or kh.health=FOR/WITHIN, in seconds, on the kernel command line, or
// 60 s and 10 min.
func (g Gate) complete(args string, log *slog.Logger) Gate {
	byDefault := Gate{time.Minute, 10 * time.Minute}
	for _, f := range strings.Fields(args) {
		v, ok := strings.CutPrefix(f, "kh.health=")
		if !ok {
			continue
		}
		a, b, two := strings.Cut(v, "/")
		if !two {
			b = "600"
		}
		n, err1 := strconv.ParseUint(a, 10, 20)
		m, err2 := strconv.ParseUint(b, 10, 20)
		if err1 != nil || err2 != nil || n == 0 || m < n {
			log.Warn("kh.health on the kernel command line is not of the form 60 or 60/600 and has no effect", "value", v)
			continue
		}
		byDefault = Gate{time.Duration(n) * time.Second, time.Duration(m) * time.Second}
	}
	if g.For <= 0 {
		g.For = byDefault.For
	}
	if g.Within <= 0 {
		g.Within = byDefault.Within
	}
	g.Within = max(g.Within, g.For)
	return g
}
