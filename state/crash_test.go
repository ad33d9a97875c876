package state_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/statetest"
)

// childEnv makes the test binary a process that holds the store of that path and writes to it until it is killed.
const childEnv = "KEYHAVEN_STATE_TEST_CHILD"

func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		writeUntilKilled(path)
	}
	goleak.VerifyTestMain(m)
}

func TestBolt(t *testing.T) {
	statetest.Run(t, statetest.Engine{Open: func(t testing.TB, dir string) state.Store {
		s, err := state.OpenBolt(filepath.Join(dir, "state.db"))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}})
}

func writeUntilKilled(path string) {
	s, err := state.OpenBolt(path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		value := []byte(strconv.Itoa(i))
		rev, err := s.Txn(context.Background(), nil, []state.Op{state.Put("a", value), state.Put("b", value)})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(rev, i)
	}
}

// TestKilled kills a process in the midst of its writing. Whatever it was told is stored must be there, and whole.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	var rev, last int
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		seen := rev
		for n := 0; n < 30+7*round && lines.Scan(); n++ {
			if _, err := fmt.Sscan(lines.Text(), &rev, &last); err != nil {
				t.Fatalf("child says %q", lines.Text())
			}
		}
		if rev <= seen {
			t.Fatalf("revision went from %d to %d", seen, rev)
		}
		_, err = state.OpenBolt(path)
		if !errors.Is(err, state.ErrInUse) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "stop that process") {
			t.Errorf("open while in use: got %v, want ErrInUse with path and remedy", err)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() { // what it wrote before it died was promised too
			fmt.Sscan(lines.Text(), &rev, &last)
		}
		cmd.Wait()

		s, err := state.OpenBolt(path)
		if err != nil {
			t.Fatal(err)
		}
		entries, got, err := s.List(t.Context(), "")
		if err != nil || len(entries) != 2 {
			t.Fatalf("got %d entries, %v", len(entries), err)
		}
		n, _ := strconv.Atoi(string(entries[0].Value))
		if string(entries[0].Value) != string(entries[1].Value) || n < last || int(got) < rev {
			t.Errorf("after the kill: %s and %s at %d, child was told of %d at %d", entries[0].Value, entries[1].Value, got, last, rev)
		}
		rev = int(got)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
