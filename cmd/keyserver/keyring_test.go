package main

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// TestProbe has a module hang: askers give up at their deadlines, and one call alone is made.
func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int32
		release := make(chan struct{})
		p := new(probe)
		hang := func(context.Context) error {
			calls.Add(1)
			<-release
			return nil
		}
		for range 3 {
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if err := p.ask(ctx, hang); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v, want a deadline", err)
			}
			cancel()
		}
		if n := calls.Load(); n != 1 {
			t.Errorf("got %d calls into a module that hangs, want 1", n)
		}
		close(release)
		synctest.Wait()
		want := errors.New("gone")
		if err := p.ask(t.Context(), func(context.Context) error { return want }); err != want {
			t.Errorf("got %v, want %v", err, want)
		}
		if err := p.ask(t.Context(), func(context.Context) error { return nil }); err != nil {
			t.Errorf("got %v", err)
		}
	})
}

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
