package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// maxExposure is what systemd-analyze security may give a unit at most, in tenths: 0 is closed, 100 is wide open.
const maxExposure = "30"

func units(t *testing.T) []string {
	t.Helper()
	all, err := filepath.Glob("*.service")
	if err != nil || len(all) == 0 {
		t.Fatalf("no units: %v", err)
	}
	return all
}

func analyze(t *testing.T, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"--no-pager"}, args...)...).CombinedOutput()
	return string(out), err
}

func TestUnitsAreClosed(t *testing.T) {
	for _, unit := range units(t) {
		if out, err := analyze(t, "security", "--offline=true", "--threshold="+maxExposure, unit); err != nil {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
	}
	open := filepath.Join(t.TempDir(), "open.service")
	if err := os.WriteFile(open, []byte("[Service]\nExecStart=/bin/true\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := analyze(t, "security", "--offline=true", "--threshold="+maxExposure, open); err == nil {
		t.Errorf("a unit without any hardening passes:\n%s", out)
	}
}

// A unit calls its own program and the shell: there are machines without anything else, kill(1) for one.
func TestUnitsCallWhatIsThere(t *testing.T) {
	command := regexp.MustCompile(`(?m)^Exec\w+=[-@:+!]*(\S+)`)
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		own, calls := "/usr/bin/"+strings.TrimSuffix(filepath.Base(unit), ".service"), command.FindAllSubmatch(text, -1)
		if len(calls) < 2 {
			t.Errorf("%s calls %q", unit, calls)
		}
		for _, m := range calls {
			if p := string(m[1]); p != own && p != "/bin/sh" {
				t.Errorf("%s calls %s", unit, p)
			}
		}
	}
}

// The program is put where the test may, so that everything else of the unit is what is judged.
func TestUnitsAreWellFormed(t *testing.T) {
	program := regexp.MustCompile(`(?m)^(ExecStart=)\S+/(\S+)`)
	for _, unit := range units(t) {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		here := filepath.Join(t.TempDir(), unit)
		if err := os.WriteFile(here, program.ReplaceAll(text, []byte("${1}/bin/true")), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := analyze(t, "verify", "--man=false", here)
		if err != nil || strings.Contains(out, filepath.Base(unit)) {
			t.Errorf("%s: %v\n%s", unit, err, out)
		}
	}
}
