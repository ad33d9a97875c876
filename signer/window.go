package signer

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Window is a part of the week. The zero value never opens. Windows are immutable.
type Window struct {
	days       uint8 // bit n: time.Weekday(n), the day on which the window begins
	begin, end int   // minutes of the day; end <= begin means an end on the next day
	zone       *time.Location
}

var dayNames = [...]string{"Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"}

// everyDay is the set of a window that names no days.
const everyDay = 1<<7 - 1

// maxWindow is the length of the longest text that can be a window.
const maxWindow = 128

// ParseWindow reads a window: days, times, time zone, such as "Mon-Fri 06:00-22:00 Europe/Zurich".
//
//   - Days are names and ranges with commas between, "Mon,Wed-Fri"; a range may pass the end of the week, "Sat-Mon". Without days it is every day.
//   - The time is HH:MM-HH:MM; the first minute is in, the last is out, and 24:00 is the end of the day. An end before the begin lies on the next day, so "Fri
//     22:00-06:00" ends on Saturday morning.
//   - The zone is a name of the time zone data base. Without one it is UTC, never the machine's.
//
// What counts is what a clock on the wall of that zone shows: when it is put forward, an hour of the window is missing; when it is put
// back, an hour comes twice.
func ParseWindow(s string) (Window, error) {
	if len(s) > maxWindow {
		return Window{}, fmt.Errorf("time window of %d characters; write one such as %q", len(s), exampleWindow)
	}
	w := Window{days: everyDay, zone: time.UTC}
	fields := strings.Split(s, " ")
	if len(fields) > 0 && fields[0] != "" && !isDigit(fields[0][0]) {
		days, err := parseDays(fields[0])
		if err != nil {
			return Window{}, err
		}
		w.days, fields = days, fields[1:]
	}
	if len(fields) == 0 || len(fields) > 2 || fields[0] == "" {
		return Window{}, fmt.Errorf("%q is no time window; write days, times and time zone with one space between, such as %q", s, exampleWindow)
	}
	var err error
	if w.begin, w.end, err = parseTimes(fields[0]); err != nil {
		return Window{}, err
	}
	if len(fields) == 2 {
		if w.zone, err = parseZone(fields[1]); err != nil {
			return Window{}, err
		}
	}
	return w, nil
}

const exampleWindow = "Mon-Fri 06:00-22:00 Europe/Zurich"

func isDigit(b byte) bool { return '0' <= b && b <= '9' }

func parseDays(s string) (days uint8, err error) {
	for part := range strings.SplitSeq(s, ",") {
		first, last, ranged := strings.Cut(part, "-")
		from, to := slices.Index(dayNames[:], first), slices.Index(dayNames[:], last)
		if !ranged {
			to = from
		}
		if from < 0 || to < 0 {
			return 0, fmt.Errorf("%q names no days; write Mon, Tue, Wed, Thu, Fri, Sat or Sun, ranges such as Mon-Fri, with commas between", part)
		}
		for d := from; ; d = (d + 1) % 7 {
			if days&(1<<d) != 0 {
				return 0, fmt.Errorf("%q names %s twice; name it once", s, dayNames[d])
			}
			days |= 1 << d
			if d == to {
				break
			}
		}
	}
	return days, nil
}

func parseTimes(s string) (begin, end int, err error) {
	first, last, ok := strings.Cut(s, "-")
	begin, ok1 := parseMinute(first)
	end, ok2 := parseMinute(last)
	switch {
	case !ok || !ok1 || !ok2:
		return 0, 0, fmt.Errorf("%q is no time of day; write two times of 24 hours, such as 06:00-22:00", s)
	case begin == minutesOfDay:
		return 0, 0, fmt.Errorf("%q begins at the end of the day; write 00:00 and the day after", s)
	case begin == end:
		return 0, 0, fmt.Errorf("%q ends where it begins and never opens; write 00:00-24:00 for the whole day", s)
	}
	return begin, end, nil
}

const minutesOfDay = 24 * 60

// parseMinute reads HH:MM, 24:00 included.
func parseMinute(s string) (int, bool) {
	if len(s) != 5 || s[2] != ':' || !isDigit(s[0]) || !isDigit(s[1]) || !isDigit(s[3]) || !isDigit(s[4]) {
		return 0, false
	}
	hour, minute := int(s[0]-'0')*10+int(s[1]-'0'), int(s[3]-'0')*10+int(s[4]-'0')
	m := hour*60 + minute
	return m, minute < 60 && m <= minutesOfDay
}

func parseZone(s string) (*time.Location, error) {
	bad := func(b rune) bool {
		return !('a' <= b && b <= 'z' || 'A' <= b && b <= 'Z' || '0' <= b && b <= '9' || strings.ContainsRune("_+-/", b))
	}
	if s == "" || s == "Local" || strings.ContainsFunc(s, bad) {
		return nil, fmt.Errorf("%q is no time zone; write a name of the time zone data base, such as Europe/Zurich, or UTC", s)
	}
	zone, err := time.LoadLocation(s)
	if err != nil {
		return nil, fmt.Errorf("time zone %q is not known; write a name of the time zone data base, such as Europe/Zurich, or UTC", s)
	}
	return zone, nil
}

// Open reports whether the window is open at t. It does not allocate.
func (w Window) Open(t time.Time) bool {
	if w.zone == nil {
		return false
	}
	t = t.In(w.zone)
	hour, minute, _ := t.Clock()
	now, today := hour*60+minute, t.Weekday()
	if w.begin < w.end {
		return w.on(today) && w.begin <= now && now < w.end
	}
	return w.on(today) && w.begin <= now || w.on((today+6)%7) && now < w.end
}

func (w Window) on(d time.Weekday) bool { return w.days&(1<<d) != 0 }

// String returns a text that [ParseWindow] reads as the same window.
func (w Window) String() string {
	if w.zone == nil {
		return "never"
	}
	var names []string
	for i := range 7 {
		if d := (i + 1) % 7; w.days&(1<<d) != 0 { // Monday first
			names = append(names, dayNames[d])
		}
	}
	return fmt.Sprintf("%s %02d:%02d-%02d:%02d %s", strings.Join(names, ","), w.begin/60, w.begin%60, w.end/60, w.end%60, w.zone)
}
