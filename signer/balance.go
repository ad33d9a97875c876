package signer

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"runtime/debug"
	"time"
)

// keyUse is what a key is used for.
type keyUse struct {
	alg     Algorithm // of a signature
	input   []byte
	decrypt bool
}

// able reports whether the home can do the operation, and is allowed to.
func (o *keyUse) able(h *Home) bool {
	if o.decrypt {
		_, ok := h.Key.(Decrypter)
		return ok && h.Decrypt
	}
	return h.Key.Supports(o.alg)
}

// do makes an error of a panic, so that no place in a lane is lost, and none of the goroutines of hedged operations takes the program with it.
func (o *keyUse) do(ctx context.Context, k Key) (result []byte, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &panicked{v, debug.Stack()}
		}
	}()
	if o.decrypt {
		return k.(Decrypter).DecryptRaw(ctx, o.input)
	}
	return k.Sign(ctx, o.alg, o.input)
}

// Sign has one of the key's homes sign that supports the algorithm: of those that are healthy, in the lowest class of priority, the one with the
// fewest operations in proportion to weight and capacity. A home that turns out to be unavailable is passed over for the next one at once, and each is
// asked once; one that throttles is asked again; any other error is final. If the home takes longer than usual, and its lane's budget allows, another is
// asked besides, and the first result wins. Sign does not keep input.
//
// Errors are those of [Key.Sign] and [Lane]; ErrUnavailable if the breakers of all homes are open.
func (e *Entry) Sign(ctx context.Context, c Caller, alg Algorithm, input []byte) ([]byte, Outcome, error) {
	return e.do(ctx, c, keyUse{alg: alg, input: input})
}

// DecryptRaw has a home decrypt that is allowed to, in the manner of Sign. ErrUnsupported if no home is allowed to decrypt or able to.
func (e *Entry) DecryptRaw(ctx context.Context, c Caller, ciphertext []byte) ([]byte, Outcome, error) {
	return e.do(ctx, c, keyUse{input: ciphertext, decrypt: true})
}

func (e *Entry) do(ctx context.Context, c Caller, o keyUse) ([]byte, Outcome, error) {
	var out Outcome
	if err := ctx.Err(); err != nil {
		return nil, out, fmt.Errorf("signer: no home was asked: %w", err)
	}
	var asked, lost uint64 // lost are homes that had no capacity, and failed when they had
	var err error
	for before := -1; ; {
		now := laneTime()
		home, patience, none := e.choose(&o, asked, lost, now)
		if home < 0 {
			if err == nil {
				err = none
			}
			return nil, out, err
		}
		if before >= 0 && before != home && patience == 0 {
			e.Homes[before].failedOver()
		}
		before = home
		asked |= 1 << home
		after, free := time.Duration(0), false
		if patience == 0 {
			after, free = e.hedgeAfter(&o, home, asked, now)
		}
		var result []byte
		if after > 0 {
			result, asked, err = e.race(ctx, c, o, home, asked, after, free, &out)
		} else {
			result, err = e.Homes[home].ask(ctx, c, &o, e.class, patience, &out)
		}
		switch {
		case err == nil || !movesOn(ctx, err):
			return result, out, err
		case after > 0:
		case errors.Is(err, errNoCapacity):
			asked &^= 1 << home // it was not
		case patience > 0:
			lost |= 1 << home
		}
	}
}

// choose returns the home to be asked, and for how long to wait for capacity in it before the others are looked at again; or -1 and the reason.
func (e *Entry) choose(o *keyUse, asked, lost uint64, now time.Duration) (home int, patience time.Duration, err error) {
	if home, _ = e.next(o, asked, now); home >= 0 {
		return home, 0, nil
	}
	home, left := e.waitFor(o, lost, now)
	if home < 0 {
		home, err = e.next(o, asked, now) // one may have come back meanwhile
		return home, 0, err
	}
	if len(e.Homes) == 1 {
		return home, left, nil
	}
	return home, min(left, lookAgain), nil
}

// lookAgain is how long an operation waits in a home without capacity before it looks for another one.
const lookAgain = 100 * time.Millisecond

// maxVoid is how long a home may be without capacity before operations without another home fail at once: time enough to replace a worker, and
// little enough for the client to ask another key server.
const maxVoid = time.Second

// movesOn reports whether an operation with that error is for another home.
func movesOn(ctx context.Context, err error) bool {
	return errors.Is(err, ErrUnavailable) && ctx.Err() == nil
}

// failedOver counts an operation that goes on to another home.
func (h *Home) failedOver() {
	if h.Lane != nil {
		h.Lane.failovers.Add(1)
	}
}

// next chooses among the homes that are able and were not asked yet. Homes whose key says that it is not healthy come last, since it may be wrong; those whose breaker
// is open are left out. Without any it returns -1 and the reason.
func (e *Entry) next(o *keyUse, asked uint64, now time.Duration) (int, error) {
	best, reason := -1, ErrUnsupported
	var chosen candidate
	for i := range e.Homes {
		h := &e.Homes[i]
		if asked&(1<<i) != 0 || !o.able(h) {
			continue
		}
		if h.Lane != nil && !h.Lane.ready(now) {
			if reason = errAllOpen; h.Lane.room.Load() == 0 {
				reason = errVoid
			}
			continue
		}
		x := h.candidate()
		switch {
		case best < 0, x.before(&chosen):
			best, chosen = i, x
		case !chosen.before(&x):
			// Equals are taken in proportion to what they can do.
			chosen.among += x.share
			if mathrand.Int64N(chosen.among) < x.share {
				x.among = chosen.among
				best, chosen = i, x
			}
		}
	}
	if best < 0 {
		return best, reason
	}
	return best, nil
}

// waitFor returns the home of the lowest class, not among those of the mask, that has no capacity now but may have some soon, and how long it may
// be waited for; or -1.
func (e *Entry) waitFor(o *keyUse, mask uint64, now time.Duration) (best int, left time.Duration) {
	best = -1
	for i := range e.Homes {
		h := &e.Homes[i]
		if mask&(1<<i) != 0 || h.Lane == nil || h.Lane.room.Load() != 0 || !o.able(h) {
			continue
		}
		l := maxVoid - (now - time.Duration(h.Lane.void.Load()))
		if l > 0 && (best < 0 || h.Priority < e.Homes[best].Priority) {
			best, left = i, l
		}
	}
	return best, left
}

// errVoid ends operations for which there is no home but such without capacity.
var errVoid = fmt.Errorf("signer: no home of the key takes operations: %w", ErrUnavailable)

// errAllOpen ends operations for which there is no home but such with open breakers.
var errAllOpen = fmt.Errorf("signer: the breaker of each home is open after failures: %w", ErrUnavailable)

// candidate is what the choice among homes goes by.
type candidate struct {
	ill      bool
	priority int
	load     int64 // operations
	share    int64 // capacity times weight
	among    int64 // the sum of the shares of all equals that were seen
}

func (h *Home) candidate() candidate {
	x := candidate{ill: !healthy(h.Key), priority: h.Priority, share: int64(min(max(h.Weight, 1), maxWeight))}
	if h.Lane != nil {
		x.load = h.Lane.load.Load()
		x.share *= min(max(h.Lane.room.Load(), 1), maxRoom)
	}
	x.among = x.share
	return x
}

// Bounds that keep the products of the comparison within 64 bits.
const (
	maxWeight = 1 << 16
	maxRoom   = 1 << 20
)

func (x *candidate) before(y *candidate) bool {
	switch {
	case x.ill != y.ill:
		return y.ill
	case x.priority != y.priority:
		return x.priority < y.priority
	}
	return x.load*y.share < y.load*x.share
}

// ask has the home do the operation, again and again within the deadline if it throttles.
func (h *Home) ask(ctx context.Context, c Caller, o *keyUse, class keyClass, patience time.Duration, out *Outcome) ([]byte, error) {
	out.Home = h.name
	for try := 0; ; try++ {
		result, err := h.once(ctx, c, o, class, patience, out)
		if err == nil || !errors.Is(err, ErrThrottled) {
			return result, err
		}
		began := laneTime()
		again := pauseThrottled(ctx, try)
		out.Waited += laneTime() - began
		if !again {
			return nil, fmt.Errorf("%w: %w", ErrDeadline, err)
		}
	}
}

// once has the home do the operation when there is a place.
func (h *Home) once(ctx context.Context, c Caller, o *keyUse, class keyClass, patience time.Duration, out *Outcome) ([]byte, error) {
	now := laneTime()
	if h.Lane == nil {
		out.Tries++
		result, err := o.do(ctx, h.Key)
		out.Took = laneTime() - now
		return result, err
	}
	p, err := h.Lane.acquire(ctx, c, class, patience, now)
	out.Waited += p.from - now
	if err != nil {
		return nil, err
	}
	out.Tries++
	result, err := o.do(ctx, h.Key)
	out.Took = h.Lane.release(ctx, &p, err)
	return result, err
}

// Probe has a home, named by its index, sign a random digest, and verifies the signature; with -1 it asks each home. It passes the queue by. What
// it finds counts for the home's breaker, and a success closes it. Nil means that all that were asked signed.
func (e *Entry) Probe(ctx context.Context, home int) error {
	if home >= len(e.Homes) {
		return fmt.Errorf("signer: home %d of key %s, which has %d: %w", home, e.SKI, len(e.Homes), ErrNotFound)
	}
	if home >= 0 {
		return e.Homes[home].probe(ctx, e.public)
	}
	var errs []error
	for i := range e.Homes {
		errs = append(errs, e.Homes[i].probe(ctx, e.public))
	}
	return errors.Join(errs...)
}

func (h *Home) probe(ctx context.Context, pub crypto.PublicKey) error {
	alg, ok := probeAlgorithm(h.Key)
	if !ok {
		return fmt.Errorf("signer: probe of %s: no algorithm works: %w", h.name, ErrUnsupported)
	}
	size := 32
	if alg.Hash != 0 {
		size = alg.Hash.Size()
	}
	digest := make([]byte, size)
	rand.Read(digest)
	began := laneTime()
	sig, err := (&keyUse{alg: alg, input: digest}).do(ctx, h.Key)
	if err == nil && !verifies(pub, alg, digest, sig) {
		err = fmt.Errorf("the signature is wrong: %w", ErrUnavailable)
	}
	if l := h.Lane; l != nil {
		l.observe(ctx, classOf(pub), laneTime()-began, err)
	}
	if err != nil {
		return fmt.Errorf("signer: probe of %s: %w", h.name, err)
	}
	return nil
}

// probeAlgorithm returns the first algorithm that the key supports.
func probeAlgorithm(k Key) (Algorithm, bool) {
	for _, alg := range [...]Algorithm{
		{ECDSA, crypto.SHA256}, {ECDSA, crypto.SHA384}, {ECDSA, crypto.SHA512}, {Ed25519, 0},
		{PSS, crypto.SHA256}, {PKCS1v15, crypto.SHA256}, {PSS, crypto.SHA384}, {PKCS1v15, crypto.SHA384},
	} {
		if k.Supports(alg) {
			return alg, true
		}
	}
	return Algorithm{}, false
}

func verifies(pub crypto.PublicKey, alg Algorithm, input, sig []byte) bool {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, input, sig)
	case ed25519.PublicKey:
		return ed25519.Verify(k, input, sig)
	case *rsa.PublicKey:
		if alg.Kind == PSS {
			return rsa.VerifyPSS(k, alg.Hash, input, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, alg.Hash, input, sig) == nil
	}
	return false
}
