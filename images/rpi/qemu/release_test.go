//go:build image

package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

const (
	sourceAddr = "127.0.0.1:8000"
	sourceYAML = "update: {source: \"http://10.0.2.2:8000\", channel: stable, automatic: true}\n"
)

// quickGate lets a version on trial be kept once its tunnel was up for ten seconds, and be given up after three minutes.
const quickGate = "kh.health=10/180"

// Versions that tests make out of the image's own slot.
const (
	newVersion  = "99.1.0"
	nextVersion = "99.2.0"
)

// slotInfo is a slot's slot.json.
type slotInfo struct {
	Version string   `json:"version"`
	Arch    string   `json:"arch"`
	Boards  []string `json:"boards"`
	Built   string   `json:"built"`
	Format  int      `json:"format"`
}

func readSlotInfo(d *Disk, part int) (i slotInfo, err error) {
	b, err := ReadFile(d, part, "slot.json")
	if err == nil {
		err = json.Unmarshal(b, &i)
	}
	return i, err
}

// changeInfo changes a slot's slot.json and returns what it says then.
func changeInfo(f *FAT, change func(*slotInfo)) (i slotInfo, err error) {
	b, err := f.Read("slot.json")
	if err != nil {
		return i, err
	}
	if err := json.Unmarshal(b, &i); err != nil {
		return i, err
	}
	change(&i)
	if b, err = json.Marshal(i); err != nil {
		return i, err
	}
	return i, f.Write("slot.json", b)
}

// version is what runs on the machine.
func version(r *Run) (string, error) {
	boots := r.History()
	if len(boots) == 0 {
		return "", fmt.Errorf("it has not booted")
	}
	i, err := readSlotInfo(r.m.Disk, boots[len(boots)-1].Slot)
	return i.Version, err
}

// updateKey is the secret key whose public half the image trusts.
func updateKey() string { return filepath.Join(*keysFlag, "minisign.key") }

// release makes an update out of the image's slot, with a version of its own and what change does to it, in dir.
func (h *host) release(t *testing.T, dir, key string, info func(*slotInfo), change func(*FAT) error) (file string) {
	t.Helper()
	raw := filepath.Join(shortDir(t), "slot.img")
	fat, err := Extract(open(t, image(t)), 2, raw)
	must(t, err)
	i, err := changeInfo(fat, info)
	must(t, err)
	if change != nil {
		must(t, change(fat))
	}
	must(t, os.MkdirAll(dir, 0o755))
	file = filepath.Join(dir, fmt.Sprintf("keyhaven-%s-%s.update", i.Version, i.Arch))
	start := time.Now()
	_, err = h.Tool(t.Context(), "keyhaven-connector", "appliance", "bundle", "make", "--key", key, "--output", file, raw)
	must(t, err)
	st, err := os.Stat(file)
	must(t, err)
	t.Logf("made %s, %d MB, in %.0f s", filepath.Base(file), st.Size()/1e6, time.Since(start).Seconds())
	return file
}

// is sets the version of a release.
func is(version string) func(*slotInfo) { return func(i *slotInfo) { i.Version = version } }

// publish makes the index of a source, in the directory of the bundles, by which devices find them.
func (h *host) publish(t *testing.T, key string, bundles ...string) {
	t.Helper()
	dir := filepath.Dir(bundles[0])
	arch := board(t).Arch
	_, err := h.Tool(t.Context(), "keyhaven-connector", append([]string{"appliance", "bundle", "index", "--key", key, "--channel", "stable",
		"--output", filepath.Join(dir, arch+".json")}, bundles...)...)
	must(t, err)
}

// source serves a directory as update source in a namespace, until the test ends. dir/stable has the channel stable.
func source(t *testing.T, ns *testnet.Namespace, dir string) {
	t.Helper()
	var l net.Listener
	must(t, ns.Do(func() (err error) {
		l, err = net.Listen("tcp", sourceAddr)
		return err
	}))
	server := &http.Server{Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	t.Cleanup(func() { server.Close(); <-done })
}

// defaultSlot is the partition that the firmware starts without the try-boot flag.
func defaultSlot(d *Disk) (int, error) {
	b, err := ReadFile(d, 1, "autoboot.txt")
	if err != nil {
		return 0, err
	}
	return readAutoboot(b, false)
}

// kept reports whether a version has become the one that the firmware starts.
func kept(r *Run, want string) error {
	part, err := defaultSlot(r.m.Disk)
	if err != nil {
		return err
	}
	i, err := readSlotInfo(r.m.Disk, part)
	if err == nil && i.Version != want {
		err = fmt.Errorf("the firmware starts %s, not %s", i.Version, want)
	}
	return err
}

// awaitKept waits for kept.
func awaitKept(t *testing.T, r *Run, patience time.Duration, want string) {
	t.Helper()
	eventually(t, r, patience, "the new version", func(context.Context) error { return kept(r, want) })
}
