package audit

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// crashDisk is a disk that fails now and then, and that at last loses its power: what was not made durable is then there, or not, or in part,
// or as zero bytes. After a failed sync a later one that succeeds says nothing about what was written before.
type crashDisk struct {
	mu    sync.Mutex
	rng   *rand.Rand
	files map[string]*crashFile
	odds  int // one operation in so many fails; 0 is none
	dead  bool
}

type crashFile struct {
	file
	d       *crashDisk
	name    string
	now     []byte // as the process sees it
	durable []byte
	named   bool // its name is durable
	lost    bool // a sync failed: what came before it may never reach the disk
}

var errPower = &fs.PathError{Op: "use", Path: "the disk", Err: syscall.EIO}

// fails says whether the operation fails.
func (d *crashDisk) fails() error {
	if d.dead || d.odds > 0 && d.rng.IntN(d.odds) == 0 {
		return errPower
	}
	return nil
}

func (d *crashDisk) create(path string, again bool) (file, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fails(); err != nil {
		return nil, err
	}
	f, err := realDisk{}.create(path, again)
	if err != nil {
		return nil, err
	}
	c := &crashFile{file: f, d: d, name: path}
	if old := d.files[path]; old != nil {
		c.named, c.durable = old.named, old.durable
	}
	d.files[path] = c
	return c, nil
}

func (d *crashDisk) syncDir(string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fails(); err != nil {
		return err
	}
	for _, f := range d.files {
		f.named = true
	}
	return nil
}

func (f *crashFile) Write(b []byte) (int, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	n, err := len(b), f.d.fails()
	if err != nil {
		n = f.d.rng.IntN(len(b) + 1)
	}
	if f.d.dead {
		n = 0
	}
	if _, werr := f.file.Write(b[:n]); werr != nil {
		return 0, werr
	}
	f.now = append(f.now, b[:n]...)
	return n, err
}

func (f *crashFile) Truncate(n int64) error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.fails(); err != nil {
		return err
	}
	f.now = f.now[:n]
	return f.file.Truncate(n)
}

func (f *crashFile) datasync() error {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if err := f.d.fails(); err != nil {
		f.lost = true
		return err
	}
	if !f.lost {
		f.durable = bytes.Clone(f.now)
	}
	return nil
}

// crash takes the power away, and returns what is on the disk then; nil is no file.
func (d *crashDisk) crash() map[string][]byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.dead = true
	left := make(map[string][]byte)
	for path, f := range d.files {
		switch {
		case !f.named && d.rng.IntN(2) == 0:
			left[path] = nil
		case bytes.HasPrefix(f.now, f.durable):
			loose := bytes.Clone(f.now[len(f.durable):])
			loose = loose[:d.rng.IntN(len(loose)+1)]
			if d.rng.IntN(2) == 0 {
				clear(loose[d.rng.IntN(len(loose)+1):])
			}
			left[path] = append(bytes.Clone(f.durable), loose...)
		default:
			left[path] = append([]byte{}, f.durable...)
		}
	}
	return left
}

// Whatever fails in whatever order, and whenever the power goes: what was acknowledged is in the log, once, and the log is whole.
func TestNothingAcknowledgedIsLost(t *testing.T) {
	for seed := range uint64(6) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { crashes(t, seed) }) // which lets no time pass between tries
		})
	}
}

func crashes(t *testing.T, seed uint64) {
	key, pub := newKey(t)
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(seed, 1))
	acknowledged := make(map[string]bool)
	for round := range 8 {
		d := &crashDisk{rng: rand.New(rand.NewPCG(seed, uint64(round)+2)), files: make(map[string]*crashFile), odds: []int{0, 3, 8, 20}[rng.IntN(4)]}
		crashRound(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, RotateSize: 4 << 10, Checkpoint: time.Millisecond, disk: d}, d, round, acknowledged)
	}
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	l.commit(t, 0, 1)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}, AllSigned: true}).Problem; p != nil {
		t.Fatal(p)
	}
	seen := make(map[string]int)
	if _, err := (Source{Dir: dir}).walk(t.Context(), func(l *Line, _ []byte) error {
		seen[l.Op.RequestID]++
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for id := range acknowledged {
		if seen[id] != 1 {
			t.Errorf("%s was acknowledged and stands %d times in the log", id, seen[id])
		}
	}
	if len(acknowledged) == 0 {
		t.Error("nothing was acknowledged")
	}
}

// crashRound has operations recorded on a disk that fails, until the power goes.
func crashRound(t *testing.T, c Config, d *crashDisk, round int, acknowledged map[string]bool) {
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			for i := range 12 {
				r := testRecord(i)
				r.RequestID = fmt.Sprintf("round %d worker %d request %d", round, worker, i)
				ctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
				if err := l.Commit(ctx, r); err == nil {
					mu.Lock()
					acknowledged[r.RequestID] = true
					mu.Unlock()
				} else if i%4 > 0 {
					time.Sleep(2 * maxRetry)
				}
				cancel()
			}
		})
	}
	wg.Wait()
	left := d.crash()
	stop()
	<-ended // whatever it says of a disk without power
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	for path, content := range left {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		if content != nil {
			write(t, path, content)
		}
	}
	_ = os.Remove(filepath.Join(c.Dir, headFile+".new")) // of a crash, if at all
}
