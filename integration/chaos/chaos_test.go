//go:build netns

package chaos

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

const (
	healTime   = 60 * time.Second // after the last fault, all is well again within this
	burst      = 3                // rounds between two times when all must be well
	maxFlows   = 60               // of one edge when no visitor is left: those to key servers, and idle ones to origins
	growthKiB  = 200 << 10        // what a program may hold more at the end than at the beginning, with the race detector
	quietAfter = 30 * time.Second // within which flows of visitors who have gone are gone
)

// TestChaos has visitors use everything while one part after the other fails, several at a time. No byte of one network may ever
// reach a visitor of another, no key may be used against the rules, and after the last fault all must be served again.
func TestChaos(t *testing.T) {
	t.Logf("-seed %d", *seed)
	match, err := regexp.Compile(*only)
	must(t, err)
	w := up(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	all, err := visitors(w)
	must(t, err)
	var loops, watch sync.WaitGroup
	t.Cleanup(func() {
		t.Logf("what happened (-seed %d):\n%s", *seed, strings.Join(w.events, "\n"))
		for _, v := range w.violations {
			t.Error(v)
		}
	})
	defer watch.Wait()
	defer cancel()
	watch.Go(func() { w.supervise(ctx) })
	vctx, leave := context.WithCancel(ctx)
	defer loops.Wait()
	defer leave()
	for _, v := range all {
		loops.Go(func() { v.run(vctx) })
	}
	w.well(t, all, rand.New(rand.NewPCG(*seed, 1)), time.Now())
	before := w.memory(t)

	rng, end := rand.New(rand.NewPCG(*seed, 0)), time.Now().Add(*duration)
	slowest := time.Duration(0)
	for r := 0; (r < *rounds || *duration > 0) && (*duration == 0 || time.Now().Before(end)); r++ {
		faults := w.draw(rng, match)
		w.note("round %d: %v", r, faults)
		w.round(ctx, faults)
		w.attempt(ctx, rng, all[0].tls)
		if *duration == 0 && r == *rounds-1 || r%burst == burst-1 {
			took := w.well(t, all, rng, time.Now())
			slowest = max(slowest, took)
		}
		if w.violated() {
			break
		}
	}
	slowest = max(slowest, w.well(t, all, rng, time.Now()))
	t.Logf("longest time until all was well: %.1f s", slowest.Seconds())
	leave()
	loops.Wait()
	w.quiet(t)
	w.compareMemory(t, before)
	for _, v := range all {
		t.Logf("%-45s %5d exchanges succeeded, %4d visits failed", v.name, v.good, v.bad)
	}
	cancel()
	watch.Wait()
	for _, k := range w.KeyServers {
		check(t, k.Proc.Stop()) // its log ends with a checkpoint
	}
	w.audit(t)
}

// attempt tries what is forbidden, while much may still be broken.
func (w *world) attempt(ctx context.Context, rng *rand.Rand, cfg *tls.Config) {
	f := forbiddens()[rng.IntN(len(forbiddens()))]
	server, edge := rng.IntN(len(w.KeyServers)), w.edges[rng.IntN(len(w.edges))]
	w.note("%s: %q was refused by itself: %v", w.KeyServers[server].Name, f.name, w.forge(ctx, server, f))
	w.intrude(ctx, edge, cfg)
}

// well waits until every tunnel is healthy on every edge, every visitor has been served since, and key servers refuse what is
// forbidden. It returns how long that took.
func (w *world) well(t *testing.T, all []*visitor, rng *rand.Rand, since time.Time) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), healTime)
	defer cancel()
	steps := []func(context.Context) error{w.healthy}
	for _, v := range all {
		steps = append(steps, func(context.Context) error { return v.since(since) })
	}
	for _, step := range steps {
		if err := lab.Eventually(ctx, step); err != nil {
			w.violate("not well within %v: %v", healTime, err)
			for _, v := range all {
				if err := v.since(since); err != nil {
					w.note("%v", err)
				}
			}
			t.FailNow()
		}
	}
	took := time.Since(since)
	w.note("all is well, after %.1f s", took.Seconds())
	if err := lab.Eventually(ctx, func(ctx context.Context) error { return w.forgeAll(ctx, rng) }); err != nil {
		w.violate("%v", err)
	}
	return took
}

// status is what is read of an edge's.
type status struct {
	Flows   int
	Tunnels []struct{ Name, Status string }
	Edges   []struct {
		Name  string
		Alive bool
	}
	Faults []struct{ Kind, Name, Text string }
}

func (w *world) status(ctx context.Context, edge int) (s status, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	out, err := w.EdgeAt(ctx, edge, "status", "--output", "json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// healthy is nil if every edge says that all edges are there, all tunnels healthy and nothing is out of service.
func (w *world) healthy(ctx context.Context) error {
	for i := range w.Edges {
		s, err := w.status(ctx, i)
		if err != nil {
			return err
		}
		if len(s.Tunnels) != len(w.Sites) || len(s.Edges) != len(w.Edges) || len(s.Faults) > 0 {
			return fmt.Errorf("%s: status %+v", w.Edges[i].Name, s)
		}
		for _, tunnel := range s.Tunnels {
			if tunnel.Status != "healthy" {
				return fmt.Errorf("%s: tunnel %s is %s", w.Edges[i].Name, tunnel.Name, tunnel.Status)
			}
		}
		for _, e := range s.Edges {
			if !e.Alive {
				return fmt.Errorf("%s: %s is not there", w.Edges[i].Name, e.Name)
			}
		}
	}
	return nil
}

// quiet waits until the flows of visitors who have gone are gone.
func (w *world) quiet(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), quietAfter)
	defer cancel()
	err := lab.Eventually(ctx, func(ctx context.Context) error {
		for i := range w.Edges {
			s, err := w.status(ctx, i)
			if err != nil {
				return err
			}
			if s.Flows > maxFlows {
				return fmt.Errorf("%s has %d flows without a visitor", w.Edges[i].Name, s.Flows)
			}
		}
		return nil
	})
	if err != nil {
		out, _ := w.Edge(t.Context(), "flow", "list")
		t.Errorf("%v\n%s", err, out)
	}
}

// memory is the resident set of each program, in KiB.
func (w *world) memory(t *testing.T) map[string]int {
	t.Helper()
	kib := map[string]int{}
	for _, p := range w.all() {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
		must(t, err)
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				kib[p.Name()], err = strconv.Atoi(strings.Fields(v)[0])
				must(t, err)
			}
		}
		if kib[p.Name()] == 0 {
			t.Fatalf("%s has no resident set", p.Name())
		}
	}
	return kib
}

func (w *world) compareMemory(t *testing.T, before map[string]int) {
	t.Helper()
	for name, now := range w.memory(t) {
		t.Logf("%-15s resident set %3d MiB at the beginning, %3d MiB at the end", name, before[name]>>10, now>>10)
		if now > before[name]+growthKiB {
			t.Errorf("%s holds %d MiB, %d MiB more than at the beginning", name, now>>10, (now-before[name])>>10)
		}
	}
}
