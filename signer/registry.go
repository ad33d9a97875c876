package signer

import (
	"crypto"
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

	name string // of the place, as the key has it
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

// maxHomes bounds the homes of one key; see Entry.do.
const maxHomes = 64

// An Entry is one private key, in one or several homes. It is immutable.
type Entry struct {
	SKI    keyless.SKI
	Digest [32]byte // the legacy digest, tag 0x01
	Type   string   // as TypeOf returns it
	Labels []string // each label that a home gives the key, sorted; what is not UTF-8 is replaced
	Homes  []Home   // in the order in which they were handed in

	public crypto.PublicKey
	class  keyClass

	flights *flights // the registry's
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
	snap    atomic.Pointer[snapshot]
	flights flights
}

type snapshot struct {
	entries  []*Entry // sorted by SKI
	bySKI    map[keyless.SKI]*Entry
	byDigest map[[32]byte]*Entry
}

// Wait returns when no goroutine of a hedged operation is left. Operations that come meanwhile are waited for too. A home that does not obey its context is
// waited for until it answers or is closed.
func (r *Registry) Wait() { r.flights.wait() }

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
		e.flights = &r.flights
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
		e = &Entry{SKI: ski, Type: TypeOf(pub), public: pub, class: classOf(pub)}
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
	h.name = valid(info.Home)
	e.Homes = append(e.Homes, h)
	if label := valid(info.Label); label != "" && !slices.Contains(e.Labels, label) {
		e.Labels = append(e.Labels, label)
	}
	return nil
}

// valid makes UTF-8 of what a token or an engine calls something. Metrics take no other text.
func valid(name string) string { return strings.ToValidUTF8(name, "\ufffd") }

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
