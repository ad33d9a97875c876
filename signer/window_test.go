package signer

import (
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // so that the tests need no machine's
)

func mustWindow(t testing.TB, s string) Window {
	t.Helper()
	w, err := ParseWindow(s)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWindowOpen(t *testing.T) {
	tests := []struct {
		window, at string // RFC 3339
		want       bool
	}{
		// 2026-11-23 is a Monday; Zurich is an hour ahead of UTC in winter.
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-11-23T05:00:00Z", true},
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-11-23T04:59:59Z", false},
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-11-23T20:59:59Z", true},
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-11-23T21:00:00Z", false},
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-11-28T12:00:00Z", false},
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-07-01T04:00:00Z", true}, // two hours ahead in summer
		{"Mon-Fri 06:00-22:00 Europe/Zurich", "2026-07-01T03:59:59Z", false},
		{"Sat,Sun 00:00-24:00 UTC", "2026-11-28T00:00:00Z", true},
		{"Sat,Sun 00:00-24:00 UTC", "2026-11-29T23:59:59Z", true},
		{"Sat,Sun 00:00-24:00 UTC", "2026-11-30T00:00:00Z", false},
		{"Sat-Mon 10:00-11:00", "2026-11-29T10:30:00Z", true}, // past the end of the week
		{"Sat-Mon 10:00-11:00", "2026-11-24T10:30:00Z", false},
		{"22:00-06:00", "2026-11-23T21:59:00Z", false},
		{"22:00-06:00", "2026-11-23T22:00:00Z", true},
		{"22:00-06:00", "2026-11-23T05:59:59Z", true},
		{"22:00-06:00", "2026-11-23T06:00:00Z", false},
		{"Fri 22:00-06:00", "2026-11-27T23:00:00Z", true},
		{"Fri 22:00-06:00", "2026-11-28T05:00:00Z", true}, // the Saturday after
		{"Fri 22:00-06:00", "2026-11-27T05:00:00Z", false},
		{"Sat 22:00-06:00", "2026-11-29T05:00:00Z", true},
		{"Fri 22:00-00:00", "2026-11-27T23:59:59Z", true},
		{"Fri 22:00-00:00", "2026-11-28T00:00:00Z", false},
		// Zurich goes from 02:00 to 03:00 on 2026-03-29, and from 03:00 back to 02:00 on 2026-10-25.
		{"Sun 02:00-03:00 Europe/Zurich", "2026-03-29T00:59:59Z", false},
		{"Sun 02:00-03:00 Europe/Zurich", "2026-03-29T01:00:00Z", false}, // 03:00: the window's hour is missing
		{"Sun 01:00-04:00 Europe/Zurich", "2026-03-29T01:59:59Z", true},
		{"Sun 01:00-04:00 Europe/Zurich", "2026-03-29T02:00:00Z", false},
		{"Sun 02:00-03:00 Europe/Zurich", "2026-10-25T00:00:00Z", true}, // 02:00 for the first time
		{"Sun 02:00-03:00 Europe/Zurich", "2026-10-25T01:59:59Z", true}, // 02:59:59 for the second time
		{"Sun 02:00-03:00 Europe/Zurich", "2026-10-25T02:00:00Z", false},
		{"Sat 22:00-06:00 Europe/Zurich", "2026-10-25T04:59:59Z", true},
		{"Sat 22:00-06:00 Europe/Zurich", "2026-10-25T05:00:00Z", false},
		{"09:00-17:00 Asia/Kolkata", "2026-11-23T03:30:00Z", true},
		{"09:00-17:00 Asia/Kolkata", "2026-11-23T03:29:00Z", false},
	}
	for _, tt := range tests {
		at, err := time.Parse(time.RFC3339, tt.at)
		if err != nil {
			t.Fatal(err)
		}
		w := mustWindow(t, tt.window)
		// The zone of the time that is asked about must not matter.
		for _, zone := range []*time.Location{time.UTC, time.FixedZone("", -11*3600), time.FixedZone("", 14*3600)} {
			if got := w.Open(at.In(zone)); got != tt.want {
				t.Errorf("%s at %s: got %v, want %v", tt.window, at.In(zone), got, tt.want)
			}
		}
	}
	if (Window{}).Open(time.Now()) {
		t.Error("the zero window is open")
	}
}

// TestWindowWeek counts the open minutes of a week without a change of the clock.
func TestWindowWeek(t *testing.T) {
	for window, want := range map[string]int{
		"00:00-24:00":                       7 * 24 * 60,
		"Mon-Fri 06:00-22:00 Europe/Zurich": 5 * 16 * 60,
		"22:00-06:00 America/New_York":      7 * 8 * 60,
		"Sat 23:59-00:01":                   2,
		"Mon-Sun 00:00-00:01":               7,
		"Tue,Thu-Fri,Sun 12:00-13:00":       4 * 60,
	} {
		w, n := mustWindow(t, window), 0
		for at := range 7 * 24 * 60 {
			if w.Open(time.Date(2026, 6, 1, 0, at, 30, 0, time.UTC)) {
				n++
			}
		}
		if n != want {
			t.Errorf("%s: open for %d minutes of a week, want %d", window, n, want)
		}
	}
}

func TestWindowErrors(t *testing.T) {
	for window, part := range map[string]string{
		"":                         "no time",
		"Mon":                      "no time window",
		"Mon-Fri":                  "no time window",
		"06:00":                    "no time of day",
		"6:00-22:00":               "no time of day",
		"06:00-22:60":              "no time of day",
		"06:00-24:01":              "no time of day",
		"06:00–22:00":              "no time of day",
		"24:00-06:00":              "begins at the end",
		"06:00-06:00":              "never opens",
		"mon 06:00-22:00":          "names no days",
		"Monday 06:00-22:00":       "names no days",
		"Mon-Fri, 06:00-22:00":     "names no days",
		"Mon,Mon 06:00-22:00":      "twice",
		"Mon-Wed,Tue 06:00-22:00":  "twice",
		"Mon-Fri  06:00-22:00":     "one space",
		" Mon 06:00-22:00":         "one space",
		"Mon 06:00-22:00 UTC x":    "one space",
		"06:00-22:00 Local":        "no time zone",
		"06:00-22:00 ":             "no time zone",
		"06:00-22:00 ../UTC":       "no time zone",
		"06:00-22:00 Zurich":       "not known",
		"06:00-22:00 europe/zuri":  "not known",
		strings.Repeat("Mon,", 64): "256 characters",
	} {
		if w, err := ParseWindow(window); err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%q: got %v and error %v, want one with %q", window, w, err, part)
		}
	}
}

func TestWindowDoesNotAllocate(t *testing.T) {
	w, at := mustWindow(t, "Mon-Fri 06:00-22:00 Europe/Zurich"), time.Now()
	if n := testing.AllocsPerRun(100, func() { w.Open(at) }); n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

// FuzzWindow is an operator who mistypes: what is accepted must be what its canonical text says.
func FuzzWindow(f *testing.F) {
	for _, s := range []string{"Mon-Fri 06:00-22:00 Europe/Zurich", "Sat,Sun 00:00-24:00 UTC", "22:00-06:00", "Sat-Mon 01:00-02:00", "-", ",", " "} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		w, err := ParseWindow(s)
		if err != nil {
			return
		}
		again, err := ParseWindow(w.String())
		if err != nil || again.String() != w.String() || again.days != w.days || again.begin != w.begin || again.end != w.end {
			t.Errorf("%q is %s, and that is %s, %v", s, w, again, err)
		}
		open := false
		for h := range 7 * 24 * 60 {
			open = open || w.Open(time.Date(2026, 6, 1, 0, h, 0, 0, time.UTC))
		}
		if !open {
			t.Errorf("%q never opens", s)
		}
	})
}
