package edge

import (
	"bytes"
	"strings"
	"sync"
	"testing"

	"github.com/keyhaven/keyhaven/state"
)

// Edges that start at the same time end with one key, which a later one finds.
func TestAffinityKeyIsShared(t *testing.T) {
	store := newMemory(t)
	keys := make([][]byte, 4)
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			var err error
			if keys[i], err = affinityKey(t.Context(), store); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, k := range keys {
		if len(k) != affinityKeySize || !bytes.Equal(k, keys[0]) {
			t.Error("two edges have two keys")
		}
	}
	if bytes.Equal(keys[0], make([]byte, affinityKeySize)) {
		t.Error("the key is zero")
	}
	_, err := store.Txn(t.Context(), nil, []state.Op{state.Put(affinityKeyName, []byte("short"))})
	must(t, err)
	if _, err := affinityKey(t.Context(), store); err == nil || !strings.Contains(err.Error(), affinityKeyName) {
		t.Errorf("a broken key: %v", err)
	}
}
