//go:build image

package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

var (
	cutsFlag  = flag.Int("cuts", 50, "how many different states of the card to boot at least, for first boot and for the update each")
	lanesFlag = flag.Int("lanes", runtime.NumCPU(), "how many machines run at once")
	killsFlag = flag.Int("kills", 8, "how often QEMU is killed during an update")
	laterFlag = flag.Int("later", 8, "of that many states one is updated afterwards")
)

const cutYAML = "hostname: petcam\n" + timeYAML

// The power is cut at many points of an update. Whatever the card had written by then, the machine comes up on the old
// or the new version with its tunnel up, and takes the next update.
func TestCutsUpdate(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, _ := h.token(t)
	dir := shortDir(t)
	source(t, h.ns, dir)
	disk := h.personalise(t, cutYAML+sourceYAML, file)
	old, err := readSlotInfo(disk, 2)
	must(t, err)
	stable := filepath.Join(dir, "stable")
	bundle := h.release(t, stable, updateKey(), is(newVersion), nil)

	r := h.switchOn(t, Machine{Disk: disk, Append: quickGate})
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
	awaitStatus(t, r, 2*time.Minute, "CONNECTED", old.Version)
	record := disk.Record()
	start := time.Now()
	h.publish(t, updateKey(), bundle)
	must(t, r.Reset()) // it looks for updates soon after its start
	awaitKept(t, r, 15*time.Minute, newVersion)
	figure(t, "update from publication to kept", time.Since(start).Seconds(), "s")
	time.Sleep(5 * time.Second) // what it notes afterwards is part of the update
	must(t, r.PowerCut())
	must(t, h.EdgeProc.Stop())

	firmwareCuts(t, record)
	next := shortDir(t)
	h.publish(t, updateKey(), h.release(t, filepath.Join(next, "stable"), updateKey(), is(nextVersion), nil))
	h.bootCuts(t, "update", choose(t, record, *cutsFlag), []string{old.Version, newVersion}, next, func(int) string { return h.Path("edge-state.db") })
}

// The power is cut at many points of the first boot, in which the data partition grows, the machine enrols and the token
// is removed.
func TestCutsFirstBoot(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, _ := h.token(t, "--ttl", "24h") // the last state may be booted after hours
	disk := h.personalise(t, cutYAML+sourceYAML, file)
	must(t, disk.Grow(2*disk.Size()))
	old, err := readSlotInfo(disk, 2)
	must(t, err)
	must(t, h.EdgeProc.Stop()) // so that its state can be copied
	fresh := h.Path("edge-fresh.db")
	copyFile(t, h.Path("edge-state.db"), fresh)
	must(t, h.EdgeProc.Start())
	must(t, h.AwaitEdge(t.Context()))

	record := disk.Record()
	r := h.switchOn(t, Machine{Disk: disk, Append: quickGate})
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
	awaitStatus(t, r, 2*time.Minute, "CONNECTED", old.Version)
	time.Sleep(10 * time.Second)
	must(t, r.PowerCut())
	must(t, h.EdgeProc.Stop())
	at := h.enrolledAt(t)
	ops := record.Ops()
	enrolled, _ := slices.BinarySearchFunc(ops, at, func(op Op, at time.Time) int { return op.At.Compare(at) })
	t.Logf("enrolled after %d of %d operations", enrolled, len(ops))

	next := shortDir(t)
	h.publish(t, updateKey(), h.release(t, filepath.Join(next, "stable"), updateKey(), is(nextVersion), nil))
	h.bootCuts(t, "first boot", choose(t, record, *cutsFlag), []string{old.Version}, next, func(op int) string {
		if op < enrolled {
			return fresh
		}
		return h.Path("edge-state.db") // after the last operation before it the power may go before the answer comes
	})
}

// firmwareCuts looks at the card after every single operation of an update, with each way to lose what was not flushed: what
// the firmware would start is the whole old slot or the whole new one.
func firmwareCuts(t *testing.T, r *Record) {
	t.Helper()
	ops := r.Ops()
	parts, err := r.before.Partitions()
	must(t, err)
	in := func(d *Disk, part int) (sum uint64) { // tells the blocks apart that were written in a partition, by where they lie in memory
		p := parts[part-1]
		for no, blk := range d.blocks {
			if off := no * blockSize; off >= p.Off && off < p.Off+p.Size {
				x := uint64(no)*0x9e3779b97f4a7c15 ^ uint64(uintptr(unsafe.Pointer(&blk[0])))*0xc2b2ae3d27d4eb4f
				x = (x ^ x>>31) * 0xff51afd7ed558ccd
				sum ^= x ^ x>>33
			}
		}
		return sum
	}
	end, err := r.At(len(ops), Kept, 0)
	must(t, err)
	whole := map[int][]uint64{}
	for _, part := range []int{2, 3} {
		whole[part] = []uint64{in(r.before, part), in(end, part)}
	}
	started := map[uint64]int{} // what the firmware starts, by the contents of the configuration partition
	came := map[int]int{}
	for n := range len(ops) + 1 {
		for _, cut := range []Cut{Kept, Lost, Torn} {
			d, err := r.At(n, cut, uint64(n))
			must(t, err)
			config := in(d, 1)
			part, ok := started[config]
			if !ok {
				if part, err = defaultSlot(d); err != nil {
					t.Errorf("after operation %d, %v: the firmware finds nothing to start: %v", n, cut, err)
				}
				started[config] = part
			}
			came[part]++
			if part != 0 && !slices.Contains(whole[part], in(d, part)) {
				t.Errorf("after operation %d, %v: the firmware starts partition %d, which is not whole", n, cut, part)
			}
		}
	}
	figure(t, "power cuts, update, for the firmware", float64(3*(len(ops)+1)), "states", "old_slot", came[2], "new_slot", came[3],
		"configurations", len(started))
}

var enrolledLine = regexp.MustCompile(`time=(\S+) level=INFO msg="connector enrolled"`)

// enrolledAt is when the edge kept that the machine's token was used, by its log. It does so before it answers, and the machine
// has kept its key before it asks.
func (h *host) enrolledAt(t *testing.T) time.Time {
	t.Helper()
	all := enrolledLine.FindAllStringSubmatch(h.EdgeProc.Log(), -1)
	if len(all) == 0 {
		t.Fatal("the edge's log does not say when the machine enrolled")
	}
	at, err := time.Parse(time.RFC3339, all[len(all)-1][1])
	must(t, err)
	return at
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	must(t, err)
	must(t, os.WriteFile(to, b, 0o600))
}

// A state is the card after a power cut.
type state struct {
	op   int // operations before it
	of   string
	cut  Cut
	disk *Disk
}

// choose takes states out of a record: mostly such as lie around writes to the configuration partition, which decide what
// is booted, and to the data partition, and fewer within the long write of a slot, and all at the end. No two are equal.
func choose(t *testing.T, r *Record, want int) (states []state) {
	t.Helper()
	ops := r.Ops()
	parts, err := r.before.Partitions()
	must(t, err)
	kinds := map[string][]int{}
	for i, op := range ops {
		kind := "table"
		for n, p := range parts {
			if op.Off >= p.Off && op.Off < p.Off+p.Size {
				kind = []string{"configuration", "slot", "slot", "data"}[n]
			}
		}
		switch {
		case op.Flush:
			kind = "flush"
		case op.Off >= parts[3].Off: // it has grown meanwhile
			kind = "data"
		}
		kinds[kind] = append(kinds[kind], i)
	}
	type point struct {
		op  int
		of  string
		cut Cut
	}
	seen, equal := map[point]bool{}, map[[32]byte]bool{}
	for round := 1; round <= 16 && len(states) < want; round++ { // more and more points, until enough of them differ
		var points []point
		for kind, weight := range map[string]int{"configuration": 10, "data": 7, "slot": 4, "table": 4, "flush": 2} {
			list := kinds[kind]
			for k := range min(weight*round, len(list)) {
				p := point{list[k*len(list)/min(weight*round, len(list))] + 1, kind, Cut((k + round) % 3)}
				if !seen[p] {
					seen[p] = true
					points = append(points, p)
				}
			}
		}
		if round == 1 { // all of the end, in which an update's version becomes the one that the firmware starts
			for k := range min(12, len(ops)) {
				if p := (point{len(ops) - k, "end", Cut(k % 3)}); !seen[p] {
					seen[p] = true
					points = append(points, p)
				}
			}
		}
		slices.SortFunc(points, func(a, b point) int { return a.op - b.op })
		for _, p := range points {
			d, err := r.At(p.op, p.cut, 1)
			must(t, err)
			if sum := d.Sum(); !equal[sum] {
				equal[sum] = true
				states = append(states, state{p.op, p.of, p.cut, d})
			}
		}
	}
	slices.SortFunc(states, func(a, b state) int { return a.op - b.op })
	t.Logf("%d operations (%d configuration, %d data, %d slot, %d table, %d flushes): %d different states of %d points", len(ops),
		len(kinds["configuration"]), len(kinds["data"]), len(kinds["slot"]), len(kinds["table"]), len(kinds["flush"]), len(states), len(seen))
	if len(states) < want {
		t.Errorf("%d states are fewer than %d", len(states), want)
	}
	return states
}

// An outcome is what became of a state.
type outcome struct {
	During  string  `json:"during"`
	After   int     `json:"after_operation"`
	Of      string  `json:"of"`
	Cut     string  `json:"unflushed"`
	Version string  `json:"version"`
	Boots   int     `json:"boots"`
	Seconds float64 `json:"seconds"`
	Later   float64 `json:"next_update_seconds,omitempty"`
	Error   string  `json:"error,omitempty"`
}

// bootCuts boots the states on several lanes at once.
func (h *host) bootCuts(t *testing.T, during string, states []state, versions []string, next string, edgeState func(op int) string) {
	t.Helper()
	queue := make(chan int, len(states))
	for _, i := range rand.New(rand.NewPCG(1, 1)).Perm(len(states)) { // so that a run that is broken off has seen something of all
		queue <- i
	}
	close(queue)
	var mu sync.Mutex // guards the fields below
	var slowest float64
	came := map[string]int{}
	var wg sync.WaitGroup
	for n := range *lanesFlag {
		l := h.newLane(t, n, next)
		wg.Go(func() {
			for i := range queue {
				s := states[i]
				o := outcome{During: during, After: s.op, Of: s.of, Cut: s.cut.String()}
				l.try(t, s.disk, edgeState(s.op), versions, i%*laterFlag == 0, &o)
				states[i].disk = nil
				b, _ := json.Marshal(o)
				mu.Lock()
				t.Logf("CUT %s", b)
				if o.Error != "" {
					t.Errorf("%s, cut after operation %d (%s), %s: %s", during, s.op, s.of, s.cut, o.Error)
				}
				came[o.Version]++
				slowest = max(slowest, o.Seconds)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	figure(t, "power cuts, "+during, float64(len(states)), "states", "came_up", came, "slowest_s", slowest)
}

// A lane is a network with an edge of its own, so that machines with the same identity do not meet.
type lane struct {
	h    *host
	name string
	ns   *testnet.Namespace
	dir  string
	edge *lab.Process
}

func (h *host) newLane(t *testing.T, n int, next string) *lane {
	t.Helper()
	l := &lane{h: h, name: fmt.Sprintf("lane%d", n), dir: shortDir(t)}
	var err error
	l.ns, err = h.net.Namespace(l.name)
	must(t, err)
	must(t, l.ns.AddAddr("lo", netip.MustParsePrefix("10.0.2.2/32")))
	copyKeys(t, h.Path("edge-ca"), l.path("ca"))
	copyKeys(t, h.Path("edge-identity"), l.path("identity"))
	cfg := h.EdgeConfig()
	delete(cfg, "key_identity")
	cfg["visitors"] = map[string]any{"listen": map[string]any{"tls": []string{visitors}}}
	cfg["state"] = map[string]any{"file": l.path("state.db")}
	cfg["admin"] = map[string]any{"socket": l.path("edge.sock")}
	cfg["identity"] = map[string]any{"ca_dir": l.path("ca"), "dir": l.path("identity")}
	must(t, h.WriteYAML(l.name+".yaml", cfg))
	_, err = h.Tool(t.Context(), "keyhaven-edge", "check", "--config", h.Path(l.name+".yaml"))
	must(t, err)
	l.edge = h.Process(l.name, l.ns, "keyhaven-edge", "run", "--config", h.Path(l.name+".yaml"))
	source(t, l.ns, l.dir)
	timeServer(t, l.ns)
	must(t, os.Symlink(filepath.Join(next, "stable"), l.path("next")))
	return l
}

// copyKeys copies a directory with keys, which stay closed to others.
func copyKeys(t *testing.T, from, to string) {
	t.Helper()
	files, err := os.ReadDir(from)
	must(t, err)
	must(t, os.Mkdir(to, 0o700))
	for _, f := range files {
		copyFile(t, filepath.Join(from, f.Name()), filepath.Join(to, f.Name()))
	}
}

func (l *lane) path(name string) string { return filepath.Join(l.dir, name) }

// ask runs an administration command of the lane's edge.
func (l *lane) ask(ctx context.Context, args ...string) (string, error) {
	return l.h.Tool(ctx, "keyhaven-edge", append(args, "--socket", l.path("edge.sock"))...)
}

// try boots a card, with the edge as it was, and fills in o.
func (l *lane) try(t *testing.T, d *Disk, edgeState string, versions []string, later bool, o *outcome) {
	err := func() error {
		b, err := os.ReadFile(edgeState)
		if err != nil {
			return err
		}
		if err := errors.Join(os.WriteFile(l.path("state.db"), b, 0o600), l.edge.Start()); err != nil {
			return err
		}
		os.Remove(l.path("stable"))
		if later {
			if err := os.Rename(l.path("next"), l.path("stable")); err != nil {
				return err
			}
			defer os.Rename(l.path("stable"), l.path("next"))
		}
		dir, err := os.MkdirTemp("", "khq")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		r, err := Machine{Board: board(t), Disk: d, Dir: dir, NS: l.ns, Cores: 1, Append: quickGate}.Start()
		if err != nil {
			return err
		}
		err = l.comesUp(t, r, versions, later, o)
		if err != nil {
			status, _ := r.ReadFile(1, statusFile)
			err = fmt.Errorf("%w; boots %+v; the card says:\n%s\nthe serial line:\n%s", err, r.History(), status, tail(r.Serial(), 40))
		}
		return errors.Join(err, r.PowerCut())
	}()
	if err = errors.Join(err, l.edge.Stop()); err != nil {
		o.Error = err.Error()
	}
}

func (l *lane) comesUp(t *testing.T, r *Run, versions []string, later bool, o *outcome) error {
	ctx, cancel := deadline(t, 5*time.Minute)
	defer cancel()
	start := time.Now()
	err := r.Until(ctx, func(ctx context.Context) error {
		if !l.edge.Running() {
			cancel() // it is no use to wait
			return errors.New("the lane's edge has ended: " + tail(l.edge.Log(), 3))
		}
		return tunnelUp(ctx, l.ask)
	})
	o.Seconds = time.Since(start).Seconds()
	o.Boots = len(r.History())
	if err != nil {
		return err
	}
	if o.Version, err = version(r); err != nil {
		return err
	}
	if !slices.Contains(versions, o.Version) {
		return fmt.Errorf("it came up with version %q, which is none of %v", o.Version, versions)
	}
	if !later {
		return nil
	}
	ctx, cancel = deadline(t, 15*time.Minute)
	defer cancel()
	err = r.Until(ctx, func(context.Context) error { return kept(r, nextVersion) })
	o.Later = time.Since(start).Seconds()
	return err
}

// QEMU is killed at random moments of an update, again and again. Whatever became of that version, which is given up after
// two trials that ended so, the next one is installed.
func TestKills(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, _ := h.token(t)
	dir := shortDir(t)
	stable := filepath.Join(dir, "stable")
	source(t, h.ns, dir)
	first := h.release(t, stable, updateKey(), is(newVersion), nil)
	h.publish(t, updateKey(), first)
	disk := h.personalise(t, cutYAML+sourceYAML, file)
	for kill := range *killsFlag {
		r := h.switchOn(t, Machine{Disk: disk, Append: quickGate})
		after := time.Duration((20 + 180*rand.Float64()) * float64(time.Second)) // an update begins after 90 s or so, and is kept 90 s later
		select {
		case <-time.After(after):
		case <-t.Context().Done():
		}
		must(t, r.PowerCut())
		v, _ := version(r)
		t.Logf("kill %d after %.1f s, in version %s, boot %d", kill+1, after.Seconds(), v, len(r.History()))
	}
	h.publish(t, updateKey(), first, h.release(t, stable, updateKey(), is(nextVersion), nil))
	r := h.switchOn(t, Machine{Disk: disk, Append: quickGate})
	awaitKept(t, r, 30*time.Minute, nextVersion)
	eventually(t, r, 5*time.Minute, "the tunnel", h.tunnelUp)
}
