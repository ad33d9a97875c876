package signer

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
)

// Sealer seals opaque blobs, such as session tickets, with AES-256-GCM under keys that only this server holds. A blob is bound to
// the identity that had it sealed. The zero value is not usable; see [NewSealer]. Methods may be called from several goroutines at once.
//
// The layout of a sealed blob is: version 1 (1 byte), key id (4 bytes, the head of the SHA-256 of the key), nonce (12 bytes, random), ciphertext and
// tag. One key seals at most 2^32 blobs safely (NIST SP 800-38D section 8.3), so rotate it in time: put a new key in front, and take the old one
// out when the last blob under it is worthless.
type Sealer struct {
	keys []sealKey // the first seals, all unseal
}

type sealKey struct {
	id   [4]byte
	aead cipher.AEAD
}

const (
	sealVersion  = 1
	sealHeader   = 1 + 4
	sealNonce    = 12
	sealOverhead = sealHeader + sealNonce + 16
	// maxSeal keeps a sealed blob inside one packet.
	maxSeal = 60 << 10
)

// ErrSealKey means that a text is no seal key.
var ErrSealKey = errors.New("signer: a seal key is 32 random bytes as 64 hex digits, one key on a line, the sealing key first")

// errUnseal says nothing about the cause, which would help a forger.
var errUnseal = errors.New("signer: blob was not sealed here for this client, or was changed")

// NewSealer reads seal keys: 64 hex digits on a line each. The first seals, every one unseals. Empty lines and lines that begin with # are
// skipped. The text is not kept; errors do not quote it.
func NewSealer(text []byte) (*Sealer, error) {
	s := new(Sealer)
	n := 0
	for line := range bytes.Lines(text) {
		n++
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		var key [32]byte
		if len(line) != hex.EncodedLen(len(key)) {
			return nil, fmt.Errorf("line %d has %d characters: %w", n, len(line), ErrSealKey)
		}
		if _, err := hex.Decode(key[:], line); err != nil {
			return nil, fmt.Errorf("line %d has other characters: %w", n, ErrSealKey)
		}
		if key == ([32]byte{}) {
			return nil, fmt.Errorf("line %d is all zeros: %w", n, ErrSealKey)
		}
		block, err := aes.NewCipher(key[:])
		if err != nil {
			return nil, fmt.Errorf("signer: seal key: %w", err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return nil, fmt.Errorf("signer: seal key: %w", err)
		}
		sum := sha256.Sum256(key[:])
		s.keys = append(s.keys, sealKey{[4]byte(sum[:4]), aead})
	}
	if len(s.keys) == 0 {
		return nil, fmt.Errorf("no key in the text: %w", ErrSealKey)
	}
	return s, nil
}

// LoadSealer is [NewSealer] on a file that nobody but its owner may read.
func LoadSealer(path string) (*Sealer, error) {
	text, err := readSecret(path)
	if err != nil {
		return nil, fmt.Errorf("signer: seal key file %s: %w", path, err)
	}
	s, err := NewSealer(text)
	if err != nil {
		return nil, fmt.Errorf("signer: seal key file %s: %w", path, err)
	}
	return s, nil
}

// String and GoString keep the keys out of logs.
func (s *Sealer) String() string { return "signer.Sealer(redacted)" }

// GoString is as String.
func (s *Sealer) GoString() string { return s.String() }

// Seal returns blob sealed for the identity. The error means that blob is too large.
func (s *Sealer) Seal(id string, blob []byte) ([]byte, error) {
	if len(blob) > maxSeal {
		return nil, fmt.Errorf("signer: blob of %d bytes is above %d", len(blob), maxSeal)
	}
	k := s.keys[0]
	out := make([]byte, sealHeader+sealNonce, sealOverhead+len(blob))
	out[0] = sealVersion
	copy(out[1:], k.id[:])
	nonce := out[sealHeader:]
	if _, err := io.ReadFull(rand.Reader, nonce); err != nil {
		return nil, fmt.Errorf("signer: seal: %w", err)
	}
	return k.aead.Seal(out, nonce, blob, sealAAD(out[:sealHeader], id)), nil
}

// Unseal returns the blob that was sealed for the identity.
func (s *Sealer) Unseal(id string, sealed []byte) ([]byte, error) {
	if len(sealed) < sealOverhead || sealed[0] != sealVersion {
		return nil, errUnseal
	}
	head, nonce, ct := sealed[:sealHeader], sealed[sealHeader:sealHeader+sealNonce], sealed[sealHeader+sealNonce:]
	for _, k := range s.keys {
		if !bytes.Equal(k.id[:], head[1:]) {
			continue
		}
		blob, err := k.aead.Open(nil, nonce, ct, sealAAD(head, id))
		if err == nil {
			return blob, nil
		}
	}
	return nil, errUnseal
}

func sealAAD(head []byte, id string) []byte {
	return append(append(make([]byte, 0, len(head)+len(id)), head...), id...)
}
