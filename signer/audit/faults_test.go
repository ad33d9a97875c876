package audit

import (
	"context"
	"crypto"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// faultDisk is the real disk until it is told otherwise.
type faultDisk struct {
	mu  sync.Mutex
	now faults
	hit map[string]int // how often each fault came
}

// faults are the errors that operations return.
type faults struct {
	create, write, sync, truncate, dir error
	part                               int // bytes that get written before write fails
}

func (d *faultDisk) set(f faults) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now = f
}

// fail returns the error that the operation is to return.
func (d *faultDisk) fail(op string) (faults, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := map[string]error{"create": d.now.create, "write": d.now.write, "sync": d.now.sync, "truncate": d.now.truncate, "dir": d.now.dir}[op]
	if err != nil {
		if d.hit == nil {
			d.hit = map[string]int{}
		}
		d.hit[op]++
		err = &fs.PathError{Op: op, Path: "the disk", Err: err}
	}
	return d.now, err
}

func (d *faultDisk) hits(op string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.hit[op]
}

func (d *faultDisk) create(path string, again bool) (file, error) {
	if _, err := d.fail("create"); err != nil {
		return nil, err
	}
	f, err := realDisk{}.create(path, again)
	if err != nil {
		return nil, err
	}
	return &faultFile{f, d}, nil
}

func (d *faultDisk) syncDir(dir string) error {
	if _, err := d.fail("dir"); err != nil {
		return err
	}
	return realDisk{}.syncDir(dir)
}

type faultFile struct {
	file
	d *faultDisk
}

func (f *faultFile) Write(b []byte) (int, error) {
	if x, err := f.d.fail("write"); err != nil {
		n, werr := f.file.Write(b[:min(x.part, len(b))])
		return n, errors.Join(err, werr)
	}
	return f.file.Write(b)
}

func (f *faultFile) Truncate(n int64) error {
	if _, err := f.d.fail("truncate"); err != nil {
		return err
	}
	return f.file.Truncate(n)
}

func (f *faultFile) datasync() error {
	if _, err := f.d.fail("sync"); err != nil {
		return err
	}
	return f.file.datasync()
}

func TestRequiredStopsAndRecovers(t *testing.T) {
	for _, c := range []struct {
		name   string
		faults faults
		is     error
		says   string
		rotate bool // the fault shows when a file is begun
		files  int  // in the end
	}{
		{"full", faults{write: syscall.ENOSPC}, syscall.ENOSPC, "make room", false, 1},
		{"full in the middle of a line", faults{write: syscall.ENOSPC, part: 100}, syscall.ENOSPC, "make room", false, 1},
		{"full behind a line", faults{write: syscall.ENOSPC, part: 1000}, syscall.ENOSPC, "make room", false, 1},
		{"full and no way back", faults{write: syscall.ENOSPC, part: 1000, truncate: syscall.EIO}, syscall.ENOSPC, "make room", false, 2},
		{"sync fails", faults{sync: syscall.EIO}, syscall.EIO, "new file", false, 2},
		{"sync fails and no way back", faults{sync: syscall.EIO, truncate: syscall.EIO}, syscall.EIO, "new file", false, 2},
		{"read-only", faults{write: syscall.EROFS, create: syscall.EROFS}, syscall.EROFS, "mount", false, 1},
		{"quota", faults{write: syscall.EDQUOT}, syscall.EDQUOT, "make room", false, 1},
		{"no next file", faults{create: syscall.ENOSPC}, syscall.ENOSPC, "make room", true, 2},
		{"next file cannot be written", faults{sync: syscall.EIO}, syscall.EIO, "new file", true, 2},
		{"next file's name is not durable", faults{dir: syscall.EIO}, syscall.EIO, "new file", true, 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			key, pub := newKey(t)
			d := new(faultDisk)
			dir := t.TempDir()
			l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, disk: d})
			l.commit(t, 0, 5)
			eventually(t, "a checkpoint", func() bool { return l.Stats().Checkpoints == 1 })
			d.set(c.faults)
			var err error
			kept := 5
			if c.rotate {
				err = l.Rotate(t.Context())
			} else {
				// The record waits in the queue and is written when the disk is back; the commit fails at once.
				err = l.Commit(t.Context(), testRecord(5))
				kept++
			}
			for _, err := range []error{err, l.Ready(), l.Commit(t.Context(), testRecord(6))} {
				if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("got error %v, want %v with %q", err, c.is, c.says)
				}
			}
			kept++
			d.set(faults{})
			eventually(t, "recovery", func() bool { return l.Ready() == nil })
			l.commit(t, 7, 10)
			kept += 3
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
			if rep.Problem != nil || rep.Records != uint64(kept) || rep.Uncovered != 0 || rep.Files != c.files || rep.Lost != 0 {
				t.Errorf("got %+v (%v), want %d records in %d files", rep, rep.Problem, kept, c.files)
			}
			if s := l.Stats(); s.Faults == 0 || s.Fault != "" {
				t.Errorf("got %+v", s)
			}
			// What the next start makes of it.
			l = open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
			l.commit(t, 0, 1)
		})
	}
}

// A commit whose fdatasync failed is never reported as kept, though the same record comes into the next file.
func TestFailedSyncIsNotAsked(t *testing.T) {
	key, pub := newKey(t)
	d := new(faultDisk)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, disk: d})
	d.set(faults{sync: syscall.EIO, truncate: syscall.EIO})
	if err := l.Commit(t.Context(), testRecord(0)); !errors.Is(err, syscall.EIO) {
		t.Fatalf("got %v, want an error", err)
	}
	if d.hits("sync") == 0 || d.hits("truncate") == 0 {
		t.Fatal("the fault did not come")
	}
	d.set(faults{})
	eventually(t, "recovery", func() bool { return l.Ready() == nil && l.Stats().Records == 1 })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	second, err := ParseLine(lines(read(t, filepath.Join(dir, fileName(2))))[0])
	if err != nil {
		t.Fatal(err)
	}
	if second.Open.Abandoned == 0 {
		t.Errorf("got %+v, want bytes abandoned", second.Open)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Records != 1 {
		t.Errorf("got %+v, want one record", rep)
	}
}

func TestBestEffortNeverWaits(t *testing.T) {
	key, pub := newKey(t)
	d := new(faultDisk)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: BestEffort, Server: testServer, Signer: key, Queue: 10, disk: d})
	d.set(faults{write: syscall.ENOSPC})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 100 {
		if err := l.Commit(ended, testRecord(i)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the fault", func() bool { return l.Fault() != nil })
	if err := l.Ready(); err != nil {
		t.Errorf("got %v, want it ready", err)
	}
	lost := l.Stats().Lost
	if lost < 80 {
		t.Errorf("lost %d, want at least 80: the queue holds 10", lost)
	}
	d.set(faults{})
	eventually(t, "recovery", func() bool { return l.Fault() == nil })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Lost != lost || rep.Records != 100-lost {
		t.Errorf("got %+v, want %d lost and the others there", rep, lost)
	}
}

// stuckDisk holds writes until it is let go.
type stuckDisk struct {
	realDisk
	gate chan struct{}
}

type stuckFile struct {
	file
	gate chan struct{}
}

func (d stuckDisk) create(path string, again bool) (file, error) {
	f, err := d.realDisk.create(path, again)
	return stuckFile{f, d.gate}, err
}

func (f stuckFile) datasync() error {
	<-f.gate
	return f.file.datasync()
}

// A full queue makes Commit wait in the mode required; when its context ends the record is lost and counted, and one that is in the queue is written nevertheless.
func TestFullQueue(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	gate := make(chan struct{}, 100)
	gate <- struct{}{} // the file's beginning
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, Queue: 2, disk: stuckDisk{gate: gate}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	errs := make(chan error, 20)
	for i := range 20 {
		wg.Go(func() { errs <- l.Commit(ctx, testRecord(i)) })
	}
	eventually(t, "a full queue", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.room != nil && len(l.gather.records) == 2
	})
	cancel()
	wg.Wait()
	close(errs)
	for err := range errs {
		if err == nil {
			t.Error("a commit returned nil though nothing was durable")
		}
	}
	close(gate)
	lost := l.Stats().Lost
	if lost == 0 || lost == 20 {
		t.Errorf("got %d lost", lost)
	}
	l.commit(t, 20, 22)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Lost != lost || rep.Records != 22-lost {
		t.Errorf("got %+v, want %d lost", rep, lost)
	}
}

func TestFileTakenAway(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, path string)
		says string
	}{
		{"removed", func(t *testing.T, path string) { remove(t, path) }, "removed"},
		{"replaced", func(t *testing.T, path string) {
			write(t, path+".x", read(t, path))
			if err := os.Rename(path+".x", path); err != nil {
				t.Fatal(err)
			}
		}, "replaced"},
		{"truncated", func(t *testing.T, path string) {
			if err := os.Truncate(path, 10); err != nil {
				t.Fatal(err)
			}
		}, "somebody else changed it"},
		{"appended to", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString("x\n"); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}, "somebody else changed it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			key, pub := newKey(t)
			keys := []crypto.PublicKey{pub}
			dir := t.TempDir()
			l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
			l.commit(t, 0, 3)
			c.do(t, filepath.Join(dir, fileName(1)))
			err := l.Commit(t.Context(), testRecord(3))
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "audit repair") || !strings.Contains(err.Error(), fileName(1)) {
				t.Fatalf("got %v", err)
			}
			if l.Ready() == nil {
				t.Error("ready, though the file is gone")
			}
			taken, err := Repair(t.Context(), dir, "looked into by the security team")
			if err != nil || !taken {
				t.Fatal(taken, err)
			}
			eventually(t, "repair", func() bool { return l.Ready() == nil })
			l.commit(t, 4, 6)
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			if p := verify(t, VerifyConfig{Dir: dir, Keys: keys}).Problem; p == nil {
				t.Error("the damage is not reported")
			}
			first, err := ParseLine(lines(read(t, filepath.Join(dir, fileName(2))))[0])
			if err != nil || !strings.Contains(first.Open.Damage, "security team") || !strings.Contains(first.Open.Damage, c.says) {
				t.Errorf("got %+v, %v", first, err)
			}
			if p := verify(t, VerifyConfig{Dir: dir, Keys: keys, Partial: true, Repaired: true}).Problem; p != nil {
				t.Errorf("with the damage known: got %v", p)
			}
		})
	}
}

func TestFileMovedAwayAndBack(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	path := filepath.Join(dir, fileName(1))
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	l.commit(t, 0, 3)
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	if err := l.Commit(t.Context(), testRecord(3)); err == nil {
		t.Fatal("committed to a file that is gone")
	}
	if err := os.Rename(path+".away", path); err != nil {
		t.Fatal(err)
	}
	eventually(t, "recovery", func() bool { return l.Ready() == nil })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Records != 4 || rep.Files != 1 {
		t.Errorf("got %+v", rep)
	}
}

func TestBestEffortGoesOnAfterDamage(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: BestEffort, Server: testServer, Signer: key})
	l.commit(t, 0, 3)
	eventually(t, "records", func() bool { return l.Stats().Records == 3 })
	remove(t, filepath.Join(dir, fileName(1)))
	l.commit(t, 3, 6)
	eventually(t, "records", func() bool { return l.Stats().Records == 6 })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}, Partial: true, Repaired: true})
	if rep.Problem != nil || rep.Records != 3 || len(rep.Damage) != 1 || rep.Damage[0].Kind != Damaged {
		t.Errorf("got %+v", rep)
	}
}

// flakySigner is an audit key that can be away.
type flakySigner struct {
	CheckpointSigner
	mu   sync.Mutex
	away bool
}

func (f *flakySigner) Sign(ctx context.Context, msg []byte) (string, []byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.away {
		return "", nil, signer.ErrUnavailable
	}
	return f.CheckpointSigner.Sign(ctx, msg)
}

func (f *flakySigner) set(away bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.away = away
}

func TestAuditKeyAway(t *testing.T) {
	key, pub := newKey(t)
	away := &flakySigner{CheckpointSigner: key, away: true}
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: away, Checkpoint: time.Millisecond})
	l.commit(t, 0, 5)
	eventually(t, "a failure", func() bool { return l.Stats().CheckpointErr != "" })
	if err := l.Ready(); err != nil {
		t.Errorf("records must go on: %v", err)
	}
	l.commit(t, 5, 10)
	away.set(false)
	eventually(t, "a late checkpoint", func() bool { s := l.Stats(); return s.Checkpoints > 0 && s.CheckpointErr == "" })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Covered != 10 {
		t.Errorf("got %+v", rep)
	}
}
