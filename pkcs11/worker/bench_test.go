package worker

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// BenchmarkBoundary compares the module in this process with workers that have the same sessions, and numbers of workers and sessions with
// each other. SoftHSM2 locks much for the whole process, so workers are worth more than sessions there; a network HSM wants about 16
// operations at once, however they come about.
func BenchmarkBoundary(b *testing.B) {
	st := makeToken(b, "p256", "rsa2048")
	for _, label := range []string{"test-p256", "test-rsa2048"} {
		for _, callers := range []int{1, 8, 64} {
			for _, sessions := range []int{1, 2, 4, 8} {
				b.Run(fmt.Sprintf("%s/callers=%d/in-process/sessions=%d", label, callers, sessions), func(b *testing.B) {
					cfg := tokenConfig(b, st)
					cfg.Sessions = sessions
					t, err := pkcs11.Open(b.Context(), cfg)
					if err != nil {
						b.Fatal(err)
					}
					defer t.Close()
					k, err := t.Key(b.Context(), pkcs11.Selector{Label: label})
					if err != nil {
						b.Fatal(err)
					}
					share(b, callers, k)
				})
				for _, workers := range []int{1, 2, 3, 4} {
					b.Run(fmt.Sprintf("%s/callers=%d/workers=%d/sessions=%d", label, callers, workers, sessions), func(b *testing.B) {
						benchPool(b, st, label, callers, workers, sessions)
					})
				}
			}
		}
	}
}

func benchPool(b *testing.B, st *softhsm.Token, label string, callers, workers, sessions int) {
	p := openPool(b, st, func(c *Config) { c.Workers, c.Token.Sessions = workers, sessions })
	k := keysOf(b, p)[label]
	eventually(b, "all workers", func() bool { return p.Workers() == workers })
	// Each worker looks for the key before its first signature.
	share(b, callers, k)
}

// share signs b.N times from so many goroutines.
func share(b *testing.B, callers int, k signer.Key) {
	b.Helper()
	alg := plainest(k.Public())
	in := bytes.Repeat([]byte{0xa5}, 32)
	var warm sync.WaitGroup
	for range 64 {
		warm.Go(func() {
			if _, err := k.Sign(b.Context(), alg, in); err != nil {
				b.Error(err)
			}
		})
	}
	warm.Wait()
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	var done atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for done.Add(1) <= int64(b.N) {
				if _, err := k.Sign(context.Background(), alg, in); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

// cpuTime is the processor time that this process and its workers have used, which other work on the machine disturbs less than rates.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	all := time.Duration(0)
	for _, pid := range append(childrenOf(b), os.Getpid()) {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
		if err != nil || len(tasks) == 0 {
			b.Fatalf("no tasks of process %d: %v", pid, err)
		}
		for _, task := range tasks {
			text, err := os.ReadFile(task)
			if err != nil {
				continue
			}
			var ran time.Duration
			if _, err := fmt.Sscan(string(text), &ran); err != nil {
				b.Fatal(err)
			}
			all += ran
		}
	}
	return all
}
