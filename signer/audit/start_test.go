package audit

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestStartAfterCrash(t *testing.T) {
	key, pub := newKey(t)
	dir := smallLog(t, key, 3)
	for _, c := range []struct {
		name string
		tail string
	}{
		{"half a line", `{"seq":99,"kind":"op","time":"2026`},
		{"zero bytes", string(make([]byte, 700))},
		{"zero bytes and lines", string(make([]byte, 700)) + "{\"seq\":99}\n{\"seq\":100}\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			to := copyOf(t, dir)
			path := filepath.Join(to, fileName(3))
			whole := read(t, path)
			write(t, path, append(bytes.Clone(whole), c.tail...))
			l := open(t, Config{Dir: to, Mode: Required, Server: testServer, Signer: key})
			l.commit(t, 0, 2)
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(read(t, path), whole) {
				t.Error("the torn line was not cut off, or more than it")
			}
			rep := verify(t, VerifyConfig{Dir: to, Keys: []crypto.PublicKey{pub}})
			if rep.Problem != nil || rep.Records != 11 {
				t.Errorf("got %+v", rep)
			}
			second, err := ParseLine(lines(read(t, filepath.Join(to, fileName(4))))[1])
			if err != nil || second.Kind != KindRecovered || second.Note.Bytes != uint64(len(c.tail)) || second.Note.File != fileName(3) {
				t.Errorf("got %+v, %v", second, err)
			}
		})
	}
	for _, begin := range []string{"", `{"seq":1`} {
		t.Run(fmt.Sprintf("file begun in vain with %q", begin), func(t *testing.T) {
			to := copyOf(t, dir)
			write(t, filepath.Join(to, fileName(4)), []byte(begin))
			l := open(t, Config{Dir: to, Mode: Required, Server: testServer, Signer: key})
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			rep := verify(t, VerifyConfig{Dir: to, Keys: []crypto.PublicKey{pub}})
			if rep.Problem != nil || rep.Files != 4 {
				t.Errorf("got %+v", rep)
			}
		})
	}
}

func TestStartAfterDamage(t *testing.T) {
	key, pub := newKey(t)
	keys := []crypto.PublicKey{pub}
	dir := smallLog(t, key, 3)
	newest := func(dir string) string { return filepath.Join(dir, fileName(3)) }
	for _, c := range []struct {
		name string
		do   func(t *testing.T, dir string)
		says string
	}{
		{"line changed", func(t *testing.T, dir string) {
			write(t, newest(dir), bytes.Replace(read(t, newest(dir)), []byte("host7"), []byte("host8"), 1))
		}, "line 4"},
		{"first line changed", func(t *testing.T, dir string) {
			write(t, newest(dir), bytes.Replace(read(t, newest(dir)), []byte("keyserver"), []byte("keyservex"), 1))
		}, "line 1"},
		{"end removed", func(t *testing.T, dir string) {
			ls := lines(read(t, newest(dir)))
			write(t, newest(dir), bytes.Join(ls[:len(ls)-2], nil))
		}, "lines at the end were removed"},
		{"newest file emptied", func(t *testing.T, dir string) { write(t, newest(dir), nil) }, "lines at the end were removed"},
		{"newest file overwritten", func(t *testing.T, dir string) { write(t, newest(dir), []byte("garbage")) }, "lines at the end were removed"},
		{"newest file removed", func(t *testing.T, dir string) { remove(t, newest(dir)) }, "lines at the end were removed"},
		{"all files removed", func(t *testing.T, dir string) {
			for i := 1; i <= 3; i++ {
				remove(t, filepath.Join(dir, fileName(i)))
			}
		}, "files were removed"},
		{"head file forged", func(t *testing.T, dir string) {
			l, err := LoadAnchor(filepath.Join(dir, headFile))
			if err != nil {
				t.Fatal(err)
			}
			l.Checkpoint.Sig[0] ^= 1
			write(t, filepath.Join(dir, headFile), l.encode())
		}, "forged"},
		{"head file unreadable", func(t *testing.T, dir string) { write(t, filepath.Join(dir, headFile), []byte("{}")) }, "cannot be read"},
		{"changed and chained anew", func(t *testing.T, dir string) {
			ls := lines(bytes.Replace(read(t, newest(dir)), []byte("host7"), []byte("host8"), 1))
			rechain(t, ls, 3)
			write(t, newest(dir), bytes.Join(ls, nil))
		}, "another chain"},
	} {
		for _, mode := range []Mode{Required, BestEffort} {
			t.Run(fmt.Sprintf("%s/%s", c.name, mode), func(t *testing.T) {
				to := copyOf(t, dir)
				c.do(t, to)
				evidence := map[string][]byte{}
				for i := 1; i <= 3; i++ {
					if b, err := os.ReadFile(filepath.Join(to, fileName(i))); err == nil {
						evidence[fileName(i)] = b
					}
				}
				conf := Config{Dir: to, Mode: mode, Server: testServer, Signer: key}
				l := open(t, conf)
				if mode == Required {
					for _, err := range []error{l.Ready(), l.Commit(t.Context(), testRecord(0))} {
						if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "audit repair") {
							t.Errorf("got %v, want %q and a remedy", err, c.says)
						}
					}
					if err := l.end(t); err == nil {
						t.Error("a record was lost at the end and Run said nothing")
					}
					if taken, err := Repair(t.Context(), to, "known"); taken || err != nil {
						t.Fatal(taken, err)
					}
					l = open(t, conf)
				}
				l.commit(t, 0, 4)
				if err := l.end(t); err != nil {
					t.Fatal(err)
				}
				for name, want := range evidence {
					if !bytes.Equal(read(t, filepath.Join(to, name)), want) {
						t.Errorf("%s was changed", name)
					}
				}
				if p := verify(t, VerifyConfig{Dir: to, Keys: keys, Partial: true}).Problem; p == nil {
					t.Error("the damage is not reported")
				}
				rep := verify(t, VerifyConfig{Dir: to, Keys: keys, Partial: true, Repaired: true})
				if rep.Problem != nil || len(rep.Damage) == 0 || rep.Uncovered != 0 {
					t.Errorf("got %+v (%v)", rep, rep.Problem)
				}
				// The next start finds nothing to repair.
				l = open(t, conf)
				l.commit(t, 4, 5)
			})
		}
	}
}

func TestStartRefuses(t *testing.T) {
	key, _ := newKey(t)
	other, pub := newKey(t)
	dir := smallLog(t, key, 1)
	for _, c := range []struct {
		name string
		c    Config
		says string
	}{
		{"another server", Config{Dir: dir, Mode: Required, Server: "spiffe://keys.example/keyserver/two", Signer: key}, `holds the log of server "` + testServer},
		{"another key", Config{Dir: dir, Mode: Required, Server: testServer, Signer: other}, "signed by audit key"},
		{"no mode", Config{Dir: dir, Server: testServer, Signer: key}, "mode"},
		{"no key", Config{Dir: dir, Mode: Required, Server: testServer}, "no audit key"},
		{"no server", Config{Dir: dir, Mode: Required, Signer: key}, "server identity"},
		{"a file", Config{Dir: filepath.Join(dir, fileName(1)), Mode: Required, Server: testServer, Signer: key}, "directory"},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(t.Context(), c.c)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	if _, err := Open(t.Context(), Config{Dir: dir, Mode: Required, Server: testServer, Signer: key}); !errors.Is(err, errLocked) {
		t.Errorf("second server: got %v, want %v", err, errLocked)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if taken, err := Repair(ctx, dir, "nothing is wrong"); taken || err == nil {
		t.Errorf("repair of a sound log: got %v, %v", taken, err)
	}
	if _, err := os.Stat(filepath.Join(dir, repairFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the request is still there: %v", err)
	}
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	// Consent is not kept for later.
	if _, err := Repair(t.Context(), dir, "too early"); err != nil {
		t.Fatal(err)
	}
	l = open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	if _, err := os.Stat(filepath.Join(dir, repairFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the request is still there after a start: %v", err)
	}
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	// A new key comes in with the operator's consent.
	if _, err := Repair(t.Context(), dir, "new audit key"); err != nil {
		t.Fatal(err)
	}
	l = open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: other})
	l.commit(t, 0, 3)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub, key.Public()}, Repaired: true})
	if rep.Problem != nil || rep.Covered != 6 || len(rep.Damage) != 1 {
		t.Errorf("got %+v (%v)", rep, rep.Problem)
	}
}

// commitForever is a server that is going to be killed. It writes the number of each record to standard output once it is acknowledged.
func commitForever(dir string) {
	key, err := FileSigner(filepath.Join(dir, "audit.key"))
	if err != nil {
		panic(err)
	}
	if os.Getenv("AUDIT_TEST_LIMIT") != "" {
		limitFiles(1 << 16)
	}
	l, err := Open(context.Background(), Config{Dir: filepath.Join(dir, "log"), Mode: Required, Server: testServer, Signer: key,
		Checkpoint: 5 * time.Millisecond, RotateSize: 100 << 10})
	if err != nil {
		panic(err)
	}
	go l.Run(context.Background())
	var mu sync.Mutex
	for w := range 8 {
		go func() {
			for i := 0; ; i++ {
				r := testRecord(i)
				r.RequestID = fmt.Sprintf("%d-%d", w, i)
				err := l.Commit(context.Background(), r)
				mu.Lock()
				if err != nil {
					fmt.Println("error", err)
					limitFiles(1 << 30)
				} else {
					fmt.Println(r.RequestID)
				}
				mu.Unlock()
				if err != nil {
					time.Sleep(50 * time.Millisecond)
				}
			}
		}()
	}
	select {}
}

// limitFiles bounds the size of files that this process writes, in place of a full disk.
func limitFiles(n uint64) {
	signal.Ignore(syscall.SIGXFSZ)
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &l); err != nil {
		panic(err)
	}
	l.Cur = n
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &l); err != nil {
		panic(err)
	}
}

// killed runs commitForever and kills it when enough says so of its output, which is returned.
func killed(t *testing.T, dir string, enough func(out []byte) bool, env ...string) []string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(append(os.Environ(), "AUDIT_TEST_CHILD="+dir), env...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var all []byte
	buf := make([]byte, 64<<10)
	for !enough(all) {
		n, err := out.Read(buf)
		all = append(all, buf[:n]...)
		if err != nil {
			t.Fatalf("the child ended: %v", err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(out)
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	all = append(all, rest...)
	all = all[:bytes.LastIndexByte(all, '\n')+1]
	return strings.Split(strings.TrimSpace(string(all)), "\n")
}

// checkKept checks that each acknowledged record is in a log that verifies, and no record twice.
func checkKept(t *testing.T, dir string, pub crypto.PublicKey, acknowledged []string) {
	t.Helper()
	in := map[string]int{}
	v, err := Source{Dir: dir}.walk(t.Context(), func(l *Line, _ []byte) error {
		if l.Kind == KindOp {
			in[l.Op.RequestID]++
		}
		return nil
	})
	if err != nil || v.rep.Problem != nil {
		t.Fatal(err, v.rep.Problem)
	}
	for _, id := range acknowledged {
		if in[id] != 1 {
			t.Fatalf("record %s was acknowledged and is there %d times", id, in[id])
		}
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil {
		t.Fatal(rep.Problem)
	}
	t.Logf("%d records acknowledged, %d there, %d covered, %d files", len(acknowledged), rep.Records, rep.Covered, rep.Files)
}

func TestKilledServerLosesNothing(t *testing.T) {
	for round := range 3 {
		dir := t.TempDir()
		writeKey(t, filepath.Join(dir, "audit.key"))
		key, err := FileSigner(filepath.Join(dir, "audit.key"))
		if err != nil {
			t.Fatal(err)
		}
		acknowledged := killed(t, dir, func(out []byte) bool { return bytes.Count(out, []byte{'\n'}) >= 300*(round+1) })
		log := filepath.Join(dir, "log")
		// The next server recovers what is torn; then everything must fit.
		l := open(t, Config{Dir: log, Mode: Required, Server: testServer, Signer: key})
		if err := l.Ready(); err != nil {
			t.Fatal(err)
		}
		l.commit(t, 0, 1)
		if err := l.end(t); err != nil {
			t.Fatal(err)
		}
		checkKept(t, log, key.Public(), acknowledged)
	}
}

// A real file system refuses in the middle of a line, and takes more later.
func TestRealFileLimit(t *testing.T) {
	dir := t.TempDir()
	writeKey(t, filepath.Join(dir, "audit.key"))
	key, err := FileSigner(filepath.Join(dir, "audit.key"))
	if err != nil {
		t.Fatal(err)
	}
	out := killed(t, dir, func(out []byte) bool {
		at := bytes.LastIndex(out, []byte("error"))
		return at >= 0 && bytes.Count(out[at:], []byte{'\n'}) > 200 && bytes.Contains(out, []byte("file too large"))
	}, "AUDIT_TEST_LIMIT=1")
	var acknowledged []string
	for _, line := range out {
		if !strings.HasPrefix(line, "error") {
			acknowledged = append(acknowledged, line)
		}
	}
	log := filepath.Join(dir, "log")
	l := open(t, Config{Dir: log, Mode: Required, Server: testServer, Signer: key})
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	checkKept(t, log, key.Public(), acknowledged)
}
