package appliance

import (
	"fmt"
	"strings"
	"time"
)

// A State is how an appliance is, in one word.
type State string

// The states, each with a pattern of the LED.
const (
	StateStarting  State = "starting"
	StateNoNetwork State = "no network"
	StateMistake   State = "mistake in the configuration"
	StateJoining   State = "joining"
	StateRefused   State = "token refused"
	StateNoToken   State = "waiting for a token"
	StateNoEdge    State = "no connection to the edge"
	StateHealthy   State = "connected"
	StateUpdating  State = "updating"
)

// A Status is how an appliance is, for people and for programs on it. It has no secrets.
type Status struct {
	State     State     `json:"state"`
	Text      string    `json:"text,omitempty"` // what is, in a sentence or two
	Todo      string    `json:"todo,omitempty"` // what a person can do about it
	Mistakes  []string  `json:"mistakes,omitempty"`
	Notes     []string  `json:"notes,omitempty"`
	Hostname  string    `json:"hostname"`
	Addresses []string  `json:"addresses,omitempty"`
	Identity  string    `json:"identity,omitempty"`
	Camera    string    `json:"camera,omitempty"`
	Published []string  `json:"published,omitempty"`
	Update    string    `json:"update,omitempty"`
	Version   string    `json:"version"`
	Slot      string    `json:"slot,omitempty"` // A or B
	SSH       bool      `json:"ssh"`
	Since     time.Time `json:"since"` // when State became what it is
}

// headline is the state as the first line says it.
var headline = map[State]string{
	StateStarting:  "STARTING",
	StateNoNetwork: "NO NETWORK",
	StateMistake:   "THERE IS A MISTAKE IN KEYHAVEN.YAML",
	StateJoining:   "JOINING",
	StateRefused:   "THE JOIN TOKEN WAS REFUSED",
	StateNoToken:   "WAITING FOR A JOIN TOKEN",
	StateNoEdge:    "NO CONNECTION TO THE EDGE",
	StateHealthy:   "CONNECTED",
	StateUpdating:  "UPDATING, PLEASE LEAVE THE POWER ON",
}

// Lines are what a person reads, on the screen and in the file, wrapped to width.
func (s *Status) Lines(width int) []string {
	var out []string
	add := func(text string) { out = append(out, wrap(plain(text), width)...) }
	add(headline[s.State])
	out = append(out, "")
	if s.Text != "" {
		add(s.Text)
	}
	if s.Todo != "" {
		add("What to do: " + s.Todo)
	}
	for _, m := range s.Mistakes {
		add("* " + m)
	}
	for _, n := range s.Notes {
		add("Note: " + n)
	}
	if out[len(out)-1] != "" {
		out = append(out, "")
	}
	row := func(name, value string) {
		if value == "" {
			return
		}
		for _, l := range wrap(plain(value), width-12) {
			out = append(out, fmt.Sprintf("%-11s %s", name, l))
			name = ""
		}
	}
	row("Name:", s.Hostname)
	row("Addresses:", strings.Join(s.Addresses, ", "))
	row("Connector:", s.Identity)
	row("Camera:", s.Camera)
	row("Publishes:", strings.Join(s.Published, ", "))
	row("Update:", s.Update)
	row("SSH:", map[bool]string{true: "ssh root@" + first(s.Addresses, s.Hostname), false: "off (no key is given)"}[s.SSH])
	row("Version:", strings.TrimSpace(s.Version+" "+slotText(s.Slot)))
	return out
}

func slotText(s string) string {
	if s == "" {
		return ""
	}
	return "(slot " + s + ")"
}

func first(list []string, def string) string {
	if len(list) > 0 {
		return list[0]
	}
	return def
}

// plain takes out what a terminal would act upon.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// wrap breaks a text into lines of width letters at most where it has spaces.
func wrap(text string, width int) (lines []string) {
	for _, para := range strings.Split(text, "\n") {
		line, n := "", 0
		for _, word := range strings.Fields(para) {
			w := len([]rune(word))
			switch {
			case n == 0:
				line, n = word, w
			case n+1+w > width:
				lines = append(lines, line)
				line, n = "  "+word, w+2
			default:
				line, n = line+" "+word, n+1+w
			}
		}
		lines = append(lines, line)
	}
	return lines
}

// file is keyhaven-status.txt: the lines, with line ends that every editor takes, and when it was written.
func (s *Status) file(now time.Time) []byte {
	var b strings.Builder
	b.WriteString("Keyhaven\r\n\r\n")
	for _, l := range s.Lines(100) {
		b.WriteString(l + "\r\n")
	}
	fmt.Fprintf(&b, "\r\nWritten by the device at %s.\r\n", now.Format("2006-01-02 15:04 MST"))
	return []byte(b.String())
}

// screen is what the console shows: it clears itself, hides the cursor, and has no more rows than the smallest screen.
func (s *Status) screen() []byte {
	const rows, width = 28, 78
	lines := s.Lines(width)
	if len(lines) > rows {
		lines = append(lines[:rows-1], "… see keyhaven-status.txt on the card for all of it")
	}
	var b strings.Builder
	b.WriteString("\x1b[0m\x1b[H\x1b[2J\x1b[?25l\x1b[1m  Keyhaven\x1b[0m\r\n\r\n")
	for i, l := range lines {
		if i == 0 {
			l = "\x1b[1m" + l + "\x1b[0m"
		}
		b.WriteString("  " + l + "\r\n")
	}
	return []byte(b.String())
}
