package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestUpgrade runs what the packages run after an upgrade, with a systemctl that says how the unit is and writes down what it
// is told.
func TestUpgrade(t *testing.T) {
	text, err := os.ReadFile("../scripts/postinst")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ name, before, state, want string }{
		{"fresh", "", "active", ""},
		{"runs", "1.0", "active", "kill --signal=SIGUSR2 --kill-who=main x.service"},
		{"reloads", "1.0", "reloading", "kill --signal=SIGUSR2 --kill-who=main x.service"},
		{"starts", "1.0", "activating", "--no-block try-restart x.service"},
		{"has just ended", "1.0", "active gone", "kill --signal=SIGUSR2 --kill-who=main x.service\n--no-block try-restart x.service"},
		{"stopped", "1.0", "inactive", "invoke start x.service"},
		{"failed, and cannot start", "1.0", "failed", "invoke start x.service"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			told := filepath.Join(dir, "told")
			script := "set -eu\nunit=x.service user=root directories= hint=\n" + strings.ReplaceAll(string(text), "/run/systemd/system", dir)
			for name, body := range map[string]string{
				"systemctl": `case $1 in is-active) echo "${STATE% gone}"; exit 3 ;; daemon-reload) exit 0 ;; esac
echo "$*" >>"$TOLD"; case $1,$STATE in kill,*gone) exit 1 ;; esac`,
				"deb-systemd-invoke": `echo "invoke $*" >>"$TOLD"; [ "$STATE" != failed ]`,
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.CommandContext(t.Context(), "sh", "-c", script, "postinst", "configure", tt.before)
			cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin", "STATE=" + tt.state, "TOLD=" + told}
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			got, err := os.ReadFile(told)
			if err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			if strings.TrimSpace(string(got)) != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
