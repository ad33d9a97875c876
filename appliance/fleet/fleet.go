// Package fleet is what an edge and a device say to one another about updates: the edge's [Directive], and the device's
// [Report]. Both cross the tunnel, and the connector's control socket, as JSON of at most [MaxSize] bytes.
//
// A directive says whether a device may update, and to which version. It carries no code and no address to fetch code from:
// what a device installs is decided by the keys in its image and by its own update source.
package fleet

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxSize bounds an encoded Directive or Report, in bytes.
const MaxSize = 4 << 10

// Policies of a [Directive].
const (
	// Free leaves the device to its own schedule: no rollout is about it.
	Free = "free"
	// Hold keeps the device at what it runs: a rollout is about it, and its turn has not come or the rollout is paused.
	Hold = "hold"
	// Update asks the device to install Directive.Version, if its update source has it and its keys accept it.
	Update = "update"
)

// A Directive is what the edge wants of a device. The zero value says that no edge has said anything yet.
type Directive struct {
	Policy  string `json:"policy"`            // Free, Hold or Update
	Version string `json:"version,omitempty"` // with Update, and only then
	Channel string `json:"channel,omitempty"` // of the update source, with Update; empty: the device's own
	Rollout string `json:"rollout,omitempty"` // the rollout that decided, for people
}

// States of a [Report].
const (
	Idle        = "idle"
	Checking    = "checking"
	Downloading = "downloading"
	Writing     = "writing"
	Trial       = "trial"       // the new version runs and has yet to prove itself
	Confirmed   = "confirmed"   // the new version was kept
	RolledBack  = "rolled_back" // the new version was given up; the old one runs
	Failed      = "failed"      // the update ended before the new version was started
)

// States returns all states, in the order in which an update passes them.
func States() []string {
	return []string{Idle, Checking, Downloading, Writing, Trial, Confirmed, RolledBack, Failed}
}

// A Report is how a device is. The zero value says that there is no device: a connector without an agent beside it.
type Report struct {
	Product  string    `json:"product"`
	Arch     string    `json:"arch,omitempty"`
	Board    string    `json:"board,omitempty"`
	Version  string    `json:"version"` // that runs
	Previous string    `json:"previous,omitempty"`
	State    string    `json:"state"`            // one of States
	Target   string    `json:"target,omitempty"` // the version that State is about
	Error    string    `json:"error,omitempty"`  // of the last update that failed, for people
	Trial    bool      `json:"trial,omitempty"`
	Checked  time.Time `json:"checked,omitzero"` // when the update source last answered
	Since    time.Time `json:"since,omitzero"`   // when State began
	Camera   string    `json:"camera,omitempty"` // how the camera is, for people
}

// Broken reports whether the device gave up an update to Target.
func (r Report) Broken() bool { return r.State == Failed || r.State == RolledBack }

// Updating reports whether an update to Target is under way.
func (r Report) Updating() bool {
	switch r.State {
	case Checking, Downloading, Writing, Trial:
		return true
	}
	return false
}

// Bounds on texts, in bytes.
const (
	maxWord = 64
	maxText = 512
)

// Encode returns d as it crosses the wire, or says what is wrong with it.
func (d Directive) Encode() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	return json.Marshal(d)
}

// Encode returns r as it crosses the wire, or says what is wrong with it. Texts for people are made fit: cut to 512 bytes,
// with what a terminal would act upon taken out.
func (r Report) Encode() ([]byte, error) {
	r.Board, r.Error, r.Camera = plain(r.Board), plain(r.Error), plain(r.Camera)
	if err := r.check(); err != nil {
		return nil, err
	}
	return json.Marshal(r)
}

// ParseDirective reads a directive. Unknown, repeated or differently spelt names are errors, as is whatever Encode would
// refuse.
func ParseDirective(b []byte) (Directive, error) {
	var d Directive
	err := parse(b, &d)
	if err == nil {
		err = d.check()
	}
	if err != nil {
		return Directive{}, err
	}
	return d, nil
}

// ParseReport is ParseDirective for reports.
func ParseReport(b []byte) (Report, error) {
	var r Report
	err := parse(b, &r)
	if err == nil {
		err = r.check()
	}
	if err != nil {
		return Report{}, err
	}
	return r, nil
}

func (d Directive) check() error {
	switch d.Policy {
	case Update:
		if d.Version == "" {
			return errors.New("fleet: a directive to update names no version")
		}
	case Free, Hold:
		if d.Version != "" || d.Channel != "" {
			return fmt.Errorf("fleet: a directive to %s names a version or a channel", d.Policy)
		}
	case "":
		if d != (Directive{}) {
			return errors.New("fleet: a directive has no policy")
		}
	default:
		return errors.New("fleet: a directive has an unknown policy; use free, hold or update")
	}
	return words("directive", d.Version, d.Channel, d.Rollout)
}

func (r Report) check() error {
	if r.Product == "" || r.Version == "" || r.State == "" {
		return errors.New("fleet: a report needs product, version and state")
	}
	if err := words("report", r.Product, r.Arch, r.Version, r.Previous, r.State, r.Target); err != nil {
		return err
	}
	for _, s := range [...]string{r.Board, r.Error, r.Camera} {
		if s != plain(s) {
			return fmt.Errorf("fleet: a text of a report is longer than %d bytes or not plain", maxText)
		}
	}
	for _, t := range [...]time.Time{r.Checked, r.Since} {
		if y := t.Year(); y < 1 || y > 9999 {
			return errors.New("fleet: a time of a report is out of range")
		}
	}
	return nil
}

// words checks what programs compare: versions, channels, states and names.
func words(what string, list ...string) error {
	for _, s := range list {
		if len(s) > maxWord || strings.ContainsFunc(s, notInWord) {
			return fmt.Errorf("fleet: a word of a %s is longer than %d bytes or has other characters than A-Z a-z 0-9 . _ ~ + -", what, maxWord)
		}
	}
	return nil
}

// Word reports whether s may be the version or channel of a Directive.
func Word(s string) bool { return s != "" && words("", s) == nil }

func notInWord(r rune) bool {
	return (r < 'A' || r > 'Z') && (r < 'a' || r > 'z') && (r < '0' || r > '9') && !strings.ContainsRune("._~+-", r)
}

// plain makes a text fit for a terminal and a record.
func plain(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x200e && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
	if len(s) <= maxText {
		return s
	}
	s = s[:maxText]
	for !utf8.ValidString(s) { // a rune was cut
		s = s[:len(s)-1]
	}
	return s
}
