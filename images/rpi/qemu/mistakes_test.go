//go:build image

package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"
)

// A person makes a mistake on the card. The status file on it and the screen say what to do; the person does it with a
// card reader, and the same card works.
func TestMistakes(t *testing.T) {
	h := newHost(t)
	expired := func(t *testing.T) string {
		_, token := h.token(t, "--ttl", "1s")
		time.Sleep(time.Second)
		return "token: " + token + "\nhostname: petcam\n"
	}
	text := func(s string) func(*testing.T) string { return func(*testing.T) string { return s } }
	for _, c := range []struct {
		name  string
		wrong func(*testing.T) string // the file that is on the card
		says  []string                // what the status file says, among others
	}{
		{"broken YAML", text("hostname: petcam\ncamera: {hostname: [cam\n"), []string{"keyhaven.yaml:2", "not valid YAML"}},
		{"unknown key", text("hostname: petcam\ntokn: khj1_x\n"), []string{"keyhaven.yaml:2", "tokn: unknown key; did you mean token?"}},
		{"wrong Wi-Fi country", text("hostname: petcam\nwifi: {country: XX, ssid: Home, password: secret-of-the-wifi}\n"), []string{"XX", "no country code"}},
		{"expired token", expired, []string{"TOKEN WAS REFUSED", "expired"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := open(t, image(t))
			put := func(text string) {
				must(t, Edit(disk, 1, func(f *FAT) error { return f.Write("keyhaven.yaml", []byte(text)) }))
			}
			put(c.wrong(t))
			r := h.switchOn(t, Machine{Disk: disk}, "secret-of-the-wifi")
			awaitStatus(t, r, 4*time.Minute, c.says...)
			screenshot(t, r, "mistake-"+strings.ReplaceAll(strings.ToLower(c.name), " ", "-"))
			status, err := r.ReadFile(1, statusFile)
			must(t, err)
			t.Logf("the status file:\n%s", status)
			if strings.Contains(string(status), "secret-of-the-wifi") {
				t.Error("the status file shows the password of the Wi-Fi")
			}
			must(t, r.PowerCut())

			_, token := h.token(t)
			put("token: " + token + "\r\nhostname: petcam\r\n") // as an editor of Windows writes it
			r = h.switchOn(t, Machine{Disk: disk}, token)
			eventually(t, r, 5*time.Minute, "the tunnel after the mistake was mended", h.tunnelUp)
			must(t, r.PowerCut())
			eventuallyDown(t, h)
		})
	}
}

// screenshot keeps a picture of the screen for the documentation, if the board has a screen and -pictures is given.
func screenshot(t *testing.T, r *Run, name string) {
	t.Helper()
	if *picturesFlag == "" || r.m.Board.Screen == nil {
		return
	}
	file, err := filepath.Abs(filepath.Join(*picturesFlag, name+".png"))
	must(t, err)
	time.Sleep(25 * time.Second) // for the screen, which is drawn after the file is written and its driver is there
	must(t, r.Screenshot(file))
}

// keep writes a file for the documentation if -pictures is given.
func keep(t *testing.T, name string, b []byte) {
	t.Helper()
	if *picturesFlag != "" {
		must(t, os.WriteFile(filepath.Join(*picturesFlag, name), b, 0o644))
	}
}

// eventuallyDown waits until the edge has noticed that the machine is gone, so that the next test does not take its
// tunnel for its own.
func eventuallyDown(t *testing.T, h *host) {
	t.Helper()
	ctx, cancel := deadline(t, 2*time.Minute)
	defer cancel()
	for h.tunnelUp(ctx) == nil {
		if ctx.Err() != nil {
			t.Fatal("the edge still believes in a machine that is off")
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// A Pi has no clock of its own. One that says 1970 is moved to when the image was built, here a month ago, at which no
// certificate of the edge is valid yet: the card says so, and once a time server can be reached the machine goes on by itself.
func TestClockIn1970(t *testing.T) {
	h := newHost(t)
	file, token := h.token(t)
	disk := h.personalise(t, cutYAML, file)
	built := time.Now().UTC().AddDate(0, -1, 0).Truncate(24 * time.Hour).Add(8 * time.Hour)
	must(t, Edit(disk, 2, func(f *FAT) error { return setBuilt(f, shortDir(t), built) }))
	r := h.switchOn(t, Machine{Disk: disk, Clock: time.Unix(0, 0)}, token)
	awaitStatus(t, r, 4*time.Minute, "The clock says "+built.Format("2 January 2006"), "cannot be right", "time server")
	screenshot(t, r, "mistake-clock")
	timeServer(t, h.ns)
	eventually(t, r, 5*time.Minute, "the tunnel, after a time server came up", h.tunnelUp)
	awaitStatus(t, r, 2*time.Minute, "CONNECTED")
}

// A data partition that holds nothing of ours, or is full of zeros, is made anew; the status says so, and with a token
// the machine enrols again.
func TestBrokenDataPartition(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, token := h.token(t)
	disk := h.personalise(t, cutYAML, file)
	p, err := disk.Partition(4)
	must(t, err)
	junk := make([]byte, 1<<20)
	for i := range junk {
		junk[i] = byte(i * 7)
	}
	_, err = disk.WriteAt(junk, p.Off)
	must(t, err)
	r := h.switchOn(t, Machine{Disk: disk}, token)
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
	awaitStatus(t, r, time.Minute, "data partition")
}

// A data partition without room for one more byte: a machine that has enrolled goes on, and says what is wrong.
func TestFullDataPartition(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, _ := h.token(t)
	disk := h.personalise(t, cutYAML, file)
	r := h.switchOn(t, Machine{Disk: disk})
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
	time.Sleep(10 * time.Second)
	must(t, r.PowerCut())
	eventuallyDown(t, h)

	fill(t, disk)
	r = h.switchOn(t, Machine{Disk: disk})
	eventually(t, r, 5*time.Minute, "the tunnel with a full data partition", h.tunnelUp)
	awaitStatus(t, r, 2*time.Minute, "full")
}

// fill writes a file into the data partition that leaves no room.
func fill(t *testing.T, d *Disk) {
	t.Helper()
	dir := shortDir(t)
	fs, junk := filepath.Join(dir, "p4"), filepath.Join(dir, "junk")
	_, err := Extract(d, 4, fs)
	must(t, err)
	exec.Command("e2fsck", "-fy", fs).Run() // ends with 1 after it has replayed the journal
	f, err := os.Create(junk)
	must(t, err)
	p, err := d.Partition(4)
	must(t, err)
	_, err = io.CopyN(f, rand.New(rand.NewSource(1)), p.Size)
	must(t, errors.Join(err, f.Close()))
	out, err := exec.Command("debugfs", "-w", "-R", "write "+junk+" junk", fs).CombinedOutput()
	t.Logf("debugfs: %v: %s", err, out)
	must(t, (&FAT{fs}).Store(d, 4))
}

// Updates that must not be taken: each leaves the machine in its version, with its tunnel up, and the status says why.
func TestRefusedUpdates(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	dir := shortDir(t)
	source(t, h.ns, dir)
	stable := filepath.Join(dir, "stable")
	foreign := foreignKey(t)
	for _, c := range []struct {
		name, key string
		info      func(*slotInfo)
		says      string
	}{
		{"foreign key", foreign, is(newVersion), "not signed by a key of this device"},
		{"another architecture", updateKey(), func(i *slotInfo) { i.Version, i.Arch = newVersion, "armel" }, "another architecture"},
		{"older", updateKey(), is("0.0.1"), "the update source has 0.0.1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			must(t, os.RemoveAll(stable))
			h.publish(t, c.key, h.release(t, stable, c.key, c.info, nil))
			file, _ := h.token(t)
			disk := h.personalise(t, cutYAML+sourceYAML, file) // a new one, as failures make the next look at the source wait
			old, err := readSlotInfo(disk, 2)
			must(t, err)
			r := h.switchOn(t, Machine{Disk: disk})
			eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
			awaitStatus(t, r, 5*time.Minute, "CONNECTED", old.Version, c.says)
			if n := len(r.History()); n != 1 {
				t.Errorf("it has booted %d times, want once", n)
			}
			if err := errors.Join(kept(r, old.Version), h.tunnelUp(t.Context())); err != nil {
				t.Error(err)
			}
			must(t, r.PowerCut())
			eventuallyDown(t, h)
		})
	}
}

// foreignKey makes a secret key whose public half no image has.
func foreignKey(t *testing.T) string {
	t.Helper()
	_, key, err := minisign.GenerateKey(nil)
	must(t, err)
	text, err := key.MarshalText()
	must(t, err)
	file := filepath.Join(shortDir(t), "foreign.key")
	must(t, os.WriteFile(file, text, 0o600))
	return file
}

// badGate is the quickGate for versions that are not to be kept.
const badGate = "kh.health=10/90"

// New versions that do not work: the machine is back in the old one by itself, its tunnel up, and says so. One that may have
// failed for another reason is tried a second time, some minutes later, and then no more.
func TestBadSlots(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*FAT) error
		says   string // what the card says of the first trial
		again  bool   // wait for the second
	}{
		{"the kernel panics", cmdline("init=/nothing rdinit=/nothing"), "did not come up far enough to begin its trial", true},
		{"the root file system is not there", func(f *FAT) error { return f.Remove("root.squashfs") }, "did not come up far enough to begin its trial", false},
		{"the appliance program never starts", cmdline("systemd.unit=sysinit.target"), "did not come up far enough to begin its trial", false},
		// A variable that stands for no key is refused.
		{"the connector never starts", cmdline("systemd.setenv=KEYHAVEN_CONNECTOR_NONSENSE=1"), "the tunnel was not up for 10s within 1m30s", false},
		{"the edge cannot be reached", cmdline("module_blacklist=virtio_net,usbnet"), "the tunnel was not up for 10s within 1m30s", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			timeServer(t, h.ns)
			file, _ := h.token(t)
			dir := shortDir(t)
			source(t, h.ns, dir)
			h.publish(t, updateKey(), h.release(t, filepath.Join(dir, "stable"), updateKey(), is(newVersion), c.change))
			disk := h.personalise(t, cutYAML+sourceYAML, file)
			old, err := readSlotInfo(disk, 2)
			must(t, err)
			r := h.switchOn(t, Machine{Disk: disk, Append: badGate})
			h.wayBack(t, r, c.name, 1)
			awaitStatus(t, r, 2*time.Minute, "CONNECTED", old.Version, newVersion, c.says, "it is tried once more")
			h.awaitFleet(t, r, "rolled_back")
			screenshot(t, r, "rolled-back")
			if c.again {
				time.Sleep(time.Minute) // it does not try the same again at once
				if err := trials(r, 2); err == nil {
					t.Error("the version that failed was tried again at once")
				}
				h.wayBack(t, r, c.name, 2)
				awaitStatus(t, r, 2*time.Minute, "CONNECTED", old.Version, newVersion, "it is not tried again until there is a newer one")
				h.awaitFleet(t, r, "rolled_back")
			}
			if err := kept(r, old.Version); err != nil {
				t.Error(err)
			}
		})
	}
}

// wayBack waits for a trial, the n-th of this machine, and then until the machine is back in its old version with its tunnel up.
func (h *host) wayBack(t *testing.T, r *Run, name string, n int) {
	t.Helper()
	eventually(t, r, 15*time.Minute, fmt.Sprintf("trial %d", n), func(context.Context) error { return trials(r, n) })
	start := time.Now()
	eventually(t, r, 10*time.Minute, "the way back", func(context.Context) error {
		if b := r.History(); b[len(b)-1].Trial {
			return errors.New("it is still on trial")
		}
		return nil
	})
	figure(t, "way back: "+name, time.Since(start).Seconds(), "s")
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
}

// awaitFleet waits until the edge's list of devices has a word.
func (h *host) awaitFleet(t *testing.T, r *Run, word string) {
	t.Helper()
	eventually(t, r, 2*time.Minute, "the fleet", func(ctx context.Context) error {
		out, err := h.Edge(ctx, "fleet", "list")
		if err == nil && !strings.Contains(out, word) {
			err = fmt.Errorf("fleet list does not say %s:\n%s", word, out)
		}
		return err
	})
}

// trials reports whether there were so many trial boots.
func trials(r *Run, want int) error {
	n := 0
	for _, b := range r.History() {
		if b.Trial {
			n++
		}
	}
	if n < want {
		return fmt.Errorf("%d trials of %d", n, want)
	}
	return nil
}

// cmdline adds words to a slot's kernel command line.
func cmdline(words string) func(*FAT) error {
	return func(f *FAT) error {
		b, err := f.Read("cmdline.txt")
		if err != nil {
			return err
		}
		return f.Write("cmdline.txt", []byte(strings.TrimSpace(string(b))+" "+words+"\n"))
	}
}
