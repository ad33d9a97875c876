// Package slot keeps the two system slots of an appliance's card: which one runs, which one the firmware starts, writing
// the other, and changing over. At every moment, whatever is cut off, the firmware's default names a whole slot.
//
// A slot is a FAT partition with all that a system needs, and is written as one image. The file autoboot.txt on the
// configuration partition names the default slot, and the one that is started once when the restart asks for a trial.
package slot

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
)

// The partitions of a card. The configuration's holds autoboot.txt.
const (
	partConfig = 1
	PartA      = 2
	PartB      = 3
)

// Signature is the disk signature in the partition table of each card with a Keyhaven image. Some systems put their own in its
// place; then the label of the configuration partition has to do, as it does at the start. Nothing is written to a disk
// without either.
const Signature = 0x4b485631

// label is the configuration partition's, at labelAt in its first sector.
const (
	label   = "KEYHAVEN"
	labelAt = 43
)

// Where things are on an appliance.
const (
	bootFile   = "run/keyhaven/boot.json"
	configDir  = "boot/keyhaven"
	slotFile   = "boot/slot/slot.json"
	boardsFile = "proc/device-tree/compatible"
	modelFile  = "proc/device-tree/model"
)

var (
	// ErrNoAppliance: this machine was not started from a card with a Keyhaven image.
	ErrNoAppliance = errors.New("this is not an appliance of Keyhaven")
	// ErrTrial: a slot is on trial, so no slot is idle.
	ErrTrial = errors.New("a new version is on trial; wait until it is kept or given up")
	// ErrNoTrial: no slot is on trial.
	ErrNoTrial = errors.New("no version is on trial")
	// ErrEmpty: the other slot holds no system.
	ErrEmpty = errors.New("the other slot holds no whole system")
	// ErrAutoboot: autoboot.txt is not as Keyhaven writes it.
	ErrAutoboot = errors.New("autoboot.txt is damaged")
	// ErrCard: the card could not be read or written, or gave back something else than was written.
	ErrCard = errors.New("the card fails")
)

// Info is a slot's slot.json.
type Info struct {
	Version string    `json:"version"`
	Arch    string    `json:"arch"`
	Boards  []string  `json:"boards"`
	Built   time.Time `json:"built"`
	Format  int       `json:"format"`
}

// A State says which slot has which part. Partitions are PartA and PartB.
type State struct {
	Current int  // runs
	Default int  // the firmware starts it; 0: autoboot.txt is damaged, see Repair
	Idle    int  // may be written; 0 while a trial runs or Default is unknown
	Trial   bool // Current is not Default
}

// Other returns the slot that part is not.
func Other(part int) int { return PartA + PartB - part }

// Config says where the slots are. The zero value is this machine.
type Config struct {
	Root string       // directory in place of /, for tests: nothing is mounted there, and no restart is done
	Log  *slog.Logger // nil: nothing is logged
}

// Slots are the slots of one card. Its methods may be called at any time, but those that write by one caller at a time.
type Slots struct {
	root string
	boot boot
	m    machine
	log  *slog.Logger

	chunk, unsynced int64 // of WriteIdle
}

// boot is boot.json, which the initial system writes.
type boot struct {
	Disk   string `json:"disk"`
	Part   int    `json:"part"`
	Config string `json:"config"`
	Data   string `json:"data"`
}

// machine is what a test replaces.
type machine interface {
	// open opens a partition, or with 0 the whole disk. A partition that is in use cannot be opened to write.
	open(part int, write bool) (device, error)
	// config calls do with the configuration partition's directory, which can be written during the call.
	config(do func(files) error) error
	// readConfig reads a file of the configuration partition.
	readConfig(name string) ([]byte, error)
	// restart restarts the machine at once. With arg it is the command for the firmware.
	restart(arg string) error
}

// device is a partition.
type device interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Sync() error // what was written is on the card
	Drop() error // what is read next comes from the card
}

// Open reads how this machine was started.
func Open(c Config) (*Slots, error) {
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Root == "" {
		c.Root = "/"
	}
	b, err := readSmall(filepath.Join(c.Root, bootFile))
	if err != nil {
		return nil, fmt.Errorf("%w: %w; start this machine from a card with the image", ErrNoAppliance, err)
	}
	s := &Slots{root: c.Root, log: c.Log, chunk: defaultChunk, unsynced: defaultUnsynced}
	if err := json.Unmarshal(b, &s.boot); err != nil {
		return nil, fmt.Errorf("%w: /%s: %w; restart the machine", ErrNoAppliance, bootFile, err)
	}
	if s.boot.Part != PartA && s.boot.Part != PartB || !filepath.IsAbs(s.boot.Disk) {
		return nil, fmt.Errorf("%w: /%s says partition %d of disk %q; restart the machine", ErrNoAppliance, bootFile, s.boot.Part, s.boot.Disk)
	}
	s.m = newMachine(c.Root, s.boot)
	return s, nil
}

// readSmall reads a file of the system's that is known to be small.
func readSmall(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 64<<10))
}

// State reads which slot has which part. An error is one of the card; a damaged autoboot.txt is none.
func (s *Slots) State() (State, error) {
	st := State{Current: s.boot.Part}
	b, err := s.m.readConfig(autobootFile)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return st, fmt.Errorf("%w: read autoboot.txt: %w", ErrCard, err)
	}
	if st.Default, err = parseAutoboot(b); err != nil {
		return st, nil
	}
	st.Trial = st.Current != st.Default
	if !st.Trial {
		st.Idle = Other(st.Current)
	}
	return st, nil
}

// Info reads the slot.json of a slot: PartA or PartB.
func (s *Slots) Info(part int) (Info, error) {
	if part == s.boot.Part {
		b, err := readSmall(filepath.Join(s.root, slotFile))
		if err != nil {
			return Info{}, fmt.Errorf("%w: %w", ErrCard, err)
		}
		return parseInfo(b)
	}
	dev, err := s.m.open(part, false)
	if err != nil {
		return Info{}, fmt.Errorf("%w: %w", ErrCard, err)
	}
	defer dev.Close()
	return ReadInfo(dev)
}

// ReadInfo reads slot.json out of the image of a slot.
func ReadInfo(r io.ReaderAt) (Info, error) {
	b, err := readFAT(r, "slot.json", 64<<10)
	if err != nil {
		return Info{}, fmt.Errorf("%w: %w", ErrEmpty, err)
	}
	return parseInfo(b)
}

func parseInfo(b []byte) (Info, error) {
	var i Info
	if err := json.Unmarshal(b, &i); err != nil {
		return i, fmt.Errorf("%w: slot.json: %w", ErrEmpty, err)
	}
	if _, err := bundle.ParseVersion(i.Version); err != nil || i.Arch == "" || i.Format != 1 {
		return i, fmt.Errorf("%w: slot.json has version %q, architecture %q, format %d", ErrEmpty, i.Version, i.Arch, i.Format)
	}
	return i, nil
}

// Size returns the size of the slot that does not run, in bytes.
func (s *Slots) Size() (int64, error) {
	dev, err := s.m.open(Other(s.boot.Part), false)
	if err != nil {
		return 0, fmt.Errorf("%w: %w", ErrCard, err)
	}
	defer dev.Close()
	return dev.Size()
}

// Boards returns the names that this machine answers to: those of its device tree, the most exact first, or [bundle.PC]
// where there is none.
func (s *Slots) Boards() []string {
	b, _ := readSmall(filepath.Join(s.root, boardsFile))
	names := strings.FieldsFunc(string(b), func(r rune) bool { return r == 0 })
	if len(names) == 0 {
		return []string{bundle.PC}
	}
	return names
}

// Model returns the machine's name for people, "" if it has none.
func (s *Slots) Model() string {
	b, _ := readSmall(filepath.Join(s.root, modelFile))
	return strings.TrimRight(string(b), "\x00\n")
}

// Commit makes the slot on trial the default. It changes nothing unless one is on trial.
func (s *Slots) Commit() error {
	st, err := s.State()
	switch {
	case err != nil:
		return err
	case st.Default == 0:
		return fmt.Errorf("%w; nothing was kept", ErrAutoboot)
	case !st.Trial:
		return ErrNoTrial
	}
	return s.setDefault(st.Current)
}

// Rollback makes the other slot the default, if it holds a system of this architecture, and returns what it holds. The
// change shows with the next restart. While a trial runs the other slot is the default already.
func (s *Slots) Rollback() (Info, error) {
	st, err := s.State()
	if err != nil {
		return Info{}, err
	}
	info, err := s.Info(Other(st.Current))
	if err != nil {
		return Info{}, err
	}
	if own, err := s.Info(st.Current); err == nil && own.Arch != info.Arch {
		return Info{}, fmt.Errorf("%w: it is for %s, this machine runs %s", ErrEmpty, info.Arch, own.Arch)
	}
	if st.Default == Other(st.Current) {
		return info, nil
	}
	return info, s.setDefault(Other(st.Current))
}

// Repair makes part the default if autoboot.txt is damaged, and says whether it had to. A slot that does not run has to hold a
// system; otherwise the one that runs becomes the default.
func (s *Slots) Repair(part int) (bool, error) {
	st, err := s.State()
	if err != nil || st.Default != 0 {
		return false, err
	}
	if part != st.Current {
		if _, err := s.Info(part); err != nil {
			part = st.Current
		}
	}
	s.log.Warn("autoboot.txt is damaged and is written anew", "default", part)
	return true, s.setDefault(part)
}

// RebootTrial restarts the machine into the idle slot, once: whatever restarts it after that starts the default. It
// returns only if it fails, or in tests.
func (s *Slots) RebootTrial() error {
	st, err := s.State()
	switch {
	case err != nil:
		return err
	case st.Idle == 0:
		return ErrTrial
	}
	if _, err := s.Info(st.Idle); err != nil {
		return err
	}
	s.log.Info("restart into the trial slot", "partition", st.Idle)
	return s.m.restart("0 tryboot")
}

// Reboot restarts the machine into the default slot. It returns only if it fails, or in tests.
func (s *Slots) Reboot() error {
	s.log.Info("restart into the default slot")
	return s.m.restart("")
}

// checkDisk makes sure that the disk is one of ours.
func (s *Slots) checkDisk() error {
	mbr, err := s.firstSector(0)
	if err != nil {
		return err
	}
	got := binary.LittleEndian.Uint32(mbr[440:])
	if got == Signature && mbr[510] == 0x55 && mbr[511] == 0xaa {
		return nil
	}
	head, err := s.firstSector(partConfig)
	if err != nil {
		return err
	}
	if mbr[510] != 0x55 || mbr[511] != 0xaa || string(head[labelAt:labelAt+len(label)]) != label {
		return fmt.Errorf("%w: disk %s has signature %#x, not %#x, and no partition %s; nothing was written", ErrNoAppliance, s.boot.Disk, got, uint32(Signature), label)
	}
	return nil
}

// firstSector reads the beginning of a partition, or with 0 of the disk.
func (s *Slots) firstSector(part int) (b [sector]byte, err error) {
	dev, err := s.m.open(part, false)
	if err != nil {
		return b, fmt.Errorf("%w: %w", ErrCard, err)
	}
	defer dev.Close()
	if _, err := dev.ReadAt(b[:], 0); err != nil {
		return b, fmt.Errorf("%w: read the beginning of partition %d: %w", ErrCard, part, err)
	}
	return b, nil
}
