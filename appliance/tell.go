package appliance

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// StatusPath is where a running appliance keeps its [Status] in JSON.
const StatusPath = runDir + "/" + statusFile

const (
	statusFile = "status.json"         // in runDir, for appliance status
	statusName = "keyhaven-status.txt" // on the card

	cardEvery   = 3 * time.Minute  // the file on the card is written once in this time at most,
	cardSoon    = 10 * time.Second // but a few times sooner for another state: after a start much happens
	cardQuick   = 5
	cardFirst   = time.Minute      // and not before there is something to say, or so long after the start
	cardSettled = 20 * time.Second // a state that may pass by itself is told on the card when it has lasted for so long
	screenEvery = time.Minute      // the screen is drawn again, in case something wrote on it
)

// shown is what was told, and where.
type shown struct {
	status   Status
	json     []byte
	screen   []byte
	screenAt time.Time
	stateAt  time.Time // when status.State became what it is, by a clock that is not set
	card     string    // fingerprint of what is on the card
	cardAt   time.Time
	cardWas  State
	quick    int // times that it was written sooner
	cardErr  string
}

func sorted(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }

// tell says how the appliance is, wherever it changed.
func (r *runner) tell() {
	st := r.status()
	st.Since = r.shown.status.Since
	if st.State != r.shown.status.State || st.Since.IsZero() {
		st.Since = r.Host.Now().UTC().Truncate(time.Second)
		r.shown.stateAt = time.Now()
		r.log.Info("state", "state", string(st.State), "found", st.Text)
	}
	r.shown.status = st
	r.led.show(st.State)
	if b, err := json.MarshalIndent(st, "", "  "); err == nil && !bytes.Equal(b, r.shown.json) {
		r.report("the status for programs", writeFile(r.Host.path(runDir, statusFile), b, 0o644))
		r.shown.json = b
	}
	if s := st.screen(); !bytes.Equal(s, r.shown.screen) || time.Since(r.shown.screenAt) > screenEvery {
		_ = writeDevice(r.Host.path(screenPath), s) // there may be no screen
		r.shown.screen, r.shown.screenAt = s, time.Now()
	}
	r.tellCard(st)
}

// tellCard writes the file on the card, if it says something else than before and the card had its rest.
func (r *runner) tellCard(st Status) {
	now := time.Now()
	settled := st.State != StateStarting && (st.State != StateJoining || st.Todo != "")
	if passing := st.State == StateNoEdge || st.State == StateNoNetwork; passing && now.Sub(r.shown.stateAt) < cardSettled {
		settled = false
	}
	since, another := now.Sub(r.shown.cardAt), st.State != r.shown.cardWas && r.shown.quick < cardQuick
	switch {
	case r.shown.cardAt.IsZero():
		if !settled && now.Sub(r.begin) < cardFirst {
			return
		}
	case since < cardSoon, since < cardEvery && !(settled && another):
		return
	}
	path := filepath.Join(cardDir, statusName)
	if r.shown.card == "" {
		if old, err := readSmall(r.Host.path(path)); err == nil {
			r.shown.card = fingerprintOf(old)
		}
	}
	text := st.file(r.Host.Now().In(r.location()))
	if fingerprintOf(text) == r.shown.card {
		return
	}
	if since < cardEvery {
		r.shown.quick++
	}
	r.shown.cardAt, r.shown.cardWas = now, st.State
	err := r.Host.Writable(func(dir string) error { return writeCard(filepath.Join(dir, statusName), text) })
	if err != nil {
		if msg := oneLine(unwrapPath(err).Error()); msg != r.shown.cardErr {
			r.shown.cardErr = msg
			r.log.Error("the status cannot be written to the card", "err", err)
		}
		return
	}
	r.shown.card, r.shown.cardErr = fingerprintOf(text), ""
}

func (r *runner) location() *time.Location {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.zone
}

// writeCard writes a file of the card by a temporary one, whose name a FAT file system of old can hold too.
func writeCard(path string, b []byte) error {
	temp := filepath.Join(filepath.Dir(path), "KEYHAVEN.TMP")
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	for _, e := range []error{f.Sync(), f.Close()} {
		if err == nil {
			err = e
		}
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp) // the first error counts
		return err
	}
	return syncDir(filepath.Dir(path))
}

// progress is what comes and goes in the text about updates.
var progress = regexp.MustCompile(` \(\d+ %\)|, looks for a newer one`)

// fingerprintOf is what counts of the file on the card: not when it was written, and not what changes all the time.
func fingerprintOf(b []byte) string {
	var keep []string
	for _, l := range strings.Split(string(b), "\n") {
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "Written by") {
			continue
		}
		if strings.HasPrefix(l, "Camera:") {
			l, _, _ = strings.Cut(l, ",")
			l, _, _ = strings.Cut(l, "(")
		}
		if strings.HasPrefix(l, "Update:") { // how far a download is, but not what became of it
			l = progress.ReplaceAllString(l, "")
		}
		keep = append(keep, l)
	}
	return strings.Join(keep, "\n")
}

// status puts together how the appliance is.
func (r *runner) status() Status {
	info := r.Host.slotInfo()
	st := Status{Hostname: r.hostname(), Addresses: r.Host.Addresses(), Mistakes: r.mistakes, Notes: slices.Clone(r.notes), Camera: r.camera,
		Version: orElse(info.Version, r.Version), Slot: r.Host.slotName(), SSH: len(r.config.SSH.Keys) > 0}
	if r.connector != nil {
		st.Identity = r.connector.Identity
	}
	for _, rule := range r.config.rules() {
		if rule.Hostname != "" {
			st.Published = append(st.Published, rule.Hostname)
		}
	}
	if r.shown.cardErr != "" {
		st.Notes = append(st.Notes, "The card cannot be written ("+r.shown.cardErr+"), so keyhaven-status.txt may be old. Look at its lock switch, or use another card.")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.updater != nil {
		st.Update = r.updater.Text()
	} else {
		st.Update = r.updateErr
	}
	r.decide(&st)
	return st
}

// slotName is A or B.
func (h *Host) slotName() string {
	var boot struct {
		Part int `json:"part"`
	}
	b, err := readSmall(h.path(runDir, "boot.json"))
	if err != nil || json.Unmarshal(b, &boot) != nil {
		return ""
	}
	return map[int]string{2: "A", 3: "B"}[boot.Part]
}

// decide sets the state and what a person should know about it. What a person can put right comes first.
func (r *runner) decide(st *Status) {
	r.connectionLocked(st)
	last := r.enrol.last()
	if last.State == enrolRefused && r.enrol.hasIdentity() {
		st.Notes = append(st.Notes, "The last join token was refused: "+last.Reason+" The device goes on with the identity that it has.")
	}
	if u := r.updater; u != nil && len(st.Mistakes) == 0 {
		if s := u.Report().State; s == fleet.Downloading || s == fleet.Writing {
			st.State, st.Text, st.Todo = StateUpdating, "A new version is being fetched. "+st.Text, ""
		}
	}
	if len(st.Mistakes) > 0 {
		switch {
		case st.State == StateHealthy:
			st.Notes = append(st.Notes, "The device is connected all the same.")
		case st.Todo != "" && st.State != StateNoToken: // the token may be in the file that is wrong
			st.Notes = append(st.Notes, st.Text+" "+st.Todo)
		}
		st.State, st.Text = StateMistake, ""
		st.Todo = "Put the card into a computer, correct the file, and start the device again. keyhaven-connector appliance check FILE looks at it beforehand."
	}
}

// connectionLocked is decide for all between the cable and the edge.
func (r *runner) connectionLocked(st *Status) {
	_, pending := r.enrol.pending()
	identity := r.enrol.hasIdentity()
	last := r.enrol.last()
	young := time.Since(r.begin) < networkWithin
	switch {
	case identity && r.health.Tunnel:
		st.State, st.Text = StateHealthy, r.health.Text
	case len(st.Addresses) == 0 && young:
		st.State, st.Text = StateStarting, "Waiting for an address in the network."
	case len(st.Addresses) == 0:
		st.State = StateNoNetwork
		st.Text, st.Todo = r.networkText()
	case pending && r.trouble != nil:
		st.State, st.Text, st.Todo = r.trouble.state, r.trouble.text, r.trouble.todo
	case pending:
		st.State, st.Text = StateJoining, "Using the join token."
	case !identity && last.State == enrolRefused:
		st.State, st.Text, st.Todo = StateRefused, last.Reason, refusedTodo
	case !identity:
		st.State, st.Text = StateNoToken, "The device has no identity and no join token."
		st.Todo = "Make a join token at the edge (keyhaven-edge tunnel token create NAME), write it into keyhaven.yaml on the card as token:, and start the device again."
	case time.Since(r.begin) < connectWithin || time.Since(r.joined) < connectWithin:
		st.State, st.Text = StateStarting, "The connector is starting."
	default:
		st.State, st.Text, st.Todo = StateNoEdge, r.health.Text, connectorTodo(r.connector)
	}
}

// networkText says why there is no address.
func (r *runner) networkText() (text, todo string) {
	cable := "Look whether the cable is plugged in at both ends, and whether the lamps beside it are on."
	if len(r.config.WiFi.Networks) == 0 {
		return "The device has no address in a network.", cable + " For Wi-Fi add wifi: to keyhaven.yaml."
	}
	return strings.TrimSpace("The device has no address in a network. " + r.wifi),
		fmt.Sprintf("Look at the name (%q) and the password under wifi: in keyhaven.yaml, or plug a cable in.", r.config.WiFi.Networks[0].SSID)
}
