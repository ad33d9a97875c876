package etcd

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/etcdtest"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/statetest"
)

func TestCachedConformance(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	statetest.Run(t, statetest.Engine{Open: func(t testing.TB, dir string) state.Store {
		s, err := Open(Config{Endpoints: etcdtest.URLs(ms), Prefix: dir, Cache: filepath.Join(dir, "cache")})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}})
}

// A store with a cache answers and refuses while the cluster is away, opens without it, and goes on when it is back.
func TestStartWithoutCluster(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	cfg := Config{Endpoints: etcdtest.URLs(ms), Timeout: 300 * time.Millisecond, Cache: filepath.Join(t.TempDir(), "cache")}
	ctx := t.Context()
	s := mustOpen(t, cfg)
	rev, err := state.Create(ctx, s, "x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if c := s.(*cached); c.holds("x") {
			break
		}
	}
	ms[0].Kill()
	if e, err := s.Get(ctx, "x"); err != nil || string(e.Value) != "1" || e.Revision != rev {
		t.Errorf("while the cluster is away: %+v, %v", e, err)
	}
	if _, err := s.Txn(ctx, nil, []state.Op{state.Put("y", nil)}); !errors.Is(err, state.ErrUnavailable) {
		t.Errorf("a change: %v, want ErrUnavailable", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(cfg.Cache)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the cache: %v, %v, want mode 0600", info, err)
	}

	var log bytes.Buffer
	cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
	again := mustOpen(t, cfg)
	cfg.Logger = nil
	if want := "written=" + info.ModTime().UTC().Format(time.RFC3339); !strings.Contains(log.String(), want) {
		t.Errorf("the log does not say %q, how old the state is: %s", want, log.String())
	}
	entries, at, err := again.List(ctx, "")
	if err != nil || len(entries) != 1 || entries[0].Key != "x" || at < rev {
		t.Errorf("started from the cache: %v at %d, %v", entries, at, err)
	}
	if _, err := again.Get(ctx, "nothing"); !errors.Is(err, state.ErrNotFound) {
		t.Errorf("what the cache has not: %v, want ErrNotFound", err)
	}
	if _, err := again.Txn(ctx, nil, []state.Op{state.Put("y", nil)}); !errors.Is(err, state.ErrUnavailable) {
		t.Errorf("a change: %v, want ErrUnavailable", err)
	}
	events, err := again.Watch(ctx, "", at)
	if err != nil {
		t.Fatal(err)
	}
	ms[0].Restart()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if _, err = again.Txn(ctx, nil, []state.Op{state.Put("y", nil)}); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not back after %v: %v", patience, err)
		}
	}
	select {
	case ev := <-events:
		if ev.Key != "y" {
			t.Errorf("the watch says %+v, want y", ev)
		}
	case <-time.After(patience):
		t.Error("the watch says nothing")
	}

	if err := again.Close(); err != nil { // which writes the file
		t.Fatal(err)
	}
	ms[0].Kill()
	if err := os.WriteFile(cfg.Cache, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); !errors.Is(err, state.ErrUnavailable) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("neither cluster nor cache: %v", err)
	}
	if err := os.Chmod(cfg.Cache, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(cfg); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a cache that is open to others: %v", err)
	}
}

// What is written just before a store is closed is in the cache.
func TestCacheHasTheLastChange(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	cfg := Config{Endpoints: etcdtest.URLs(ms), Timeout: 5 * time.Second, Cache: filepath.Join(t.TempDir(), "cache")}
	const rounds = 10
	for i := range rounds {
		s := mustOpen(t, cfg)
		if _, err := state.Create(t.Context(), s, strconv.Itoa(i), nil); err != nil {
			t.Fatal(err)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ms[0].Kill()
	cfg.Timeout = 300 * time.Millisecond
	entries, _, err := mustOpen(t, cfg).List(t.Context(), "")
	if err != nil || len(entries) != rounds {
		t.Errorf("the cache has %v, %v; want %d", entries, err, rounds)
	}
}

func (c *cached) holds(key string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.copy != nil && c.copy.entries[key].Key == key
}

func sample() *snapshot {
	return &snapshot{rev: 9, entries: map[string]state.Entry{"a": {Key: "a", Value: []byte("1"), Revision: 3}, "b/c": {Key: "b/c", Value: []byte{}, Revision: 9}}}
}

func TestCacheFormat(t *testing.T) {
	b := sample().encode("/p/")
	got, err := decodeSnapshot(b, "/p/")
	if err != nil || got.rev != 9 || len(got.entries) != 2 || string(got.entries["a"].Value) != "1" || got.entries["b/c"].Revision != 9 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if _, err := decodeSnapshot(b, "/q/"); err == nil || !strings.Contains(err.Error(), "/p/") {
		t.Errorf("another installation's cache: %v", err)
	}
	for i := range b {
		c := bytes.Clone(b)
		c[i] ^= 1
		if _, err := decodeSnapshot(c, "/p/"); err == nil {
			t.Fatalf("a change at byte %d goes unseen", i)
		}
		if _, err := decodeSnapshot(b[:i], "/p/"); err == nil {
			t.Fatalf("a cut at byte %d goes unseen", i)
		}
	}
}

// seal gives body the sum that it needs; a whole file loses its own first.
func seal(body []byte) []byte {
	if len(body) >= sha256.Size {
		body = body[:len(body)-sha256.Size]
	}
	sum := sha256.Sum256(body)
	return append(bytes.Clone(body), sum[:]...)
}

func FuzzSnapshot(f *testing.F) {
	f.Add(sample().encode("/p/"))
	f.Add([]byte(cacheMagic))
	f.Fuzz(func(t *testing.T, body []byte) {
		// The checksum is made to fit, so that what is behind it is reached.
		s, err := decodeSnapshot(seal(body), "/p/")
		if err != nil {
			return
		}
		again, err := decodeSnapshot(s.encode("/p/"), "/p/")
		if err != nil || again.rev != s.rev || len(again.entries) != len(s.entries) {
			t.Errorf("%d entries at %d become %+v, %v", len(s.entries), s.rev, again, err)
		}
	})
}
