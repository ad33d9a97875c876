package edge

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/keyhaven/keyhaven/state"
)

const (
	affinityKeyName = "edge/affinity-key"
	affinityKeySize = 32
)

// affinityKey returns the key of affinity cookies, which all edges of an installation share, and makes it if there is none.
// Two edges that do so at the same time end with the same key.
func affinityKey(ctx context.Context, store state.Store) ([]byte, error) {
	for range 4 {
		e, err := store.Get(ctx, affinityKeyName)
		switch {
		case err == nil && len(e.Value) == affinityKeySize:
			return e.Value, nil
		case err == nil:
			return nil, fmt.Errorf("read the key of affinity cookies: it has %d bytes, not %d; delete %s from the store", len(e.Value), affinityKeySize, affinityKeyName)
		case !errors.Is(err, state.ErrNotFound):
			return nil, fmt.Errorf("read the key of affinity cookies: %w", err)
		}
		key := make([]byte, affinityKeySize)
		_, _ = rand.Read(key) // never fails
		_, err = store.Txn(ctx, []state.Cond{{Key: affinityKeyName}}, []state.Op{state.Put(affinityKeyName, key)})
		if err == nil {
			return key, nil
		}
		if !errors.Is(err, state.ErrConflict) {
			return nil, fmt.Errorf("store the key of affinity cookies: %w", err)
		}
	}
	return nil, errors.New("store the key of affinity cookies: too many conflicts")
}
