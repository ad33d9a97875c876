package doctest

import (
	"bytes"
	"os/exec"
	"path/filepath"
	"testing"
)

// Every program completes itself in every shell that docs/administration.md speaks of, and bash can read its script.
func TestCompletions(t *testing.T) {
	bin := build(t)
	for _, p := range programs {
		for _, shell := range []string{"bash", "zsh", "fish", "powershell"} {
			out, err := exec.CommandContext(t.Context(), filepath.Join(bin, p.name), "completion", shell).Output()
			if err != nil || !bytes.Contains(out, []byte(p.name)) {
				t.Errorf("%s completion %s: %v, %d bytes", p.name, shell, err, len(out))
			}
			if shell != "bash" {
				continue
			}
			cmd := exec.CommandContext(t.Context(), "bash", "-n")
			cmd.Stdin = bytes.NewReader(out)
			if said, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: bash cannot read the script: %v\n%s", p.name, err, said)
			}
		}
	}
}
