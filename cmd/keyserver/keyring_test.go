package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

func TestFinal(t *testing.T) {
	for err, want := range map[error]bool{
		pkcs11.ErrPINIncorrect: true, pkcs11.ErrPINLocked: true, pkcs11.ErrPINFinalTry: true, pkcs11.ErrAmbiguous: true, pkcs11.ErrModuleNotAllowed: true,
		pkcs11.ErrTokenNotFound: false, pkcs11.ErrDevice: false, context.DeadlineExceeded: false,
	} {
		if got := final(errors.Join(errors.New("open"), err)); got != want {
			t.Errorf("%v: got %v, want %v", err, got, want)
		}
	}
}

func TestNamesKey(t *testing.T) {
	info := signer.KeyInfo{SKI: keyless.SKI{0xab}, Label: "www"}
	for name, want := range map[string]bool{
		"www": true, "WWW": false, "*": false, "": false, "ab00000000000000000000000000000000000000": true, "AB00000000000000000000000000000000000000": true,
		"ac00000000000000000000000000000000000000": false,
	} {
		if got := namesKey([]string{name}, info); got != want {
			t.Errorf("%q: got %v, want %v", name, got, want)
		}
	}
	if namesKey(nil, signer.KeyInfo{}) {
		t.Error("an empty list names a key")
	}
	if namesKey([]string{""}, signer.KeyInfo{}) {
		t.Error("an empty name names a key without a label")
	}
}

// TestRetryGivenUp: whoever asks for a token to be tried and leaves does not make of a token that waits for its operator one that is tried by itself.
func TestRetryGivenUp(t *testing.T) {
	r := newKeyring(slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	s := &spec{kind: kindToken, name: "site", open: func(ctx context.Context, _ *slog.Logger) (signer.Backend, error) {
		cancel()
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	r.set([]*place{{spec: s, err: pkcs11.ErrPINIncorrect}})
	if err := r.retry(ctx, "site"); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that it was given up", err)
	}
	if p := r.present()[0]; p.away() || !errors.Is(p.err, pkcs11.ErrPINIncorrect) {
		t.Errorf("the token is %s: %v; want it to wait for its operator", p.state(), p.err)
	}
}
