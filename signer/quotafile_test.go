package signer

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// counted returns quotas of which n of a budget of ten were used at that time.
func counted(t testing.TB, at string, n int) (*Quotas, *clock) {
	t.Helper()
	q, c := new(Quotas), newClock(at)
	p := policyOn(t, Options{Clock: c.Now, Quotas: q}, limited(func(r *ClientRule) { r.Daily = 10 }))
	spend(p, testRegistry(t, false).BySKI(skiOf(t, "p256")), n)
	return q, c
}

// left returns how much of a budget of ten is left with quotas that were loaded from the file.
func left(t testing.TB, path, at string) int {
	t.Helper()
	q := new(Quotas)
	if err := q.Load(path); err != nil {
		t.Fatal(err)
	}
	p := policyOn(t, Options{Clock: newClock(at).Now, Quotas: q}, limited(func(r *ClientRule) { r.Daily = 10 }))
	n, _ := spend(p, testRegistry(t, false).BySKI(skiOf(t, "p256")), 20)
	return n
}

func TestQuotaFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quotas.json")
	if got := left(t, path, "2026-11-23T12:00:00Z"); got != 10 {
		t.Errorf("without a file: %d left, want 10", got)
	}
	q, c := counted(t, "2026-11-23T12:00:00Z", 4)
	if err := q.Save(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("got mode %v, %v; want 0600", info.Mode(), err)
	}
	for at, want := range map[string]int{
		"2026-11-23T23:59:59Z": 6, "2026-11-24T00:00:00Z": 10, "2026-11-22T23:00:00Z": 6, "2020-01-01T00:00:00Z": 6,
	} {
		if got := left(t, path, at); got != want {
			t.Errorf("at %s: %d left, want %d", at, got, want)
		}
	}
	// What was counted meanwhile is not taken back by an older file.
	p := policyOn(t, Options{Clock: c.Now, Quotas: q}, limited(func(r *ClientRule) { r.Daily = 10 }))
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	spend(p, key, 3)
	if err := q.Load(path); err != nil {
		t.Fatal(err)
	}
	if got, _ := spend(p, key, 20); got != 3 {
		t.Errorf("after an older file: %d left, want 3", got)
	}
	// The days before yesterday are forgotten; a later day takes the place of an earlier one.
	c.add(5 * 24 * time.Hour)
	spend(policyOn(t, Options{Clock: c.Now, Quotas: q}, limited(func(r *ClientRule) { r.Daily = 7 })), key, 1)
	if f := q.snapshot(); len(f.Budgets) != 1 || f.Budgets[0] != (savedBudget{Client: edgeOne, Limit: "7/day", Day: "2026-11-28", Used: 1}) {
		t.Errorf("got %+v", f)
	}
	if names, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*tmp*")); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

// TestQuotaFileAfterAWrongClock has a client that came but once, when the clock was years ahead.
func TestQuotaFileAfterAWrongClock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quotas.json")
	q, c := counted(t, "2031-01-01T12:00:00Z", 1)
	c.add(-5 * 365 * 24 * time.Hour)
	other := limited(func(r *ClientRule) { r.Daily = 11 })
	p := policyOn(t, Options{Clock: c.Now, Quotas: q}, other)
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	spend(p, key, 5)
	if err := q.Save(path); err != nil {
		t.Fatal(err)
	}
	again := new(Quotas)
	if err := again.Load(path); err != nil {
		t.Fatal(err)
	}
	if n, _ := spend(policyOn(t, Options{Clock: c.Now, Quotas: again}, other), key, 20); n != 6 {
		t.Errorf("after a restart %d are left of 11, want 6", n)
	}
}

func TestQuotaFileDamaged(t *testing.T) {
	q, _ := counted(t, "2026-11-23T12:00:00Z", 4)
	good, err := json.Marshal(q.snapshot())
	if err != nil {
		t.Fatal(err)
	}
	if saved, err := parseQuotas(good); err != nil || len(saved) != 1 {
		t.Fatalf("got %v, %v", saved, err)
	}
	edit := func(old, new string) string {
		if !strings.Contains(string(good), old) {
			t.Fatalf("no %q in %s", old, good)
		}
		return strings.Replace(string(good), old, new, 1)
	}
	for name, content := range map[string]string{
		"empty":          "",
		"cut off":        string(good[:len(good)/2]),
		"zeros":          string(make([]byte, 100)),
		"something else": "hello",
		"null":           "null",
		"more behind":    string(good) + "{}",
		"later version":  edit(`"version":1`, `"version":2`),
		"unknown field":  edit(`"version":1`, `"version":1,"x":1`),
		"negative":       edit(`"used":4`, `"used":-4`),
		"too large":      edit(`"used":4`, `"used":99999999999999999999`),
		"no day":         edit("2026-11-23", "2026-11-31"),
		"no client":      edit(edgeOne, ""),
		"twice":          edit(`}]`, `},`+string(good[bytes.IndexByte(good, '[')+1:len(good)-2])+`]`),
		"huge":           strings.Repeat(" ", maxQuotaFile+1),
	} {
		path := filepath.Join(t.TempDir(), "quotas.json")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		fresh := new(Quotas)
		err := fresh.Load(path)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "move it away") || len(fresh.budgets) != 0 {
			t.Errorf("%s: got error %v and %d budgets", name, err, len(fresh.budgets))
		}
	}
	if err := new(Quotas).Load(t.TempDir()); err == nil || strings.Contains(err.Error(), "damaged") {
		t.Errorf("a directory: got %v", err)
	}
}

func TestQuotaFileOfOthers(t *testing.T) {
	q, _ := counted(t, "2026-11-23T12:00:00Z", 4)
	path := filepath.Join(t.TempDir(), "quotas.json")
	if err := q.Save(path); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o640: true, 0o660: false, 0o602: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if err := new(Quotas).Load(path); (err == nil) != ok || err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("mode %v: got %v", mode, err)
		}
	}
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := new(Quotas).Load(pipe); err == nil || !strings.Contains(err.Error(), "regular") {
		t.Errorf("a pipe: got %v", err)
	}
	if _, err := LoadSealer(pipe); err == nil {
		t.Error("a pipe holds a seal key")
	}
}

// TestQuotaFileOutlivesFailure holds the file to be whole when a new one cannot be written.
func TestQuotaFileOutlivesFailure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "quotas.json")
	q, _ := counted(t, "2026-11-23T12:00:00Z", 4)
	if err := q.Save(filepath.Join(path, "missing", "x")); err == nil || !q.dirty() {
		t.Errorf("got %v, and nothing to save", err)
	}
	// A directory in the file's place: the last step fails.
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := q.Save(path); err == nil {
		t.Error("a directory was replaced")
	}
	if names, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

// A sharedBuffer is a log that is read while it is written.
type sharedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *sharedBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *sharedBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestQuotaRun(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "state", "quotas.json")
	var log sharedBuffer
	key := testRegistry(t, false).BySKI(skiOf(t, "p256"))
	synctest.Test(t, func(t *testing.T) {
		q, c := new(Quotas), newClock("2026-11-23T12:00:00Z")
		p := policyOn(t, Options{Clock: c.Now, Quotas: q}, limited(func(r *ClientRule) { r.Daily = 10 }))
		ctx, end := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- q.Run(ctx, path, 0, slog.New(slog.NewTextHandler(&log, nil))) }()
		spend(p, key, 1)
		time.Sleep(3 * saveEvery) // the directory is missing
		synctest.Wait()
		if n := strings.Count(log.String(), "not saved"); n != 1 {
			t.Errorf("told %d times of the failure, want once: %s", n, &log)
		}
		if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(saveEvery + time.Second)
		synctest.Wait()
		if !strings.Contains(log.String(), "saved again") {
			t.Errorf("not told of the success: %s", &log)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * saveEvery) // with nothing counted nothing is written
		synctest.Wait()
		if _, err := os.Stat(path); err == nil {
			t.Error("written without need")
		}
		spend(p, key, 1)
		end()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	if got := left(t, path, "2026-11-23T13:00:00Z"); got != 8 {
		t.Errorf("%d left, want 8", got)
	}
}

// FuzzQuotaFile is a damaged disk: what is read must be what is written again.
func FuzzQuotaFile(f *testing.F) {
	q, _ := counted(f, "2026-11-23T12:00:00Z", 4)
	good, err := json.Marshal(q.snapshot())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:50])
	f.Add([]byte(`{"version":1,"budgets":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		saved, err := parseQuotas(data)
		if err != nil {
			return
		}
		q := new(Quotas)
		for k, b := range saved {
			if b.used < 0 || k.client == "" {
				t.Errorf("got %+v of %+v", b, k)
			}
			*counter(&q.budgets, k) = b
		}
		for _, s := range q.snapshot().Budgets {
			if b, ok := saved[quotaKey{s.Client, s.Limit, s.Nth}]; !ok || b.used != s.Used {
				t.Errorf("%+v is written as %+v", b, s)
			}
		}
	})
}
