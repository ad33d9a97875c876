package audit

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// smallLog writes a log of three files with n records in each and returns its directory.
func smallLog(t testing.TB, key CheckpointSigner, n int) string { return logOf(t, key, 3, n) }

func logOf(t testing.TB, key CheckpointSigner, files, n int) string {
	t.Helper()
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	for i := range files {
		// Each file holds open, checkpoint, n operations, close; the newest a last checkpoint besides.
		eventually(t, "a checkpoint", func() bool { return l.Stats().Checkpoints == uint64(i+1) })
		l.commit(t, i*n, (i+1)*n)
		if i < files-1 {
			if err := l.Rotate(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	return dir
}

// copyOf returns a copy of the files in dir.
func copyOf(t testing.TB, dir string) string {
	t.Helper()
	to := t.TempDir()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		write(t, filepath.Join(to, e.Name()), read(t, filepath.Join(dir, e.Name())))
	}
	return to
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// write puts a new file in place of what is there: to truncate it would make the file system write at once, which takes time.
func write(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func lines(b []byte) [][]byte { return slices.Collect(bytes.Lines(b)) }

func verify(t testing.TB, c VerifyConfig) Report {
	t.Helper()
	rep, err := Verify(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// Every bit pattern of every byte counts: whatever byte is flipped, in whatever file, is noticed, and the line named is the line that was changed.
func TestEveryFlipIsNoticed(t *testing.T) {
	key, pub := newKey(t)
	dir := logOf(t, key, 2, 1)
	keys := []crypto.PublicKey{pub}
	if rep := verify(t, VerifyConfig{Dir: dir, Keys: keys}); rep.Problem != nil {
		t.Fatal(rep.Problem)
	}
	for _, name := range []string{fileName(1), fileName(2), headFile} {
		path := filepath.Join(dir, name)
		whole := read(t, path)
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		put := func(i int, b byte) {
			if _, err := f.WriteAt([]byte{b}, int64(i)); err != nil {
				t.Fatal(err)
			}
		}
		for i, was := range whole {
			is := was ^ 1<<(i%7)
			put(i, is)
			c := VerifyConfig{Dir: dir}
			if name == headFile {
				c.Keys = keys // in the files the chain alone shows each flip
			}
			p := verify(t, c).Problem
			if p == nil {
				t.Fatalf("%s: byte %d (%q to %q) was changed and nobody noticed", name, i, was, is)
			}
			if want := bytes.Count(whole[:i], []byte{'\n'}) + 1; name != headFile && (filepath.Base(p.File) != name || p.Line != want) {
				t.Errorf("%s: byte %d: got %v, want line %d", name, i, p, want)
			}
			put(i, was)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTamperingIsNamed(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 6)
	other := smallLog(t, key, 6)
	const name = "audit-00000002.jsonl"
	whole := lines(read(t, filepath.Join(dir, name)))
	foreign := lines(read(t, filepath.Join(other, name)))
	last := len(whole) - 1
	type change struct {
		what string
		edit func(ls [][]byte, i int) [][]byte
		kind ProblemKind
		line func(i int) int // the line to be named
		from int             // first line to try it at
		to   int             // last line
	}
	same := func(i int) int { return i + 1 }
	for _, c := range []change{
		{"remove", func(ls [][]byte, i int) [][]byte { return slices.Delete(ls, i, i+1) }, Removed, same, 0, last - 1},
		{"remove two", func(ls [][]byte, i int) [][]byte { return slices.Delete(ls, i, i+2) }, Removed, same, 0, last - 2},
		{"remove the last", func(ls [][]byte, i int) [][]byte { return ls[:i] }, Truncated, same, last, last},
		{"truncate", func(ls [][]byte, i int) [][]byte { return ls[:i] }, Truncated, same, 1, last},
		{"truncate within", func(ls [][]byte, i int) [][]byte {
			ls[i] = ls[i][:len(ls[i])/2]
			return ls[:i+1]
		}, Truncated, same, 1, last},
		{"duplicate", func(ls [][]byte, i int) [][]byte { return slices.Insert(ls, i+1, ls[i]) }, Duplicated, func(i int) int { return i + 2 }, 1, last - 1},
		{"append a copy", func(ls [][]byte, i int) [][]byte { return append(ls, ls[i]) }, Inserted, func(int) int { return last + 2 }, 1, last},
		{"swap", func(ls [][]byte, i int) [][]byte {
			ls[i], ls[i+1] = ls[i+1], ls[i]
			return ls
		}, Reordered, same, 1, last - 1},
		{"move to the end", func(ls [][]byte, i int) [][]byte { return append(slices.Delete(ls, i, i+1), whole[i]) }, Reordered, same, 1, last - 2},
		{"splice", func(ls [][]byte, i int) [][]byte {
			ls[i] = foreign[i]
			return ls
		}, Altered, same, 2, last},
		{"insert a foreign line", func(ls [][]byte, i int) [][]byte { return slices.Insert(ls, i, foreign[i]) }, Inserted, same, 3, last},
		{"change a word", func(ls [][]byte, i int) [][]byte {
			ls[i] = bytes.Replace(ls[i], []byte(`"result":"ok"`), []byte(`"result":"no"`), 1)
			return ls
		}, Altered, same, 3, 3},
		{"change a seq", func(ls [][]byte, i int) [][]byte {
			ls[i] = bytes.Replace(ls[i], []byte(`{"seq":`), []byte(`{"seq":9`), 1)
			return ls
		}, Altered, same, 1, last - 1},
	} {
		for i := c.from; i <= c.to; i++ {
			t.Run(fmt.Sprintf("%s/%d", c.what, i), func(t *testing.T) {
				to := copyOf(t, dir)
				write(t, filepath.Join(to, name), bytes.Join(c.edit(slices.Clone(whole), i), nil))
				p := verify(t, VerifyConfig{Dir: to, Keys: []crypto.PublicKey{pub}}).Problem
				if p == nil {
					t.Fatal("nobody noticed")
				}
				if p.Kind != c.kind && !(c.what == "splice" && p.Kind == Foreign) {
					t.Errorf("got %v, want %s", p, c.kind)
				}
				if filepath.Base(p.File) != name || p.Line != c.line(i) {
					t.Errorf("got %v, want line %d of %s", p, c.line(i), name)
				}
			})
		}
	}
}

func TestTamperingWithFilesIsNamed(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 4)
	other := smallLog(t, key, 4)
	swap := func(t *testing.T, a, b string) {
		x, y := read(t, a), read(t, b)
		write(t, a, y)
		write(t, b, x)
	}
	for _, c := range []struct {
		name string
		edit func(t *testing.T, file func(int) string)
		kind ProblemKind
		file int
	}{
		{"first removed", func(t *testing.T, f func(int) string) { remove(t, f(1)) }, Removed, 2},
		{"middle removed", func(t *testing.T, f func(int) string) { remove(t, f(2)) }, Removed, 2},
		{"newest removed", func(t *testing.T, f func(int) string) { remove(t, f(3)) }, Truncated, 2},
		{"swapped", func(t *testing.T, f func(int) string) { swap(t, f(2), f(3)) }, Reordered, 2},
		{"copied", func(t *testing.T, f func(int) string) { write(t, f(4), read(t, f(3))) }, Duplicated, 4},
		{"of another log", func(t *testing.T, f func(int) string) { write(t, f(2), read(t, filepath.Join(other, fileName(2)))) }, Foreign, 2},
		{"emptied", func(t *testing.T, f func(int) string) { write(t, f(2), nil) }, Truncated, 2},
		{"newest emptied", func(t *testing.T, f func(int) string) { write(t, f(3), nil) }, Truncated, 2},
		{"no open line", func(t *testing.T, f func(int) string) {
			write(t, f(1), bytes.Join(lines(read(t, f(1)))[1:], nil))
		}, Removed, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			to := copyOf(t, dir)
			c.edit(t, func(i int) string { return filepath.Join(to, fileName(i)) })
			p := verify(t, VerifyConfig{Dir: to, Keys: []crypto.PublicKey{pub}}).Problem
			if p == nil {
				t.Fatal("nobody noticed")
			}
			if p.Kind != c.kind || filepath.Base(p.File) != fileName(c.file) {
				t.Errorf("got %v, want %s in %s", p, c.kind, fileName(c.file))
			}
		})
	}
}

func remove(t testing.TB, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// rechain makes the chains of lines anew from line i on, as somebody can who has no key.
func rechain(t testing.TB, ls [][]byte, i int) {
	t.Helper()
	s := newSealer()
	var prev Hash
	for n, raw := range ls {
		l, err := ParseLine(raw)
		if err != nil {
			t.Fatal(err)
		}
		if l.Kind == KindOpen {
			prev = l.Open.PrevHead
		}
		if n >= i {
			l.Chain = s.chain(&prev, l.appendBody(nil))
			ls[n] = l.encode()
		}
		prev = l.Chain
	}
}

// Somebody who makes the chain anew is caught by the next checkpoint, and by nothing else.
func TestNewChainIsNoticedByCheckpoints(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 4)
	path := filepath.Join(dir, fileName(3))
	anchor, err := LoadAnchor(filepath.Join(dir, headFile))
	if err != nil {
		t.Fatal(err)
	}
	ls := lines(read(t, path))
	at := slices.IndexFunc(ls, func(b []byte) bool { return bytes.Contains(b, []byte(`"kind":"op"`)) }) + 1
	ls[at] = bytes.Replace(ls[at], []byte(`"result":"ok"`), []byte(`"result":"no"`), 1)
	rechain(t, ls, at)
	write(t, path, bytes.Join(ls, nil))
	keys := []crypto.PublicKey{pub}
	if p := verify(t, VerifyConfig{Dir: dir, Keys: keys}).Problem; p == nil || p.Kind != Altered {
		t.Errorf("got %v, want it altered", p)
	}
	// Without the checkpoint at the end, and with an older head file, only the anchor tells.
	ls = ls[:len(ls)-1]
	write(t, path, bytes.Join(ls, nil))
	remove(t, filepath.Join(dir, headFile))
	rep := verify(t, VerifyConfig{Dir: dir, Keys: keys})
	if rep.Problem != nil || rep.Covered != 8 || rep.Uncovered != 4 {
		t.Errorf("got %+v, want 8 records covered and 4 not", rep)
	}
	if p := verify(t, VerifyConfig{Dir: dir, Keys: keys, Anchor: anchor}).Problem; p == nil || p.Kind != Altered {
		t.Errorf("with an anchor: got %v, want it altered", p)
	}
}

func TestAnchor(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 4)
	anchor, err := LoadAnchor(filepath.Join(dir, headFile))
	if err != nil {
		t.Fatal(err)
	}
	keys := []crypto.PublicKey{pub}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: keys, Anchor: anchor})
	if rep.Problem != nil || !rep.Anchored {
		t.Fatalf("got %+v", rep)
	}
	remove(t, filepath.Join(dir, headFile))
	path := filepath.Join(dir, fileName(3))
	ls := lines(read(t, path))
	for n := 1; n < len(ls); n++ {
		write(t, path, bytes.Join(ls[:n], nil))
		p := verify(t, VerifyConfig{Dir: dir, Keys: keys, Anchor: anchor}).Problem
		if p == nil || p.Kind != Truncated || p.Line != n+1 || filepath.Base(p.File) != fileName(3) {
			t.Errorf("cut behind line %d: got %v, want it truncated there", n, p)
		}
	}
	kept := filepath.Join(t.TempDir(), "messages")
	var messages []byte
	for _, raw := range plainLines(t, dir) {
		messages = append(append(messages, "<110>1 2026-01-02T15:04:05Z host keyhaven-keyserver 1 audit - "...), raw...)
	}
	messages = append(append(messages, "<110>1 "...), anchor.encode()...)
	write(t, kept, append(messages, "<110>1 something {\"seq\":1,\"kind\":\"checkpoint\" torn"...))
	if got, err := LoadAnchor(kept); err != nil || got.Seq != anchor.Seq {
		t.Errorf("from a log host: got %v, %v, want seq %d", got, err, anchor.Seq)
	}
	write(t, kept, []byte("nothing\n"))
	if _, err := LoadAnchor(kept); err == nil || !strings.Contains(err.Error(), "no checkpoint line") {
		t.Errorf("from a file without one: got %v", err)
	}
	other := smallLog(t, key, 4)
	if p := verify(t, VerifyConfig{Dir: other, Keys: keys, Anchor: anchor}).Problem; p == nil || p.Kind != Foreign {
		t.Errorf("anchor of another log: got %v", p)
	}
}

func TestKeysOfCheckpoints(t *testing.T) {
	key, pub := newKey(t)
	_, wrong := newKey(t)
	dir := smallLog(t, key, 2)
	rep := verify(t, VerifyConfig{Dir: dir})
	if rep.Problem != nil || rep.KeysGiven || rep.Covered != 0 || rep.Uncovered != 6 {
		t.Errorf("without keys: got %+v, want nothing covered", rep)
	}
	if p := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{wrong}}).Problem; p == nil || p.Kind != Forged {
		t.Errorf("with another key: got %v, want it forged", p)
	}
	rep = verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{wrong, pub}})
	if rep.Problem != nil || rep.Covered != 6 || rep.Uncovered != 0 || rep.Checkpoints < 3 {
		t.Errorf("with both keys: got %+v, want all covered", rep)
	}
}

func TestPartialLog(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	remove(t, filepath.Join(dir, fileName(1)))
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}, Partial: true})
	if rep.Problem != nil || rep.Records != 6 || rep.Covered != 6 || rep.First == 1 {
		t.Errorf("got %+v", rep)
	}
	_, err := Verify(t.Context(), VerifyConfig{Dir: t.TempDir()})
	if err == nil || !strings.Contains(err.Error(), "no log") {
		t.Errorf("empty directory: got %v", err)
	}
	if _, err := Verify(t.Context(), VerifyConfig{Dir: filepath.Join(dir, "none")}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no directory: got %v", err)
	}
}
