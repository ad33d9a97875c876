package reliability

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// build compiles the key server.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "keyhaven-keyserver")
	cmd := exec.Command("go", "build", "-o", program, "../cmd/keyserver")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the key server: %v: %s", err, out)
	}
	return program
}

func TestMatrix(t *testing.T) {
	dir, err := os.MkdirTemp("", "keyhaven-reliability-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b, err := NewBench(t.Context(), dir, build(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range Rows() {
		t.Run(row.Name, func(t *testing.T) {
			t.Parallel()
			r, err := b.Run(context.Background(), row)
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Check(); err != nil {
				t.Errorf("%v; the key server said:\n%s", err, r.Log)
			}
			t.Logf("sent %d, lost %d, gap %v, recovery %v, workers %d; %s", r.Sent, r.Lost, r.Gap, r.Recovery, r.WorkerRestarts, r.Seen())
		})
	}
}
