package signer

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

func TestRegistryFinds(t *testing.T) {
	r := testRegistry(t, false)
	for label, key := range testKeys() {
		e := r.BySKI(skiOf(t, label))
		if e == nil || e.Label() != label || e.Type != TypeOf(key.Public()) {
			t.Errorf("%s: got %v by SKI", label, e)
			continue
		}
		digest, err := keyless.DigestOf(key.Public())
		if got := r.ByDigest(digest); err == nil && got != e {
			t.Errorf("%s: got %v by digest, want %v", label, got, e)
		}
		for _, name := range []string{label, e.SKI.String()} {
			if got := r.ByName(name); len(got) != 1 || got[0] != e {
				t.Errorf("%s: got %v by name %s", label, got, name)
			}
		}
	}
	if r.BySKI(keyless.SKI{1}) != nil || r.ByDigest([32]byte{}) != nil || r.ByName("nobody") != nil {
		t.Error("found a key that is not there")
	}
}

func TestRegistryReplaceIsAllOrNothing(t *testing.T) {
	r := testRegistry(t, false)
	before := r.Entries()
	if err := r.Replace([]Home{{Key: memoryKey(t, "rsa")}, {Key: badKey{}}}); err == nil {
		t.Fatal("a key of an impossible type was taken")
	}
	if !slices.Equal(r.Entries(), before) {
		t.Error("a failed Replace changed the registry")
	}
	if err := r.Replace(nil); err != nil || len(r.Entries()) != 0 {
		t.Errorf("got %v and %d keys, want an empty registry", err, len(r.Entries()))
	}
}

type badKey struct{ Key }

func (badKey) Public() crypto.PublicKey { return "no key" }
func (badKey) Info() KeyInfo            { return KeyInfo{Label: "bad"} }

func TestSeveralHomes(t *testing.T) {
	digest := make([]byte, 32)
	alg := Algorithm{ECDSA, crypto.SHA256}
	away := fmt.Errorf("token: %w", ErrUnavailable)
	tests := []struct {
		name         string
		one, two     faultyKey
		calls1       int
		calls2       int
		wantErr      error
		cancelBefore bool
	}{
		{name: "first class is healthy", one: faultyKey{healthy: true}, two: faultyKey{healthy: true}, calls1: 1},
		{name: "first is not healthy", one: faultyKey{}, two: faultyKey{healthy: true}, calls2: 1},
		{name: "first turns out away", one: faultyKey{healthy: true, err: away}, two: faultyKey{healthy: true}, calls1: 1, calls2: 1},
		{name: "first refuses", one: faultyKey{healthy: true, err: errors.New("no")}, two: faultyKey{healthy: true}, calls1: 1, wantErr: errAny},
		{name: "both away", one: faultyKey{healthy: true, err: away}, two: faultyKey{err: away}, calls1: 1, calls2: 1, wantErr: ErrUnavailable},
		{name: "none healthy, one works", one: faultyKey{err: away}, two: faultyKey{}, calls1: 1, calls2: 1},
		{name: "out of time", one: faultyKey{healthy: true, err: away}, two: faultyKey{healthy: true}, wantErr: context.Canceled, cancelBefore: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			one, two := tt.one, tt.two
			one.Key, one.home, two.Key, two.home = memoryKey(t, "p256"), "one", memoryKey(t, "p256"), "two"
			r := NewRegistry()
			if err := r.Replace([]Home{{Key: &one}, {Key: &two, Priority: 1}}); err != nil {
				t.Fatal(err)
			}
			if len(r.Entries()) != 1 || len(r.Entries()[0].Homes) != 2 {
				t.Fatalf("got %v, want one key with two homes", r.Entries())
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tt.cancelBefore {
				cancel()
			}
			_, _, err := r.Entries()[0].Sign(ctx, Caller{}, alg, digest)
			if (err == nil) != (tt.wantErr == nil) || tt.wantErr != nil && tt.wantErr != errAny && !errors.Is(err, tt.wantErr) {
				t.Errorf("got error %v, want %v", err, tt.wantErr)
			}
			if one.calls != tt.calls1 || two.calls != tt.calls2 {
				t.Errorf("got %d and %d calls, want %d and %d", one.calls, two.calls, tt.calls1, tt.calls2)
			}
		})
	}
}

var errAny = errors.New("any error")

// TestAilingHomeIsAskedOnce has a home turn ill by failing, as tokens do.
func TestAilingHomeIsAskedOnce(t *testing.T) {
	one := &turningKey{faultyKey{Key: memoryKey(t, "p256"), home: "one", healthy: true, err: ErrUnavailable}}
	two := &turningKey{faultyKey{Key: memoryKey(t, "p256"), home: "two", healthy: true, err: ErrUnavailable}}
	r := NewRegistry()
	if err := r.Replace([]Home{{Key: one}, {Key: two}}); err != nil {
		t.Fatal(err)
	}
	_, _, err := r.Entries()[0].Sign(t.Context(), Caller{}, Algorithm{ECDSA, crypto.SHA256}, make([]byte, 32))
	if !errors.Is(err, ErrUnavailable) || one.calls != 1 || two.calls != 1 {
		t.Errorf("got %d and %d calls and %v, want one each", one.calls, two.calls, err)
	}
}

// turningKey is not healthy any more once it has failed.
type turningKey struct{ faultyKey }

func (k *turningKey) Sign(ctx context.Context, alg Algorithm, input []byte) ([]byte, error) {
	sig, err := k.faultyKey.Sign(ctx, alg, input)
	k.healthy = err == nil
	return sig, err
}

func TestDecryptOnlyWhereAllowed(t *testing.T) {
	one, two := &faultyKey{Key: memoryKey(t, "rsa"), healthy: true}, &faultyKey{Key: memoryKey(t, "rsa"), healthy: true}
	r := NewRegistry()
	if err := r.Replace([]Home{{Key: one}, {Key: two, Decrypt: true}}); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.Entries()[0].DecryptRaw(t.Context(), Caller{}, make([]byte, 256)); err != nil {
		t.Fatal(err)
	}
	if one.calls != 0 || two.calls != 1 {
		t.Errorf("got %d and %d calls, want the home that allows it alone", one.calls, two.calls)
	}
}
