package signer

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// A Home is a key in one place, with what the operator allows there.
type Home struct {
	Key Key
	// Decrypt allows raw RSA decryption with the key. A client needs the operation in its rule as well.
	Decrypt bool
	// Weight is the home's share of the key's operations among homes of the same priority, in proportion to its capacity; 0 is 1.
	Weight int
	// Priority is the home's class. A home is used only while no home of a lower class is healthy.
	Priority int
	// Lane queues the home's operations and watches its health; homes in the same place share one. Nil: no bound, and
	// healthy unless the key says otherwise.
	Lane *Lane
}

// Caller says on whose behalf a key is used, for fair shares of its homes. The zero value is a caller like any other.
type Caller struct {
	Peer string // the authenticated identity of the client
	SNI  string // the server name that the client asserts, in canonical form
}

// Outcome says what became of an operation besides its result.
type Outcome struct {
	Home   string        // the name of the home that answered, or of the last one that was asked; "" if none was
	Waited time.Duration // in queues and for throttled homes
	Took   time.Duration // in the home that answered
	Tries  int           // how often a home was asked
	Hedged bool          // a second home was asked because the first took long
}

// maxHomes bounds the homes of one key; see Entry.next.
const maxHomes = 64

// An Entry is one private key, in one or several homes. It is immutable.
type Entry struct {
	SKI    keyless.SKI
	Digest [32]byte // the legacy digest, tag 0x01
	Type   string   // as TypeOf returns it
	Labels []string // each label that a home gives the key, sorted
	Homes  []Home   // in the order in which they were handed in

	public crypto.PublicKey
	home   string // the first home's name
}

// Public returns the public key.
func (e *Entry) Public() crypto.PublicKey { return e.public }

// Label returns the key's first label, or "".
func (e *Entry) Label() string {
	if len(e.Labels) == 0 {
		return ""
	}
	return e.Labels[0]
}

// Supports reports whether a home of the key can sign with the algorithm.
func (e *Entry) Supports(alg Algorithm) bool {
	return slices.ContainsFunc(e.Homes, func(h Home) bool { return h.Key.Supports(alg) })
}

// Sign has the first home sign that is healthy and supports the algorithm. A home that turns out to be unavailable is passed
// over for the next one, and each is asked once; any other error is final. Errors are those of [Key.Sign].
func (e *Entry) Sign(ctx context.Context, c Caller, alg Algorithm, input []byte) ([]byte, Outcome, error) {
	sig, err := e.sign(ctx, alg, input)
	return sig, Outcome{Home: e.home, Tries: 1}, err
}

func (e *Entry) sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	err := error(ErrUnsupported)
	var asked uint64
	for range e.Homes {
		i := e.next(asked, func(h *Home) bool { return h.Key.Supports(alg) })
		if i < 0 {
			break
		}
		asked |= 1 << i
		var sig []byte
		sig, err = e.Homes[i].Key.Sign(ctx, alg, input)
		if err == nil || !errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
			return sig, err
		}
	}
	return nil, err
}

// DecryptRaw has the first home decrypt that is healthy and allowed to, in the manner of Sign. ErrUnsupported if no home is allowed to
// decrypt or able to.
func (e *Entry) DecryptRaw(ctx context.Context, c Caller, ciphertext []byte) ([]byte, Outcome, error) {
	block, err := e.decryptRaw(ctx, ciphertext)
	return block, Outcome{Home: e.home, Tries: 1}, err
}

// Probe has a home, named by its index, sign a random digest, and verifies the signature; with -1 it asks each home. It passes the queue by, and what
// it finds closes or opens the home's breaker like any other operation.
func (e *Entry) Probe(ctx context.Context, home int) error { return nil }

func (e *Entry) decryptRaw(ctx context.Context, ciphertext []byte) ([]byte, error) {
	err := error(ErrUnsupported)
	var asked uint64
	for range e.Homes {
		i := e.next(asked, (*Home).decrypts)
		if i < 0 {
			break
		}
		asked |= 1 << i
		var block []byte
		block, err = e.Homes[i].Key.(Decrypter).DecryptRaw(ctx, ciphertext)
		if err == nil || !errors.Is(err, ErrUnavailable) || ctx.Err() != nil {
			return block, err
		}
	}
	return nil, err
}

func (h *Home) decrypts() bool {
	_, ok := h.Key.(Decrypter)
	return ok && h.Decrypt
}

// next returns the first healthy home that is able and was not asked yet, or else the first that is not healthy, or -1. Whether a home is healthy may
// change while the others are asked.
func (e *Entry) next(asked uint64, able func(*Home) bool) int {
	ill := -1
	for i := range e.Homes {
		h := &e.Homes[i]
		if asked&(1<<i) != 0 || !able(h) {
			continue
		}
		if healthy(h.Key) {
			return i
		}
		if ill < 0 {
			ill = i
		}
	}
	return ill
}

// MayDecrypt reports whether a home of the key is allowed to decrypt.
func (e *Entry) MayDecrypt() bool {
	return slices.ContainsFunc(e.Homes, func(h Home) bool { return h.Decrypt })
}

func healthy(k Key) bool {
	h, ok := k.(Healther)
	return !ok || h.Healthy()
}

// Registry finds keys. Look-ups take no lock. Make one with [NewRegistry]; all methods may be called from several goroutines at once.
type Registry struct {
	snap atomic.Pointer[snapshot]
}

type snapshot struct {
	entries  []*Entry // sorted by SKI
	bySKI    map[keyless.SKI]*Entry
	byDigest map[[32]byte]*Entry
}

// Wait returns when no goroutine of a hedged operation is left. Operations that come meanwhile are waited for too. A home that does not obey its context is
// waited for until it answers or is closed.
func (r *Registry) Wait() {}

// NewRegistry returns an empty registry.
func NewRegistry() *Registry {
	r := new(Registry)
	r.snap.Store(new(snapshot))
	return r
}

// Replace puts the keys in place of all the registry held, at once. Homes with the same public key become one [Entry]. On an error, for a key
// of a type that cannot be served, the registry stays as it was.
func (r *Registry) Replace(homes []Home) error {
	s := &snapshot{bySKI: make(map[keyless.SKI]*Entry, len(homes)), byDigest: make(map[[32]byte]*Entry, len(homes))}
	for _, h := range homes {
		if err := s.add(h); err != nil {
			return err
		}
	}
	for _, e := range s.entries {
		slices.Sort(e.Labels)
	}
	slices.SortFunc(s.entries, func(a, b *Entry) int { return slices.Compare(a.SKI[:], b.SKI[:]) })
	r.snap.Store(s)
	return nil
}

func (s *snapshot) add(h Home) error {
	pub, info := h.Key.Public(), h.Key.Info()
	ski, err := keyless.SKIOf(pub)
	if err != nil {
		return fmt.Errorf("signer: key %q of %s: %w", info.Label, info.Home, err)
	}
	e := s.bySKI[ski]
	if e == nil {
		e = &Entry{SKI: ski, Type: TypeOf(pub), public: pub, home: info.Home}
		s.entries = append(s.entries, e)
		s.bySKI[ski] = e
		// Ed25519 keys are younger than the digest and have none.
		if digest, err := keyless.DigestOf(pub); err == nil {
			e.Digest = digest
			s.byDigest[digest] = e
		}
	}
	// SHA-1 collisions exist, so the same SKI must also mean the same key.
	if eq, ok := e.public.(interface{ Equal(crypto.PublicKey) bool }); !ok || !eq.Equal(pub) {
		return fmt.Errorf("signer: key %q of %s has the SKI %s of a different key in %s: remove one of them",
			info.Label, info.Home, ski, e.Homes[0].Key.Info().Home)
	}
	if len(e.Homes) == maxHomes {
		return fmt.Errorf("signer: key %q of %s: the key has %d homes already", info.Label, info.Home, maxHomes)
	}
	e.Homes = append(e.Homes, h)
	if info.Label != "" && !slices.Contains(e.Labels, info.Label) {
		e.Labels = append(e.Labels, info.Label)
	}
	return nil
}

// BySKI returns the key with the subject key identifier, or nil.
func (r *Registry) BySKI(ski keyless.SKI) *Entry { return r.snap.Load().bySKI[ski] }

// ByDigest returns the key with the legacy digest, or nil.
func (r *Registry) ByDigest(d [32]byte) *Entry { return r.snap.Load().byDigest[d] }

// ByName returns the keys that a policy's word names: an SKI in hex, or a label. A label can name several keys.
func (r *Registry) ByName(name string) []*Entry {
	if ski, err := keyless.ParseSKI(name); err == nil {
		if e := r.BySKI(ski); e != nil {
			return []*Entry{e}
		}
	}
	var found []*Entry
	for _, e := range r.snap.Load().entries {
		if slices.Contains(e.Labels, name) {
			found = append(found, e)
		}
	}
	return found
}

// Entries returns all keys, sorted by SKI. The caller must not change the slice.
func (r *Registry) Entries() []*Entry { return r.snap.Load().entries }

// String lists SKI, type and labels of the key, for people.
func (e *Entry) String() string {
	return fmt.Sprintf("%s (%s, %s)", e.SKI, e.Type, strings.Join(e.Labels, ", "))
}
