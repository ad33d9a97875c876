package appliance

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// ledNames are the activity LEDs of Raspberry Pis under old and new kernels.
var ledNames = []string{"ACT", "led0", "green:act", "act"}

// Lengths of light and dark.
const (
	short = 200 * time.Millisecond
	long  = 1500 * time.Millisecond
)

// flashes is a pattern of n short flashes and a pause.
func flashes(n int) []time.Duration {
	var p []time.Duration
	for range n {
		p = append(p, short, short)
	}
	p[len(p)-1] = long
	return p
}

// patterns are times of light and dark, in turn, which repeat. docs/appliance.md has them in a table.
var patterns = map[State][]time.Duration{
	StateStarting:  {long / 3, long / 3},
	StateJoining:   {long / 3, long / 3},
	StateNoNetwork: flashes(2),
	StateMistake:   flashes(3),
	StateRefused:   flashes(4),
	StateNoToken:   flashes(4),
	StateNoEdge:    flashes(5),
	StateHealthy:   {20 * long, short / 2},
	StateUpdating:  {short / 4, short / 4},
}

// A led shows states. Without one in the machine it shows nothing.
type led struct {
	file   string
	states chan State
}

// findLED looks for the LED and takes it from the kernel, which lets it show the card's activity.
func findLED(h *Host) *led {
	l := &led{states: make(chan State, 1)}
	dir := h.path("/sys/class/leds")
	for _, name := range ledNames {
		if writeDevice(filepath.Join(dir, name, "trigger"), []byte("none")) == nil {
			l.file = filepath.Join(dir, name, "brightness")
			return l
		}
	}
	return l
}

// show changes the pattern. It does not wait, and is for one caller.
func (l *led) show(s State) {
	select {
	case <-l.states: // what was not shown yet
	default:
	}
	l.states <- s
}

// run blinks until ctx ends.
func (l *led) run(ctx context.Context) {
	if l.file == "" {
		<-ctx.Done()
		return
	}
	pattern, at := patterns[StateStarting], 0
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			l.set(false)
			return
		case s := <-l.states:
			if next := patterns[s]; !slices.Equal(next, pattern) {
				pattern, at = next, 0
				timer.Reset(0)
			}
		case <-timer.C:
			l.set(at%2 == 0)
			timer.Reset(pattern[at])
			at = (at + 1) % len(pattern)
		}
	}
}

func (l *led) set(on bool) {
	b := []byte("0")
	if on {
		b = []byte("1")
	}
	_ = os.WriteFile(l.file, b, 0o644) // an LED that cannot be set shows it
}
