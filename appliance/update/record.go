package update

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
)

const (
	recordFile   = "state.json"
	recordTemp   = "state.json.new"
	recordFormat = 1
	maxRecord    = 64 << 10
	// maxVersions bounds the versions that are known as given up, and those as proven.
	maxVersions = 8
	// maxChannels bounds the channels of which the newest index is known.
	maxChannels = 16
	// maxTrials is how often a version is started that ends its trial without a word, by a cut of power or a crash.
	maxTrials = 2
	// maxGates is how often the program may restart during a trial.
	maxGates = 5
)

// A record is state.json: what the next start has to know.
type record struct {
	Format    int       `json:"format"`
	State     string    `json:"state"`
	Since     time.Time `json:"since"`
	Target    string    `json:"target,omitempty"`   // version that State is about
	Slot      int       `json:"slot,omitempty"`     // that Target is in
	Previous  string    `json:"previous,omitempty"` // version that ran before Target
	Error     string    `json:"error,omitempty"`
	Checked   time.Time `json:"checked,omitzero"`
	Trials    int       `json:"trials,omitempty"`    // of Target, without a result
	Gates     int       `json:"gates,omitempty"`     // starts of the program in this trial
	Returning bool      `json:"returning,omitempty"` // Slot becomes the default because somebody asked for it
	Failures  int       `json:"failures,omitempty"`  // one after the other
	Blocked   []string  `json:"blocked,omitempty"`   // versions that were given up
	Proven    []string  `json:"proven,omitempty"`    // versions that were kept on this card
	Device    string    `json:"device"`              // random name of this card

	Published map[string]time.Time `json:"seen,omitempty"` // when the newest index of each channel was made; never changed, but replaced
}

// states are those that a record may have.
var states = fleet.States()

func newRecord() record {
	return record{Format: recordFormat, State: fleet.Idle, Since: time.Now().UTC().Truncate(time.Second), Device: rand.Text()}
}

// load reads the record. One that cannot be used is begun anew, and says so.
func (e *Engine) load() record {
	r, err := readRecord(e.dir)
	if err == nil {
		return r
	}
	r = newRecord()
	if !errors.Is(err, fs.ErrNotExist) {
		e.c.Log.Warn("the record of updates is damaged and begun anew", "err", err)
		r.Error = "the record of updates was damaged and is begun anew; nothing needs to be done"
	}
	if err := r.save(e.dir); err != nil {
		e.c.Log.Error("cannot write the record of updates", "err", err)
	}
	return r
}

func readRecord(d directory) (record, error) {
	b, err := d.Read(recordFile, maxRecord+1)
	if err != nil {
		return record{}, err
	}
	return parseRecord(b)
}

func parseRecord(b []byte) (record, error) {
	var r record
	dec := json.NewDecoder(bytes.NewReader(b))
	if err := dec.Decode(&r); err != nil {
		return r, fmt.Errorf("%s: %w", recordFile, err)
	}
	if r.Format != recordFormat || !slices.Contains(states, r.State) || len(b) > maxRecord || dec.More() || r.Device == "" ||
		r.Trials < 0 || r.Gates < 0 || r.Failures < 0 || len(r.Blocked) > maxVersions || len(r.Proven) > maxVersions || len(r.Published) > maxChannels {
		return r, fmt.Errorf("%s has format %d and state %q, or values that make no sense", recordFile, r.Format, r.State)
	}
	return r, nil
}

// save puts the record on the disk: whole under another name first, and then in place of the old one.
func (r record) save(d directory) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := d.Create(recordTemp, append(b, '\n')); err != nil {
		return err
	}
	if err := d.Rename(recordTemp, recordFile); err != nil {
		return err
	}
	return d.Sync()
}

// directory is what a record needs of one.
type directory interface {
	Read(name string, most int64) ([]byte, error)
	Create(name string, b []byte) error // and have it on the disk
	Rename(old, new string) error
	Sync() error
}

type osDir string

func (d osDir) Read(name string, most int64) ([]byte, error) {
	f, err := os.Open(filepath.Join(string(d), name))
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	return b, errors.Join(err, f.Close())
}

func (d osDir) Create(name string, b []byte) error {
	f, err := os.OpenFile(filepath.Join(string(d), name), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func (d osDir) Rename(old, name string) error {
	return os.Rename(filepath.Join(string(d), old), filepath.Join(string(d), name))
}

func (d osDir) Sync() error {
	f, err := os.Open(string(d))
	if err != nil {
		return err
	}
	return errors.Join(syncDir(f), f.Close())
}

// saw notes when the newest index of a channel was published.
func (r *record) saw(channel string, published time.Time) {
	seen := maps.Clone(r.Published)
	if seen == nil {
		seen = map[string]time.Time{}
	}
	if _, known := seen[channel]; !known && len(seen) >= maxChannels {
		oldest := slices.MinFunc(slices.Collect(maps.Keys(seen)), func(a, b string) int { return seen[a].Compare(seen[b]) })
		delete(seen, oldest)
	}
	seen[channel] = published
	r.Published = seen
}

// block keeps a version from being tried again.
func (r *record) block(version string) { r.Blocked = with(r.Blocked, version) }

func (r *record) unblock(version string) { r.Blocked = without(r.Blocked, version) }

func (r *record) blocks(version string) bool {
	return slices.ContainsFunc(r.Blocked, func(v string) bool { return bundle.Compare(v, version) == 0 })
}

// with returns list with version as its newest entry.
func with(list []string, version string) []string {
	if version == "" {
		return list
	}
	list = append(without(list, version), version)
	return list[max(len(list)-maxVersions, 0):]
}

func without(list []string, version string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(v string) bool { return bundle.Compare(v, version) == 0 })
}
