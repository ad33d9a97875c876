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

// A Pi has no clock of its own. With one that says 1970 no certificate is valid: the card says so, and once a time server
// can be reached the machine goes on by itself.
func TestClockIn1970(t *testing.T) {
	h := newHost(t)
	file, token := h.token(t)
	disk := h.personalise(t, cutYAML, file)
	r := h.switchOn(t, Machine{Disk: disk, Clock: time.Unix(0, 0)}, token)
	awaitStatus(t, r, 4*time.Minute, "clock")
	screenshot(t, r, "mistake-clock")
	timeServer(t, h.ns)
	eventually(t, r, 5*time.Minute, "the tunnel, after a time server came up", h.tunnelUp)
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
	file, _ := h.token(t)
	dir := shortDir(t)
	source(t, h.ns, dir)
	disk := h.personalise(t, cutYAML+sourceYAML, file)
	old, err := readSlotInfo(disk, 2)
	must(t, err)
	stable := filepath.Join(dir, "stable")
	start := func() *Run {
		r := h.switchOn(t, Machine{Disk: disk})
		eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
		return r
	}
	refused := func(r *Run, words ...string) {
		t.Helper()
		awaitStatus(t, r, 10*time.Minute, words...)
		if v, err := version(r); err != nil || v != old.Version {
			t.Errorf("it runs %s, %v; want %s", v, err, old.Version)
		}
		must(t, r.PowerCut())
		eventuallyDown(t, h)
	}
	foreign := foreignKey(t)
	h.publish(t, foreign, h.release(t, stable, foreign, is(newVersion), nil))
	refused(start(), "not signed by a key of this device")

	must(t, os.RemoveAll(stable))
	h.publish(t, updateKey(), h.release(t, stable, updateKey(), func(i *slotInfo) { i.Version, i.Arch = newVersion, "armel" }, nil))
	refused(start(), "another architecture")

	must(t, os.RemoveAll(stable))
	h.publish(t, updateKey(), h.release(t, stable, updateKey(), is("0.0.1"), nil))
	r := start()
	time.Sleep(2 * time.Minute) // an older one is nothing to report
	refused(r, "CONNECTED", old.Version)
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

// New versions that do not work: the machine is back in the old one by itself, its tunnel up, and says so.
func TestBadSlots(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*FAT) error
		within time.Duration
	}{
		{"the kernel panics", cmdline("init=/nothing rdinit=/nothing"), 5 * time.Minute},
		{"the root file system is not there", func(f *FAT) error { return f.Remove("root.squashfs") }, 5 * time.Minute},
		{"the connector never starts", cmdline("systemd.mask=keyhaven-connector.service"), 20 * time.Minute},
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
			r := h.switchOn(t, Machine{Disk: disk, Append: quickGate})
			eventually(t, r, 15*time.Minute, "the trial", func(context.Context) error { return trials(r, 1) })
			start := time.Now()
			eventually(t, r, c.within, "the way back", func(context.Context) error {
				if b := r.History(); b[len(b)-1].Trial {
					return errors.New("it is still on trial")
				}
				return nil
			})
			figure(t, "way back: "+c.name, time.Since(start).Seconds(), "s")
			eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
			awaitStatus(t, r, 2*time.Minute, old.Version, newVersion)
			eventually(t, r, 2*time.Minute, "the fleet", func(ctx context.Context) error {
				out, err := h.Edge(ctx, "fleet", "list")
				if err == nil && !strings.Contains(out, "rolled_back") {
					err = fmt.Errorf("fleet list does not say rolled_back:\n%s", out)
				}
				return err
			})
			if err := kept(r, old.Version); err != nil {
				t.Error(err)
			}
			screenshot(t, r, "rolled-back")
			time.Sleep(time.Minute) // it does not try the same again at once
			if err := trials(r, 2); err == nil {
				t.Error("the version that failed was tried again")
			}
		})
	}
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
