//go:build netns

package chaos

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// How long and which faults. Two runs with one seed have the same faults at the same times.
var (
	rounds   = flag.Int("rounds", 4, "rounds of faults")
	duration = flag.Duration("duration", 0, "in place of rounds: begin new ones for so long")
	seed     = flag.Uint64("seed", 0, "what the faults are drawn from; 0 takes one from the clock")
	only     = flag.String("only", "", "draw faults whose name matches this regular expression alone")
)

// bin holds the programs, built with the race detector. This test's own program is the origin.
var bin string

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "origin" {
		if err := runOrigin(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	flag.Parse()
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func buildAndRun(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "keyhaven-chaos-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	bin = filepath.Join(dir, "race")
	for _, prog := range []string{"keyserver", "connector", "edge"} {
		msg, err := exec.Command("go", "build", "-race", "-o", filepath.Join(bin, "keyhaven-"+prog), "../../cmd/"+prog).CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("build %s: %w\n%s", prog, err, msg)
		}
	}
	// Programs with the race detector wait a second at their end unless told not to.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		return 0, err
	}
	testnet.Sweep("khch")
	return m.Run(), nil
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}
