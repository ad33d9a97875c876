package appliance

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// The file that is on every new card is good as it is, and with every line of it taken into use.
func TestTemplate(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../images/rpi/boot/keyhaven.yaml")
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse("keyhaven.yaml", b)
	if err != nil || c.Token != "" || c.Camera != nil {
		t.Errorf("as it is: %+v, %v", c, err)
	}
	text := regexp.MustCompile(`(?m)^#([a-z]|  )`).ReplaceAllString(string(b), "$1")
	text = regexp.MustCompile(`khj1_\S*`).ReplaceAllString(text, testToken(t).Reveal())
	text = regexp.MustCompile(`ssh-ed25519 .*`).ReplaceAllString(text, goodKey)
	text = strings.Replace(text, `password: "..."`, `password: "12345678"`, 1)
	c, err = Parse("keyhaven.yaml", []byte(text))
	if err != nil {
		t.Fatalf("%v\n%s", err, text)
	}
	if c.Token == "" || c.Camera == nil || len(c.Publish) == 0 || len(c.WiFi.Networks) == 0 || c.Network.Address == "" || len(c.SSH.Keys) == 0 {
		t.Errorf("not all of it is in use: %+v", c)
	}
}

// The image's units are such as systemd takes, and the camera's, which handles what a device sends, is closed.
func TestUnits(t *testing.T) {
	t.Parallel()
	units, err := filepath.Glob("../images/rpi/rootfs/etc/systemd/system/keyhaven-*.service")
	if err != nil || len(units) < 3 {
		t.Fatalf("%d units, %v", len(units), err)
	}
	program := regexp.MustCompile(`(?m)^(ExecStart=)/\S+`)
	dir := t.TempDir()
	for _, unit := range units {
		b, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.Replace(filepath.Base(unit), "@.", "@wlan0.", 1)
		here := filepath.Join(dir, name)
		if err := os.WriteFile(here, program.ReplaceAll(b, []byte("${1}/bin/true")), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "--no-pager", "verify", "--man=false", here).CombinedOutput()
		if err != nil || strings.Contains(string(out), name) {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		if name == unitCamera {
			out, err := exec.CommandContext(t.Context(), "systemd-analyze", "--no-pager", "security", "--offline=true", "--threshold=30", here).CombinedOutput()
			if err != nil {
				t.Errorf("%s: %v\n%s", name, err, out)
			}
		}
	}
	has := func(file string, lines ...string) {
		b, err := os.ReadFile("../images/rpi/rootfs/etc/systemd/system/" + file)
		for _, l := range lines {
			if err != nil || !regexp.MustCompile("(?m)"+l).Match(b) {
				t.Errorf("%s has no %q (%v), without which the radio does not work", file, l, err)
			}
		}
	}
	// wpa_supplicant ends if it cannot make its socket, and the kernel lets nobody else switch a radio.
	has("keyhaven-wifi@.service", "^RuntimeDirectory="+strings.TrimPrefix(wpaDir, "/run/")+"$")
	has("keyhaven-appliance.service", "^CapabilityBoundingSet=.*CAP_NET_ADMIN")
	for _, name := range []string{unitConnector + ".d/appliance.conf", unitCamera, "keyhaven-wifi@.service"} {
		if _, err := os.Stat("../images/rpi/rootfs/etc/systemd/system/" + name); err != nil {
			t.Errorf("the agent relies on what the image does not have: %v", err)
		}
	}
}
