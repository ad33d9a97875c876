package slot

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// machineOnFiles makes a directory that looks like an appliance that runs slot A.
func machineOnFiles(t *testing.T, disk string) string {
	t.Helper()
	root := t.TempDir()
	mbr := make([]byte, sector)
	copy(mbr[440:], "\x31\x56\x48\x4b")
	copy(mbr[510:], "\x55\xaa")
	p := disk
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		p += "p"
	}
	for name, b := range map[string][]byte{
		bootFile:                       []byte(`{"disk":"` + disk + `","part":2,"config":"` + p + `1","data":"` + p + `4"}`),
		configDir + "/" + "README.txt": nil,
		configDir + "/" + autobootFile: autobootText(PartA),
		slotFile:                       []byte(`{"version":"1.0.0","arch":"arm64","boards":["pc"],"format":1}`),
		boardsFile:                     []byte("raspberrypi,4-model-b\x00brcm,bcm2711\x00"),
		modelFile:                      []byte("Raspberry Pi 4 Model B Rev 1.1\x00"),
		disk:                           mbr,
		p + "2":                        system(t, "1.0.0"),
		p + "3":                        make([]byte, slotSize),
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestMachine(t *testing.T) {
	for _, disk := range []string{"/dev/mmcblk0", "/dev/vda"} {
		root := machineOnFiles(t, disk)
		s, err := Open(Config{Root: root})
		if err != nil {
			t.Fatal(err)
		}
		if st, err := s.State(); err != nil || st.Current != PartA || st.Idle != PartB {
			t.Fatalf("got %+v, %v", st, err)
		}
		if got := s.Boards(); len(got) != 2 || got[0] != "raspberrypi,4-model-b" || s.Model() != "Raspberry Pi 4 Model B Rev 1.1" {
			t.Errorf("got %q, %q", got, s.Model())
		}
		next := system(t, "2.0.0")
		if size, err := s.Size(); err != nil || size != int64(len(next)) {
			t.Errorf("got size %d, %v", size, err)
		}
		if err := s.WriteIdle(t.Context(), bytes.NewReader(next), int64(len(next)), nil); err != nil {
			t.Fatal(err)
		}
		if i, err := s.Info(PartB); err != nil || i.Version != "2.0.0" {
			t.Errorf("got %+v, %v", i, err)
		}
		if i, err := s.Info(PartA); err != nil || i.Version != "1.0.0" {
			t.Errorf("got %+v, %v", i, err)
		}
		if err := errors.Join(s.RebootTrial(), s.Reboot()); err != nil {
			t.Error(err)
		}
		if _, err := s.Rollback(); err != nil {
			t.Error(err)
		}
		if b, err := os.ReadFile(filepath.Join(root, configDir, autobootFile)); err != nil || !bytes.Equal(b, autobootText(PartB)) {
			t.Errorf("autoboot.txt is %q, %v", b, err)
		}
		if err := os.WriteFile(filepath.Join(root, configDir, autobootFile), []byte("edited"), 0o600); err != nil {
			t.Fatal(err)
		}
		if did, err := s.Repair(PartA); err != nil || !did {
			t.Errorf("got %v, %v", did, err)
		}
		if left, err := filepath.Glob(filepath.Join(root, configDir, "*.new")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %q, %v", left, err)
		}
	}
}

func TestNoAppliance(t *testing.T) {
	root := t.TempDir()
	if _, err := Open(Config{Root: root}); !errors.Is(err, ErrNoAppliance) {
		t.Errorf("got %v", err)
	}
	if err := os.MkdirAll(filepath.Join(root, "run/keyhaven"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "{", `{"disk":"/dev/sda","part":1}`, `{"disk":"","part":2}`} {
		if err := os.WriteFile(filepath.Join(root, bootFile), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Root: root}); !errors.Is(err, ErrNoAppliance) {
			t.Errorf("%q: got %v", text, err)
		}
	}
	s := &Slots{root: root}
	if got := s.Boards(); len(got) != 1 || got[0] != "pc" {
		t.Errorf("a machine without a device tree is %q", got)
	}
}

// The image's last resort restarts a trial that is not kept in time, and nothing else.
func TestTrialWatch(t *testing.T) {
	script, err := filepath.Abs("../../images/rpi/rootfs/usr/lib/keyhaven/trial-watch")
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		before, after []byte // autoboot.txt at the start, and when the time is over
		want          bool
	}{
		"no trial": {autobootText(PartA), autobootText(PartB), false},
		"kept":     {autobootText(PartB), autobootText(PartA), false},
		"not kept": {autobootText(PartB), autobootText(PartB), true},
		"damaged":  {[]byte("rubbish"), []byte("rubbish"), false},
	} {
		t.Run(name, func(t *testing.T) {
			root, bin := machineOnFiles(t, "/dev/mmcblk0"), t.TempDir()
			auto := filepath.Join(root, configDir, autobootFile)
			for path, text := range map[string]string{
				auto:                                string(c.before),
				filepath.Join(root, "proc/cmdline"): "quiet kh.health=5/40",
				filepath.Join(root, "after"):        string(c.after),
				filepath.Join(bin, "sleep"):         "#!/bin/sh\necho \"$1\" >'" + root + "/slept'\ncp '" + root + "/after' '" + auto + "'\n",
				filepath.Join(bin, "reboot"):        "#!/bin/sh\necho \"$*\" >'" + root + "/rebooted'\n",
			} {
				if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("/bin/sh", script, root)
			cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if b, err := os.ReadFile(filepath.Join(root, "rebooted")); (err == nil) != c.want || c.want && string(b) != "--force --force\n" {
				t.Errorf("got a restart %q, %v; want one: %v", b, err, c.want)
			}
			if b, err := os.ReadFile(filepath.Join(root, "slept")); err == nil && string(b) != "340\n" {
				t.Errorf("waited for %q seconds", b)
			}
		})
	}
}
