//lint:file-ignore SA1019 TLS 1.2 without ECDHE has no other padding

package gokeyless

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// peerKeys are the keys that the existing server serves: the token's, of which it takes RSA and ECDSA, and the files'.
var peerKeys = append([]string{"rsa", "p256"}, inFiles...)

func TestOurClientSigns(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	for _, label := range peerKeys {
		pub := s.keys[label]
		key := must(c.Key(pub, keyless.KeyOptions{Plain: true}))(t)
		for _, sig := range signaturesOf(pub) {
			t.Run(label+"/"+sig.String(), func(t *testing.T) {
				d := digest(sig.opts.HashFunc())
				got, err := key.Sign(rand.Reader, d, sig.opts)
				if err != nil {
					t.Fatal(err)
				}
				if err := verify(pub, d, got, sig.opts); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestOurClientHandshakes(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	for name, version := range versions {
		for _, label := range peerKeys {
			t.Run(name+"/"+label, func(t *testing.T) {
				key := must(c.Key(s.keys[label], keyless.KeyOptions{Plain: true}))(t)
				handshake(t, version, key.For(t.Context(), "visited.test", netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::1")))
			})
		}
	}
}

func TestOurClientDecrypts(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	pub := s.keys["file-rsa"].(*rsa.PublicKey)
	key := must(c.Key(pub, keyless.KeyOptions{Plain: true, AllowDecrypt: true}))(t)
	secret := random(48)
	opts := &rsa.PKCS1v15DecryptOptions{SessionKeyLen: len(secret)}
	sealed := must(rsa.EncryptPKCS1v15(rand.Reader, pub, secret))(t)
	if got := must(key.Decrypt(rand.Reader, sealed, opts))(t); !bytes.Equal(got, secret) {
		t.Error("got other bytes than were encrypted")
	}
	short := must(rsa.EncryptPKCS1v15(rand.Reader, pub, secret[:47]))(t)
	got, err := key.Decrypt(rand.Reader, short, opts)
	if err != nil || len(got) != len(secret) || bytes.HasPrefix(got, secret[:8]) {
		t.Errorf("a session key of a wrong length: got %d bytes and error %v, want %d random ones", len(got), err, len(secret))
	}
}

func TestOurClientPingsSealsAndCalls(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	call := func(op keyless.Operation) ([]byte, error) { return c.Do(t.Context(), &op) }
	for _, size := range []int{0, 1, 900, 1013, 4096, 60000} {
		data := random(size)
		if got, err := call(keyless.Operation{Opcode: keyless.OpPing, Payload: data}); err != nil || !bytes.Equal(got, data) {
			t.Errorf("ping of %d bytes: got %d bytes, error %v", size, len(got), err)
		}
	}
	blob := random(300)
	sealed := must(call(keyless.Operation{Opcode: keyless.OpSeal, Payload: blob}))(t)
	if got := must(call(keyless.Operation{Opcode: keyless.OpUnseal, Payload: sealed}))(t); !bytes.Equal(got, blob) {
		t.Error("unseal: got other bytes than were sealed")
	}
	if got := must(call(keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: "echo", Payload: blob}))(t); !bytes.Equal(got, blob) {
		t.Error("custom function: got other bytes than it should echo")
	}
}

func TestOurClientReadsErrors(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	ski := must(keyless.SKIOf(s.keys["p256"]))(t)
	for _, tc := range []struct {
		name string
		op   keyless.Operation
		want error
	}{
		{"unknown key", keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{1}, Payload: digest(crypto.SHA256)}, keyless.ErrKeyNotFound},
		{"no key", keyless.Operation{Opcode: keyless.OpECDSASignSHA256, Payload: digest(crypto.SHA256)}, keyless.ErrInternal},
		{"remote procedure call", keyless.Operation{Opcode: keyless.OpRPC, Payload: []byte{1}}, keyless.ErrInternal},
		{"unknown function", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: "none", Payload: []byte{1}}, keyless.ErrBadOpcode},
		{"our own function", keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, Payload: []byte{1}}, keyless.ErrBadOpcode},
		{"unknown opcode", keyless.Operation{Opcode: 0x77, Payload: []byte{1}}, keyless.ErrBadOpcode},
		{"response as a request", keyless.Operation{Opcode: keyless.OpResponse, Payload: []byte{1}}, keyless.ErrUnexpectedOpcode},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, err := c.Do(t.Context(), &tc.op); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestOurClientPipelines(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	pub := s.keys["file-p256"]
	key := must(c.Key(pub, keyless.KeyOptions{Plain: true}))(t)
	var wg sync.WaitGroup
	for range 1000 {
		wg.Go(func() {
			if _, err := key.Sign(rand.Reader, digest(crypto.SHA256), crypto.SHA256); err != nil { // verifies
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if st := c.Stats().Servers[0]; st.Dials != 1 {
		t.Errorf("%d connections were made, want all requests on one", st.Dials)
	}
}

// TestOurClientFindsBack lets the existing server close connections on which nothing happens.
func TestOurClientFindsBack(t *testing.T) {
	s := open(t)
	p := s.peer(t, "--idle", "200ms")
	c := s.client(t, p, "peer", "full", func(cfg *keyless.ClientConfig) { cfg.Heartbeat = 29 * time.Second })
	key := must(c.Key(s.keys["p256"], keyless.KeyOptions{Plain: true}))(t)
	for range 3 {
		must(key.Sign(rand.Reader, digest(crypto.SHA256), crypto.SHA256))(t)
		before := c.Stats().Servers[0].Dials
		eventually(t, func() error {
			if st := c.Stats().Servers[0]; st.Dials == before || st.Conns == 0 {
				return fmt.Errorf("%d connections were made and %d live; want a new one", st.Dials, st.Conns)
			}
			return nil
		})
	}
}

// TestOurClientGivesUpInTime takes a caller's deadline over the server's patience.
func TestOurClientGivesUpInTime(t *testing.T) {
	s := open(t)
	c := s.client(t, s.peer(t), "peer", "full", nil)
	must(c.Do(t.Context(), &keyless.Operation{Opcode: keyless.OpPing}))(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Do(ctx, &keyless.Operation{Opcode: keyless.OpPing}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
}

// TestSameAnswers asks both servers for the same deterministic signatures.
func TestSameAnswers(t *testing.T) {
	s := open(t)
	ours, theirs := s.client(t, s.ours(t, nil), "ours", "full", nil), s.client(t, s.peer(t), "peer", "full", nil)
	for _, label := range peerKeys {
		if label == "p256" || label == "file-p256" || label == "file-p384" {
			continue // ECDSA signatures are random
		}
		pub := s.keys[label]
		ski := must(keyless.SKIOf(pub))(t)
		for opcode := range keyless.OpPing {
			if sign := opcode.IsSign() && slices.ContainsFunc(deterministic, func(o keyless.Opcode) bool { return o == opcode }); !sign {
				continue
			}
			_, rsaKey := pub.(*rsa.PublicKey)
			if rsaKey == (opcode == keyless.OpEd25519Sign) {
				continue
			}
			op := keyless.Operation{Opcode: opcode, SKI: ski, Payload: digest(opcode.Hash())}
			a, b := must(ours.Do(t.Context(), &op))(t), must(theirs.Do(t.Context(), &op))(t)
			if !bytes.Equal(a, b) {
				t.Errorf("%s, %v: the servers answer with different signatures", label, opcode)
			}
		}
	}
}

var deterministic = []keyless.Opcode{
	keyless.OpRSASignMD5SHA1, keyless.OpRSASignSHA1, keyless.OpRSASignSHA224, keyless.OpRSASignSHA256, keyless.OpRSASignSHA384, keyless.OpRSASignSHA512, keyless.OpEd25519Sign,
}
