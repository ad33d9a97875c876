package ticket

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/etcdtest"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/etcd"
)

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if f() {
			return
		}
	}
	t.Fatalf("%s: still not so after %v", what, patience)
}

func (r *ring) ids() (ids [][idSize]byte) {
	for _, k := range r.keys {
		ids = append(ids, k.id)
	}
	return ids
}

func (k *Keys) same(o *Keys) bool { return slices.Equal(k.ring.Load().ids(), o.ring.Load().ids()) }

// Edges over one etcd begin with one key, follow the one that makes a new one, go on with what they have while etcd is
// away, and agree again when it is back.
func TestEdgesRotateTogether(t *testing.T) {
	members := etcdtest.Start(t, 1)
	open := func() state.Store {
		s, err := etcd.Open(etcd.Config{Endpoints: etcdtest.URLs(members), Timeout: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	o := Options{Rotate: 3 * time.Second, Generations: 8}
	stores := []state.Store{open(), open()}
	keys := make([]*Keys, 2)
	var opening sync.WaitGroup
	for i, s := range stores {
		opening.Go(func() {
			var err error
			if keys[i], err = Open(t.Context(), s, o); err != nil {
				t.Error(err)
			}
		})
	}
	opening.Wait()
	if t.Failed() {
		return
	}
	if !keys[0].same(keys[1]) {
		t.Errorf("two that open at once have %x and %x", keys[0].ring.Load().ids(), keys[1].ring.Load().ids())
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	for _, k := range keys {
		running.Go(func() { k.Run(ctx) }) //nolint:errcheck // never fails
	}
	defer running.Wait()
	defer cancel()
	generation := func(n int) {
		t.Helper()
		eventually(t, "both have the new key", func() bool { return len(keys[0].ring.Load().keys) >= n && keys[0].same(keys[1]) })
	}
	generation(2)
	members[0].Kill()
	before := keys[0].ring.Load().ids()
	time.Sleep(o.Rotate + 2*time.Second) // a successor is due
	for i, k := range keys {
		if got := k.ring.Load(); got.newest() == nil || !slices.Contains(got.ids(), before[0]) {
			t.Errorf("without etcd, edge %d has %x, want %x to stay", i, got.ids(), before[0])
		}
	}
	n := len(keys[0].ring.Load().keys)
	members[0].Restart()
	generation(n + 1)
}
