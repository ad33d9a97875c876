package appliance

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"regexp"
	"strings"

	"github.com/keyhaven/keyhaven/appliance/slot"
)

// What the agent keeps of the machine over restarts, in systemDir.
const (
	machineIDFile = "machine-id"
	seedFile      = "random-seed"
	clockFile     = "clock" // its modification time is when the machine ran last
	seedSize      = 512
)

// slotInfo is what runs; zero if it cannot be known.
func (h *Host) slotInfo() (s slot.Info) {
	if b, err := readSmall(h.path(slotFile)); err == nil {
		_ = json.Unmarshal(b, &s) // the zero value says it
	}
	return s
}

// advanceClock sets a clock that stands before the image was built, or before the machine ran last, to the later of the two:
// a Raspberry Pi has no battery. It returns whether it did.
func (h *Host) advanceClock() (bool, error) {
	earliest := h.slotInfo().Built
	if info, err := os.Stat(h.path(systemDir, clockFile)); err == nil && info.ModTime().After(earliest) {
		earliest = info.ModTime()
	}
	if earliest.IsZero() || !h.Now().Before(earliest) {
		return false, nil
	}
	return true, h.SetClock(earliest)
}

// saveClock notes the time. It is not worth waiting for the card.
func (h *Host) saveClock() error {
	path := h.path(systemDir, clockFile)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	now := h.Now()
	return os.Chtimes(path, now, now)
}

var machineID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// keepMachineID keeps the id that the machine got at its first start. Later starts are given it before the system runs.
func (h *Host) keepMachineID() error {
	kept := h.path(systemDir, machineIDFile)
	if b, err := readSmall(kept); err == nil && machineID.MatchString(strings.TrimSpace(string(b))) {
		return nil
	}
	b, err := readSmall(h.path("/etc/machine-id"))
	if err != nil {
		return err
	}
	if !machineID.MatchString(strings.TrimSpace(string(b))) {
		return errors.New("/etc/machine-id holds no id")
	}
	return writeFile(kept, b, 0o444)
}

// stirRandomness gives the kernel what was kept of its randomness, and keeps new for the next time: no two starts get the same.
func (h *Host) stirRandomness() error {
	seed, err := readUpTo(h.path(systemDir, seedFile), seedSize)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if len(seed) > 0 {
		if err := writeDevice(h.path("/dev/urandom"), seed); err != nil {
			return err
		}
	}
	next := make([]byte, seedSize)
	if _, err := rand.Read(next); err != nil {
		return err
	}
	return writeFile(h.path(systemDir, seedFile), next, 0o600)
}

// writeDevice writes to something that is there already.
func writeDevice(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Close())
}

// dataTrouble says what is wrong with the data partition, or "".
func (h *Host) dataTrouble() string {
	probe := h.path(systemDir, ".probe")
	err := writeFile(probe, []byte("x"), 0o600)
	if err == nil {
		_, err = remove(probe)
	}
	switch {
	case err == nil:
		return ""
	case isFull(err):
		return "The data partition of the card is full. Take the card out and write the image to it anew, or to a larger one."
	}
	return "The data partition of the card cannot be written (" + unwrapPath(err).Error() + "). The device goes on with what it can, but forgets at the " +
		"next start what it learns now. Write the image to another card: this one is likely worn out."
}

// forgetful reports whether memory stands in for the data partition, as it does where that cannot be used.
func (h *Host) forgetful() bool {
	b, err := readSmall(h.path("/proc/mounts"))
	return err == nil && strings.Contains(string(b), " "+dataDir+" tmpfs ")
}
