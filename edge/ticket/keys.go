package ticket

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mrand "math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// storeKey is where the keys stand in the store.
const storeKey = "edge/ticket-keys"

const (
	secretSize  = 32
	recordSize  = idSize + 8 + secretSize
	maxRecords  = 64
	retryStore  = 2 * time.Second // after the store failed
	rewatchWait = time.Second     // after a watch ended
)

// Options governs the keys. Rotate and Generations must be positive.
type Options struct {
	Rotate      time.Duration // age at which a key gets a successor
	Generations int           // how many keys open tickets, the newest included; only the newest seals
	Logger      *slog.Logger  // nil discards
}

// Keys is the set of ticket keys of an installation. It is safe for concurrent use. Its text form shows no secret.
type Keys struct {
	store state.Store
	opts  Options
	log   *slog.Logger
	ring  atomic.Pointer[ring]
}

// String shows the number of keys.
func (k *Keys) String() string { return fmt.Sprintf("ticket.Keys(%d)", len(k.ring.Load().keys)) }

// GoString is String.
func (k *Keys) GoString() string { return k.String() }

type key struct {
	id      [idSize]byte
	created time.Time // whole seconds
	secret  [secretSize]byte
	aead    cipher.AEAD
}

// A ring holds keys, newest first. It is immutable.
type ring struct{ keys []*key }

func (r *ring) newest() *key {
	if len(r.keys) == 0 {
		return nil
	}
	return r.keys[0]
}

func (r *ring) find(id [idSize]byte) *key {
	for _, k := range r.keys {
		if k.id == id {
			return k
		}
	}
	return nil
}

// Open reads the keys from the store and makes the first one, or a successor, if that is due. Two edges that do so at the
// same time end with the same keys.
func Open(ctx context.Context, store state.Store, o Options) (*Keys, error) {
	if o.Rotate <= 0 || o.Generations <= 0 {
		return nil, errors.New("ticket: rotate and generations must be positive")
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	k := &Keys{store: store, opts: o, log: o.Logger}
	k.ring.Store(&ring{})
	if err := k.refresh(ctx); err != nil {
		return nil, err
	}
	return k, nil
}

// Run renews the keys when they are due and follows the changes of other edges, until ctx ends. While the store cannot be
// read or written the current keys stay in use.
func (k *Keys) Run(ctx context.Context) error {
	for failing := false; ctx.Err() == nil; {
		err := k.follow(ctx)
		if err != nil && ctx.Err() == nil {
			if !failing {
				k.log.Error("session ticket keys cannot be kept up to date; those at hand stay in use", "err", err)
			}
			failing = true
			sleep(ctx, retryStore)
			continue
		}
		failing = false
		sleep(ctx, rewatchWait)
	}
	return nil
}

// follow keeps the keys up to date until the watch ends, which is no error, or the store fails.
func (k *Keys) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	_, rev, err := k.store.List(ctx, storeKey)
	if err != nil {
		cancel()
		return fmt.Errorf("ticket: read the store: %w", err)
	}
	events, err := k.store.Watch(ctx, storeKey, rev)
	if err != nil {
		cancel()
		return fmt.Errorf("ticket: watch the store: %w", err)
	}
	defer func() {
		cancel()
		for range events { // until the watch has ended
		}
	}()
	for {
		if err := k.refresh(ctx); err != nil {
			return err
		}
		due := time.NewTimer(k.untilRotation(time.Now()))
		select {
		case <-ctx.Done():
			due.Stop()
			return nil
		case <-due.C:
		case ev, open := <-events:
			due.Stop()
			if !open || ev.Err != nil {
				return nil
			}
		}
	}
}

// untilRotation is when the newest key is due, with some spread so that many edges do not collide.
func (k *Keys) untilRotation(now time.Time) time.Duration {
	newest := k.ring.Load().newest()
	if newest == nil {
		return 0
	}
	left := newest.created.Add(k.opts.Rotate).Sub(now)
	return max(left, 0) + mrand.N(time.Second)
}

// refresh reads the keys, adds one if the newest is due, and puts them to use.
func (k *Keys) refresh(ctx context.Context) error {
	for range 16 { // each conflict means that another edge made progress
		r, rev, err := k.read(ctx)
		if err != nil {
			return err
		}
		now := time.Now()
		if n := r.newest(); n != nil && now.Sub(n.created) < k.opts.Rotate {
			k.ring.Store(r)
			return nil
		}
		next := k.successor(r, now)
		_, err = k.store.Txn(ctx, []state.Cond{{Key: storeKey, Revision: rev}}, []state.Op{state.Put(storeKey, next.encode())})
		if errors.Is(err, state.ErrConflict) {
			continue
		}
		if err != nil {
			return fmt.Errorf("ticket: store a new key: %w", err)
		}
		k.log.Info("session ticket key made", "generations", len(next.keys))
		k.ring.Store(next)
		return nil
	}
	return errors.New("ticket: too many conflicts in the store")
}

// read returns the keys in the store, and revision 0 if there are none.
func (k *Keys) read(ctx context.Context) (*ring, state.Revision, error) {
	e, err := k.store.Get(ctx, storeKey)
	if errors.Is(err, state.ErrNotFound) {
		return &ring{}, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("ticket: read keys: %w", err)
	}
	r, err := decode(e.Value)
	if err != nil {
		return nil, 0, err
	}
	return r.prune(k.opts, time.Now()), e.Revision, nil
}

// successor returns r with a new key in front.
func (k *Keys) successor(r *ring, now time.Time) *ring {
	n := &key{created: now.Truncate(time.Second)}
	rand.Read(n.id[:])
	rand.Read(n.secret[:])
	n.aead = newAEAD(n.secret)
	return (&ring{keys: append([]*key{n}, r.keys...)}).prune(k.opts, now)
}

// prune drops keys beyond the generations, by number and by age: an edge that was away for long starts afresh.
func (r *ring) prune(o Options, now time.Time) *ring {
	keys := r.keys[:min(len(r.keys), o.Generations)]
	for i, k := range keys {
		if now.Sub(k.created) >= o.Rotate*time.Duration(o.Generations) {
			keys = keys[:i]
			break
		}
	}
	return &ring{keys: keys}
}

// encode writes: version u8 = 1 | keys, each: id 16 | created u64, seconds since 1970 | secret 32. Newest first.
func (r *ring) encode() []byte {
	b := make([]byte, 0, 1+len(r.keys)*recordSize)
	b = append(b, version)
	for _, k := range r.keys {
		b = append(b, k.id[:]...)
		b = binary.BigEndian.AppendUint64(b, uint64(k.created.Unix()))
		b = append(b, k.secret[:]...)
	}
	return b
}

func decode(b []byte) (*ring, error) {
	if len(b) == 0 || b[0] != version || (len(b)-1)%recordSize != 0 || len(b) > 1+maxRecords*recordSize {
		return nil, fmt.Errorf("ticket: the record %q in the store is malformed; delete it to have new keys made", storeKey)
	}
	r := &ring{}
	for b = b[1:]; len(b) > 0; b = b[recordSize:] {
		k := &key{id: [idSize]byte(b), secret: [secretSize]byte(b[idSize+8:])}
		k.created = time.Unix(int64(binary.BigEndian.Uint64(b[idSize:])), 0)
		k.aead = newAEAD(k.secret)
		r.keys = append(r.keys, k)
	}
	return r, nil
}

func newAEAD(secret [secretSize]byte) cipher.AEAD {
	block, err := aes.NewCipher(secret[:])
	if err != nil {
		panic(err) // the size is fixed
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
