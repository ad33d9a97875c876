package slot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/diskfs/go-diskfs/backend/file"
	diskfs "github.com/diskfs/go-diskfs/filesystem/fat16"
)

var quiet = slog.New(slog.DiscardHandler)

// system is the image of a slot with a version.
func system(t testing.TB, version string) []byte {
	t.Helper()
	text := fmt.Sprintf(`{"version":%q,"arch":"arm64","boards":["linux,dummy-virt"],"built":"2026-01-02T03:04:05Z","format":1}`, version)
	kernel := bytes.Repeat([]byte("kernel of "+version+" "), 3<<10)[:30<<10]
	return mkfat(t, slotSize, map[string][]byte{"slot.json": []byte(text), "kernel8.img": kernel})
}

func TestState(t *testing.T) {
	for _, c := range []struct {
		name         string
		current, def int
		text         string // in place of autoboot.txt
		want         State
	}{
		{"A runs", PartA, PartA, "", State{Current: PartA, Default: PartA, Idle: PartB}},
		{"B runs", PartB, PartB, "", State{Current: PartB, Default: PartB, Idle: PartA}},
		{"B on trial", PartB, PartA, "", State{Current: PartB, Default: PartA, Trial: true}},
		{"autoboot.txt with CRLF", PartA, PartA, "[all]\r\n", State{Current: PartA}},
		{"autoboot.txt empty", PartA, PartA, " ", State{Current: PartA}},
		{"one slot twice", PartA, PartA, strings.Replace(string(autobootText(PartA)), "3", "2", 1), State{Current: PartA}},
	} {
		t.Run(c.name, func(t *testing.T) {
			k := newCard(t, system(t, "1.0.0"), system(t, "2.0.0"), c.current, c.def)
			if c.text != "" {
				if err := (fatFiles{k.layout(1)}).Create(autobootFile, []byte(c.text)); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := k.slots().State(); err != nil || got != c.want {
				t.Errorf("got %+v, %v, want %+v", got, err, c.want)
			}
		})
	}
}

func TestAutobootText(t *testing.T) {
	want := "[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"
	if got := string(autobootText(PartA)); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if a, b := autobootText(PartA), autobootText(PartB); len(a) != len(b) || len(a) > sector {
		t.Errorf("the texts have %d and %d bytes", len(a), len(b))
	}
}

func TestUpdateCycle(t *testing.T) {
	old, next := system(t, "1.0.0"), system(t, "2.0.0")
	c := newCard(t, old, nil, PartA, PartA)
	s := c.slots()
	if _, err := s.Info(PartB); !errors.Is(err, ErrEmpty) {
		t.Errorf("an empty slot: got %v", err)
	}
	if _, err := s.Rollback(); !errors.Is(err, ErrEmpty) {
		t.Errorf("rollback to an empty slot: got %v", err)
	}
	if err := s.RebootTrial(); !errors.Is(err, ErrEmpty) || len(c.restarts) > 0 {
		t.Errorf("trial of an empty slot: got %v, restarts %q", err, c.restarts)
	}
	if err := s.Commit(); !errors.Is(err, ErrNoTrial) {
		t.Errorf("commit without trial: got %v", err)
	}
	last := int64(0)
	if err := s.WriteIdle(t.Context(), bytes.NewReader(next), int64(len(next)), func(n int64) { last = n }); err != nil || last != slotSize {
		t.Fatalf("got %v after %d bytes", err, last)
	}
	if !bytes.Equal(c.slotBytes(PartB), next) || !bytes.Equal(c.slotBytes(PartA), old) {
		t.Error("the slots do not hold what they should")
	}
	if info, err := s.Info(PartB); err != nil || info.Version != "2.0.0" || info.Arch != "arm64" {
		t.Errorf("got %+v, %v", info, err)
	}
	if err := s.RebootTrial(); err != nil || len(c.restarts) != 1 || c.restarts[0] != "0 tryboot" {
		t.Fatalf("got %v, restarts %q", err, c.restarts)
	}

	c.current = c.firmware(t, true)
	if c.current != PartB || c.firmware(t, false) != PartA {
		t.Fatalf("the trial starts partition %d, anything else %d", c.current, c.firmware(t, false))
	}
	s = c.slots()
	for what, err := range map[string]error{
		"write": s.WriteIdle(t.Context(), bytes.NewReader(old), int64(len(old)), nil), "restart": s.RebootTrial(),
	} {
		if !errors.Is(err, ErrTrial) {
			t.Errorf("%s during a trial: got %v", what, err)
		}
	}
	if err := s.Commit(); err != nil || c.firmware(t, false) != PartB {
		t.Fatalf("got %v, the firmware starts %d", err, c.firmware(t, false))
	}
	if info, err := s.Rollback(); err != nil || info.Version != "1.0.0" || c.firmware(t, false) != PartA {
		t.Errorf("rollback: got %+v, %v, the firmware starts %d", info, err, c.firmware(t, false))
	}
}

func TestRepair(t *testing.T) {
	c := newCard(t, system(t, "1.0.0"), system(t, "2.0.0"), PartB, PartB)
	if err := (fatFiles{c.layout(1)}).Create(autobootFile, []byte("boot_partition=1")); err != nil {
		t.Fatal(err)
	}
	s := c.slots()
	if err := s.WriteIdle(t.Context(), strings.NewReader(""), slotSize, nil); !errors.Is(err, ErrAutoboot) {
		t.Errorf("writing with a damaged autoboot.txt: got %v", err)
	}
	if err := s.Commit(); !errors.Is(err, ErrAutoboot) {
		t.Errorf("keeping with a damaged autoboot.txt: got %v", err)
	}
	if did, err := s.Repair(PartB); err != nil || !did || c.firmware(t, false) != PartB {
		t.Errorf("got %v, %v, the firmware starts %d", did, err, c.firmware(t, false))
	}
	if did, err := s.Repair(PartA); err != nil || did || c.firmware(t, false) != PartB {
		t.Errorf("a second time: got %v, %v", did, err)
	}
	for _, other := range []string{"whole", "empty"} {
		want := PartA
		if other == "empty" {
			clear(c.slotBytes(PartA))
			want = PartB
		}
		if err := (fatFiles{c.layout(1)}).Create(autobootFile, []byte("boot_partition=1")); err != nil {
			t.Fatal(err)
		}
		if did, err := s.Repair(PartA); err != nil || !did || c.firmware(t, false) != want {
			t.Errorf("the other slot is %s: got %v, %v, the firmware starts %d", other, did, err, c.firmware(t, false))
		}
	}
}

// Whatever fails, the error says what, the other slot is as it was, and this one is not taken for whole.
func TestWriteIdleFails(t *testing.T) {
	old, next := system(t, "1.0.0"), system(t, "2.0.0")
	lost := errors.New("bundle: its end is wrong")
	for name, f := range map[string]struct {
		fault *fault
		r     io.Reader
		size  int64
		want  error
		text  string
	}{
		"write error":        {&fault{write: syscall.EIO}, bytes.NewReader(next), slotSize, ErrCard, "another card"},
		"card full":          {&fault{write: syscall.ENOSPC}, bytes.NewReader(next), slotSize, syscall.ENOSPC, "another card"},
		"sync error":         {&fault{sync: syscall.EIO}, bytes.NewReader(next), slotSize, ErrCard, "input/output error"},
		"read error":         {&fault{read: syscall.EIO}, bytes.NewReader(next), slotSize, ErrCard, "another card"},
		"cache stays":        {&fault{drop: syscall.EIO}, bytes.NewReader(next), slotSize, ErrCard, "another card"},
		"a bit flips":        {&fault{flip: 20<<10 + 17}, bytes.NewReader(next), slotSize, ErrCard, "something else than was written"},
		"a bit flips first":  {&fault{flip: 17}, bytes.NewReader(next), slotSize, ErrCard, "something else than was written"},
		"source ends":        {nil, bytes.NewReader(next[:30<<10]), slotSize, nil, "ends after 30720 of 40960"},
		"source goes on":     {nil, io.MultiReader(bytes.NewReader(next), strings.NewReader("x")), slotSize, nil, "more than 40960"},
		"source's last word": {nil, io.MultiReader(bytes.NewReader(next), iotest.ErrReader(lost)), slotSize, lost, ""},
		"too large":          {nil, bytes.NewReader(next), slotSize + sector, nil, "does not go into a slot"},
		"half a sector":      {nil, bytes.NewReader(next), slotSize - 1, nil, "does not go into a slot"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCard(t, old, nil, PartA, PartA)
			c.fault = f.fault
			err := c.slots().WriteIdle(t.Context(), f.r, f.size, nil)
			if err == nil || f.want != nil && !errors.Is(err, f.want) || !strings.Contains(err.Error(), f.text) {
				t.Errorf("got %v, want %v with %q", err, f.want, f.text)
			}
			c.fault = nil
			if _, err := c.slots().Info(PartB); !errors.Is(err, ErrEmpty) {
				t.Errorf("the slot was taken for whole: %v", err)
			}
			if !bytes.Equal(c.slotBytes(PartA), old) || c.firmware(t, false) != PartA {
				t.Error("the slot that runs was touched")
			}
		})
	}
}

func TestForeignDisk(t *testing.T) {
	c := newCard(t, system(t, "1.0.0"), system(t, "2.0.0"), PartA, PartA)
	c.medium[440] ^= 1
	before := bytes.Clone(c.medium)
	err := c.slots().WriteIdle(t.Context(), bytes.NewReader(system(t, "3.0.0")), slotSize, nil)
	if !errors.Is(err, ErrNoAppliance) || !bytes.Equal(before, c.medium) {
		t.Errorf("got %v; was it written to? %v", err, !bytes.Equal(before, c.medium))
	}
}

// Windows puts a signature of its own on a card when it sees two with the same. Such a card starts, and is updated as well.
func TestSignatureOfAnotherSystem(t *testing.T) {
	c := newCard(t, system(t, "1.0.0"), system(t, "2.0.0"), PartA, PartA)
	c.medium[440] ^= 1
	copy(c.medium[c.layout(partConfig).start+labelAt:], label)
	next := system(t, "3.0.0")
	if err := c.slots().WriteIdle(t.Context(), bytes.NewReader(next), slotSize, nil); err != nil || !bytes.Equal(c.slotBytes(PartB), next) {
		t.Errorf("got %v", err)
	}
}

// What an independent writer of FAT16 made is read.
func TestReadInfoOfAnotherWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "slot.img")
	b, err := file.CreateFromPath(path, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := diskfs.Create(b, 8<<20, 0, 512, "SLOT", true)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"a long name before it.txt": "x",
		"slot.json":                 `{"version":"1.2.3","arch":"armhf","boards":["pc"],"format":1}` + strings.Repeat(" ", 5000),
		"config.txt":                "arm_64bit=1\n",
	} {
		f, err := fs.OpenFile("/"+name, os.O_CREATE|os.O_RDWR)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(f, text); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if i, err := ReadInfo(f); err != nil || i.Version != "1.2.3" || i.Arch != "armhf" {
		t.Errorf("got %+v, %v", i, err)
	}
	if got, err := readFAT(f, "CONFIG.TXT", 100); err != nil || string(got) != "arm_64bit=1\n" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := readFAT(f, "config.txt", 5); err == nil {
		t.Error("a file was read that is larger than asked for")
	}
}

// Whatever a write that was cut off left, reading it ends and takes no more than it should.
func FuzzReadInfo(f *testing.F) {
	f.Add(system(f, "1.0.0"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if i, err := ReadInfo(bytes.NewReader(b)); err == nil && (i.Version == "" || i.Arch == "") {
			t.Errorf("got %+v", i)
		}
	})
}
