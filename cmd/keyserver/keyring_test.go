package main

import (
	"context"
	"errors"
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
