package signer

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

var (
	sealKeyA = strings.Repeat("a1", 32)
	sealKeyB = strings.Repeat("b2", 32)
)

func mustSealer(t testing.TB, lines ...string) *Sealer {
	t.Helper()
	s, err := NewSealer([]byte(strings.Join(lines, "\n")))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSealer(t *testing.T) {
	a := mustSealer(t, "# made by hand", sealKeyA, "")
	blob := []byte("a session")
	sealed, err := a.Seal(edgeOne, blob)
	if err != nil {
		t.Fatal(err)
	}
	if len(sealed) != len(blob)+sealOverhead || bytes.Contains(sealed, blob) {
		t.Errorf("got %d bytes, want %d without the blob", len(sealed), len(blob)+sealOverhead)
	}
	tests := []struct {
		name   string
		sealer *Sealer
		id     string
		sealed []byte
		ok     bool
	}{
		{"same key", a, edgeOne, sealed, true},
		{"rotated", mustSealer(t, sealKeyB, sealKeyA), edgeOne, sealed, true},
		{"other key", mustSealer(t, sealKeyB), edgeOne, sealed, false},
		{"other client", a, edgeTwo, sealed, false},
		{"short", a, edgeOne, sealed[:sealOverhead-1], false},
		{"empty", a, edgeOne, nil, false},
		{"longer", a, edgeOne, append(bytes.Clone(sealed), 0), false},
	}
	for i := range sealed {
		flipped := bytes.Clone(sealed)
		flipped[i] ^= 1
		tests = append(tests, struct {
			name   string
			sealer *Sealer
			id     string
			sealed []byte
			ok     bool
		}{fmt.Sprint("byte ", i), a, edgeOne, flipped, false})
	}
	for _, tt := range tests {
		got, err := tt.sealer.Unseal(tt.id, tt.sealed)
		if (err == nil) != tt.ok || tt.ok && !bytes.Equal(got, blob) {
			t.Errorf("%s: got %q, %v; want success %v", tt.name, got, err, tt.ok)
		}
	}
	again, err := a.Seal(edgeOne, blob)
	if err != nil || bytes.Equal(again, sealed) {
		t.Errorf("the same blob sealed twice gave the same bytes, or %v", err)
	}
	if _, err := a.Seal(edgeOne, make([]byte, maxSeal+1)); err == nil {
		t.Error("a blob above the limit was sealed")
	}
}

func TestSealKeyText(t *testing.T) {
	for name, text := range map[string]string{
		"empty": "", "comment": "# x\n\n", "short": sealKeyA[:62], "long": sealKeyA + "aa",
		"not hex": strings.Repeat("zz", 32), "zeros": strings.Repeat("0", 64), "second bad": sealKeyA + "\n" + sealKeyB[1:],
	} {
		s, err := NewSealer([]byte(text))
		if !errors.Is(err, ErrSealKey) || s != nil {
			t.Errorf("%s: got %v", name, err)
		}
		if text != "" && err != nil && (strings.Contains(err.Error(), "zzzz") || strings.Contains(err.Error(), "a1a1") || strings.Contains(err.Error(), "b2b2")) {
			t.Errorf("%s: the error quotes the key: %v", name, err)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v", mustSealer(t, sealKeyA), mustSealer(t, sealKeyA), mustSealer(t, sealKeyA)); strings.Contains(text, "161") || strings.Contains(text, "a1a1") {
		t.Errorf("a sealer prints its key: %s", text)
	}
}

func TestSealOverTheWire(t *testing.T) {
	s := NewService(ServiceConfig{Policy: mustPolicy(t, everything(edgeOne), ClientRule{ID: edgeTwo, Operations: []string{"ping"}}), Sealer: mustSealer(t, sealKeyA)})
	sealed, err := ask(t, s, keyless.Operation{Opcode: keyless.OpSeal, Payload: []byte("blob")})
	wantCode(t, err, 0)
	got, err := ask(t, s, keyless.Operation{Opcode: keyless.OpUnseal, Payload: sealed})
	wantCode(t, err, 0)
	if string(got) != "blob" {
		t.Errorf("got %q", got)
	}
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpUnseal, Payload: sealed[1:]})
	wantCode(t, err, keyless.CodeCrypto)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpSeal, Payload: make([]byte, maxSeal+1)})
	wantCode(t, err, keyless.CodeFormat)
	_, err = s.Handle(t.Context(), &keyless.Request{Operation: keyless.Operation{Opcode: keyless.OpSeal}, Peer: keyless.Peer{ID: edgeTwo}})
	wantCode(t, err, keyless.CodeBadOpcode)
	s.SetSealer(nil)
	_, err = ask(t, s, keyless.Operation{Opcode: keyless.OpUnseal, Payload: sealed})
	wantCode(t, err, keyless.CodeBadOpcode)
}

// FuzzUnseal is fed by clients with a certificate: whatever opens must be what was sealed.
func FuzzUnseal(f *testing.F) {
	s := mustSealer(f, sealKeyA)
	sealed, err := s.Seal(edgeOne, []byte("blob"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sealed)
	f.Add(sealed[:sealOverhead])
	f.Add([]byte{sealVersion})
	f.Fuzz(func(t *testing.T, b []byte) {
		// Each fuzzing process seals the blob under a nonce of its own, so more than one text opens.
		if got, err := s.Unseal(edgeOne, b); err == nil && string(got) != "blob" {
			t.Errorf("opened bytes that were not sealed here: %x", b)
		}
	})
}
