package audit

import (
	"bytes"
	"context"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// plainLines returns the lines of all files in dir.
func plainLines(t testing.TB, dir string) (all [][]byte) {
	t.Helper()
	names, err := listFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		all = append(all, lines(read(t, filepath.Join(dir, n)))...)
	}
	return all
}

// An export's first line says by itself where the export begins, so in a directory it would hide that the log's beginning was removed.
func TestExportIsNoLogFile(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	keys := []crypto.PublicKey{pub}
	var b bytes.Buffer
	if err := Export(t.Context(), Source{Dir: dir}, Filter{First: 8}, "jsonl", &b); err != nil {
		t.Fatal(err)
	}
	for i := 2; i <= 3; i++ {
		remove(t, filepath.Join(dir, fileName(i)))
	}
	path := filepath.Join(dir, fileName(1))
	write(t, path, b.Bytes())
	if p := verify(t, VerifyConfig{Dir: dir, Keys: keys}).Problem; p == nil || p.Line != 1 {
		t.Errorf("export in place of a log: got %v, want a problem in line 1", p)
	}
	pipe := filepath.Join(t.TempDir(), "pipe") // as from a program that unpacks it
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	fed := make(chan error, 1)
	go func() { fed <- os.WriteFile(pipe, b.Bytes(), 0) }()
	for _, path := range []string{path, pipe} {
		rep := verify(t, VerifyConfig{Files: []string{path}, Keys: keys})
		if rep.Problem != nil || !rep.Export || rep.First != 8 {
			t.Errorf("export by itself: got %+v", rep)
		}
	}
	if err := <-fed; err != nil {
		t.Error(err)
	}
}

// Whoever can write the files can make them anew without any checkpoint.
func TestLogWithoutSignatures(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	keys := []crypto.PublicKey{pub}
	var forged [][]byte
	for i, raw := range plainLines(t, dir) {
		if l, err := ParseLine(raw); err != nil {
			t.Fatal(err)
		} else if i == 0 || l.Kind == KindOp {
			forged = append(forged, bytes.Replace(raw, []byte("host"), []byte("evil"), 1))
		}
	}
	s := newSealer()
	var prev Hash
	for i, raw := range forged {
		l, err := ParseLine(raw)
		if err != nil {
			t.Fatal(err)
		}
		l.Seq = uint64(i + 1)
		l.Chain = s.chain(&prev, l.appendBody(nil))
		forged[i], prev = l.encode(), l.Chain
	}
	to := t.TempDir()
	path := filepath.Join(to, fileName(1))
	write(t, path, bytes.Join(forged, nil))
	if p := verify(t, VerifyConfig{Dir: to, Keys: keys}).Problem; p == nil || p.Kind != Unsigned {
		t.Errorf("got %v, want it unsigned", p)
	}
	if p := verify(t, VerifyConfig{Dir: to}).Problem; p != nil {
		t.Errorf("without keys the chain alone is checked: got %v", p)
	}
	// A true checkpoint among forged lines covers nothing.
	genuine := plainLines(t, dir)
	at := slices.IndexFunc(genuine, func(b []byte) bool { return bytes.Contains(b, []byte(`"kind":"checkpoint"`)) })
	replayed, err := ParseLine(genuine[at])
	if err != nil {
		t.Fatal(err)
	}
	replayed.Seq = uint64(len(forged) + 1)
	replayed.Chain = s.chain(&prev, replayed.appendBody(nil))
	write(t, path, append(bytes.Join(forged, nil), replayed.encode()...))
	if p := verify(t, VerifyConfig{Dir: to, Keys: keys}).Problem; p == nil {
		t.Error("a replayed checkpoint: nobody noticed")
	}
}

func TestAllSigned(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	c := VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}, AllSigned: true}
	if p := verify(t, c).Problem; p != nil {
		t.Fatal(p)
	}
	remove(t, filepath.Join(dir, headFile))
	path := filepath.Join(dir, fileName(3))
	ls := lines(read(t, path))
	write(t, path, bytes.Join(ls[:len(ls)-1], nil)) // without the checkpoint at the end
	p := verify(t, c).Problem
	if p == nil || p.Kind != Unsigned || p.Line != 3 || filepath.Base(p.File) != fileName(3) {
		t.Errorf("got %v, want it unsigned from line 3 of file 3 on", p)
	}
	c.AllSigned = false
	if rep := verify(t, c); rep.Problem != nil || rep.Uncovered != 3 {
		t.Errorf("got %+v, want 3 not covered", rep)
	}
}

// What does not count may be there only as far as the next file says.
func TestNothingIsHiddenBehindWhatWasGivenUp(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	d := new(faultDisk)
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, disk: d})
	l.commit(t, 0, 2)
	d.set(faults{sync: syscall.EIO})
	if err := l.Commit(t.Context(), testRecord(2)); err == nil {
		t.Fatal("kept without sync")
	}
	d.set(faults{})
	eventually(t, "the disk is back", func() bool { return l.Ready() == nil })
	l.commit(t, 3, 5)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	c := VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}}
	if p := verify(t, c).Problem; p != nil {
		t.Fatal(p)
	}
	path := filepath.Join(dir, fileName(1))
	whole := read(t, path)
	write(t, path, append(slices.Clone(whole), bytes.Repeat([]byte("{\"seq\":1}\n"), 10000)...))
	if p := verify(t, c).Problem; p == nil || p.Kind != Inserted {
		t.Errorf("got %v, want it inserted", p)
	}
}

// A report is read on a terminal, and what is in the files may come from anybody.
func TestReportsHoldNoControlCharacters(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 1)
	path := filepath.Join(dir, fileName(2))
	const evil = "\x1b[2J\u202egood"
	for name, change := range map[string]func(o *Opening){
		"damage": func(o *Opening) { o.Damage = evil },
		"file":   func(o *Opening) { o.PrevFile, o.PrevSeq = evil, o.PrevSeq+5 },
		"server": func(o *Opening) { o.Server = evil },
	} {
		to := copyOf(t, dir)
		ls := lines(read(t, path))
		l, err := ParseLine(ls[0])
		if err != nil {
			t.Fatal(err)
		}
		change(&l.Open)
		ls[0] = l.encode()
		rechain(t, ls, 0)
		write(t, filepath.Join(to, fileName(2)), bytes.Join(ls, nil))
		p := verify(t, VerifyConfig{Dir: to, Keys: []crypto.PublicKey{pub}}).Problem
		if p == nil || strings.ContainsAny(p.Error(), "\x1b\u202e") {
			t.Errorf("%s: got %q", name, p)
		}
	}
	first := filepath.Join(dir, fileName(1))
	ls := lines(read(t, first))
	l, err := ParseLine(ls[0])
	if err != nil {
		t.Fatal(err)
	}
	l.Open.Server = evil
	ls[0] = l.encode()
	rechain(t, ls, 0)
	write(t, first, bytes.Join(ls, nil))
	if rep := verify(t, VerifyConfig{Dir: dir}); strings.ContainsAny(rep.Server, "\x1b\u202e") {
		t.Errorf("got server %q", rep.Server)
	}
}

// A directory entry that is no file must not hold up a server that starts, nor a reader.
func TestEntriesThatAreNoFiles(t *testing.T) {
	key, pub := newKey(t)
	made := smallLog(t, key, 1)
	for name, make := range map[string]func(path string) error{
		"fifo":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"device":    func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		for _, entry := range []string{fileName(4), headFile} {
			t.Run(name+" "+entry, func(t *testing.T) {
				dir := copyOf(t, made)
				path := filepath.Join(dir, entry)
				_ = os.Remove(path) // of the copy
				if err := make(path); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				defer cancel()
				done := within(ctx, func() {
					rep, err := Verify(ctx, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
					if err == nil && rep.Problem == nil {
						t.Error("verify: nobody noticed")
					}
					l, err := Open(ctx, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
					if err != nil {
						return
					}
					if l.Ready() == nil {
						t.Error("start: nobody noticed")
					}
					if err := l.Close(); err != nil {
						t.Error(err)
					}
				})
				if !done {
					t.Fatal("held up")
				}
			})
		}
	}
	t.Run("request to repair", func(t *testing.T) {
		dir := t.TempDir()
		if err := syscall.Mkfifo(filepath.Join(dir, repairFile), 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if !within(ctx, func() {
			if reason, err := readRepair(dir); err == nil {
				t.Errorf("got reason %q", reason)
			}
		}) {
			t.Fatal("held up")
		}
	})
}

// within reports whether f returned before ctx ended.
func within(ctx context.Context, f func()) bool {
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
		return true
	case <-ctx.Done():
		return false
	}
}

// What a link in the directory points to is not written to.
func TestLinksAreNotWrittenThrough(t *testing.T) {
	key, _ := newKey(t)
	for _, entry := range []string{headFile + ".new", lockFile, fileName(1)} {
		t.Run(entry, func(t *testing.T) {
			dir := t.TempDir()
			victim := filepath.Join(t.TempDir(), "victim")
			write(t, victim, []byte("precious"))
			if err := os.Symlink(victim, filepath.Join(dir, entry)); err != nil {
				t.Fatal(err)
			}
			if err := writeAtomic(filepath.Join(dir, headFile), []byte("new"), 0o600); err != nil {
				t.Error(err)
			}
			remove(t, filepath.Join(dir, headFile))
			l, err := Open(t.Context(), Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
			if err == nil {
				err = l.Close()
			}
			t.Log(err)
			if got := read(t, victim); string(got) != "precious" {
				t.Errorf("victim now holds %q", got)
			}
		})
	}
}

// A forged head file stops a server with a reason, and no otherwise.
func TestStartWithForgedHead(t *testing.T) {
	key, _ := newKey(t)
	dir := smallLog(t, key, 2)
	path := filepath.Join(dir, headFile)
	head, err := ParseLine(read(t, path))
	if err != nil {
		t.Fatal(err)
	}
	for _, covers := range []uint64{head.Seq, head.Seq + 1, 1 << 62, 1<<64 - 1} {
		forged := *head
		forged.Checkpoint.Covers, forged.Checkpoint.Key = covers, Hash{1}
		write(t, path, forged.encode())
		l, err := Open(t.Context(), Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Ready(); err == nil || !strings.Contains(err.Error(), headFile) {
			t.Errorf("covers %d: got %v, want the head file named", covers, err)
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestRotateAfterFault(t *testing.T) {
	key, _ := newKey(t)
	d := new(faultDisk)
	l := open(t, Config{Dir: t.TempDir(), Mode: Required, Server: testServer, Signer: key, disk: d})
	l.commit(t, 0, 2)
	d.set(faults{write: syscall.ENOSPC})
	if err := l.Rotate(t.Context()); err == nil {
		t.Fatal("rotated on a full disk")
	}
	d.set(faults{})
	if err := l.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "ready", func() bool { return l.Ready() == nil })
	l.commit(t, 2, 3)
}

// stuckOutput takes its time, whatever its context says.
type stuckOutput struct{ release chan struct{} }

func (stuckOutput) Name() string { return "stuck" }
func (stuckOutput) Close() error { return nil }
func (s stuckOutput) Write(context.Context, []byte) error {
	<-s.release
	return nil
}

func TestStuckOutputHoldsNothingUp(t *testing.T) {
	t.Parallel()
	key, _ := newKey(t)
	s := stuckOutput{make(chan struct{})}
	l, err := Open(t.Context(), Config{Dir: t.TempDir(), Mode: Required, Server: testServer, Signer: key, Outputs: []Output{s}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	for i := range 3 {
		if err := l.Commit(t.Context(), testRecord(i)); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Error("the end waits for an output that is stuck")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	close(s.release)
	<-l.w.outputs[0].ended
}

// Two processes with one directory do not both write, even when somebody removed the lock.
func TestLockTakenAway(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	c := Config{Dir: dir, Mode: Required, Server: testServer, Signer: key}
	l := open(t, c)
	l.commit(t, 0, 2)
	remove(t, filepath.Join(dir, lockFile))
	if err := l.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), c); err == nil {
		t.Fatal("a second writer was let in")
	}
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	if p := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}}).Problem; p != nil {
		t.Error(p)
	}
}

// The one who repairs may be another user than the server.
func TestRepairLeavesNoTraces(t *testing.T) {
	dir := t.TempDir()
	if _, err := Repair(t.Context(), dir, "a wrong directory"); err == nil {
		t.Error("repaired a directory without a log")
	}
	write(t, filepath.Join(dir, fileName(1)), []byte("damaged"))
	if _, err := Repair(t.Context(), dir, "the disk was replaced"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(dir, lockFile)); err == nil {
		t.Error("a lock was left behind, that the server perhaps cannot open")
	}
	st, err := os.Stat(filepath.Join(dir, repairFile))
	if err != nil || st.Mode().Perm()&0o044 != 0o044 {
		t.Errorf("got %v, %v; want a request that the server's user can read", fmt.Sprint(st.Mode()), err)
	}
}

// The first line of an export is bound to nothing but by the checkpoints in it.
func TestExportOfAnotherServer(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	var b bytes.Buffer
	if err := Export(t.Context(), Source{Dir: dir}, Filter{First: 15, Last: 16}, "jsonl", &b); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "export")
	c := VerifyConfig{Files: []string{path}, Keys: []crypto.PublicKey{pub}}
	write(t, path, b.Bytes())
	if p := verify(t, c).Problem; p != nil {
		t.Fatal(p)
	}
	first, rest, _ := bytes.Cut(b.Bytes(), []byte{'\n'})
	first = bytes.Replace(first, []byte(testServer), []byte(testServer[:len(testServer)-3]+"two"), 1)
	var ops [][]byte // without the lines that name the server
	for _, raw := range lines(rest) {
		if l, err := ParseLine(raw); err != nil {
			t.Fatal(err)
		} else if l.Kind == KindOpen {
			t.Fatal("the range holds an open line: choose another")
		}
		ops = append(ops, raw)
	}
	write(t, path, append(append(first, '\n'), bytes.Join(ops, nil)...))
	if p := verify(t, c).Problem; p == nil || p.Kind != Foreign {
		t.Errorf("got %v, want it foreign", p)
	}
}
