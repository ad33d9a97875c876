package audit

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/sha256"
	_ "crypto/sha512" // for the hashes of crypto.SHA384 and crypto.SHA512
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Checkpoint is a signed statement of how the log was up to a line.
type Checkpoint struct {
	Log    ID
	Server string
	Covers uint64 // seq of the last line that is covered
	Head   Hash   // its chain
	Key    Hash   // id of the audit key
	Alg    string
	Sig    []byte
}

// maxLag is how many lines a checkpoint may come after the line it covers.
const maxLag = 1 << 19

const checkpointDomain = "keyhaven audit checkpoint v1\x00"

// message returns what is signed. t is the time of the checkpoint line.
func (c *Checkpoint) message(t time.Time) []byte {
	b := make([]byte, 0, len(checkpointDomain)+len(c.Server)+80)
	b = append(b, checkpointDomain...)
	b = append(b, c.Log[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(c.Server)))
	b = append(b, c.Server...)
	b = binary.BigEndian.AppendUint64(b, c.Covers)
	b = append(b, c.Head[:]...)
	return binary.BigEndian.AppendUint64(b, uint64(t.UnixNano()))
}

// KeyID returns the name of a public key: SHA-256 of its SubjectPublicKeyInfo.
func KeyID(pub crypto.PublicKey) (Hash, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Hash{}, fmt.Errorf("audit: public key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// algorithms are the ways to sign a checkpoint.
var algorithms = map[string]signer.Algorithm{
	"ed25519":        {Kind: signer.Ed25519},
	"ecdsa-sha256":   {Kind: signer.ECDSA, Hash: crypto.SHA256},
	"ecdsa-sha384":   {Kind: signer.ECDSA, Hash: crypto.SHA384},
	"ecdsa-sha512":   {Kind: signer.ECDSA, Hash: crypto.SHA512},
	"rsa-pss-sha256": {Kind: signer.PSS, Hash: crypto.SHA256},
}

// algorithmFor returns the way in which checkpoints are signed with a key.
func algorithmFor(pub crypto.PublicKey) (string, error) {
	switch k := pub.(type) {
	case ed25519.PublicKey:
		return "ed25519", nil
	case *rsa.PublicKey:
		return "rsa-pss-sha256", nil
	case *ecdsa.PublicKey:
		switch bits := k.Curve.Params().BitSize; {
		case bits <= 256:
			return "ecdsa-sha256", nil
		case bits <= 384:
			return "ecdsa-sha384", nil
		}
		return "ecdsa-sha512", nil
	}
	return "", fmt.Errorf("audit: checkpoints cannot be signed with a key of type %T; use Ed25519, ECDSA or RSA", pub)
}

// digest returns what goes into the signature algorithm for msg.
func digest(h crypto.Hash, msg []byte) []byte {
	if h == 0 {
		return msg
	}
	d := h.New()
	d.Write(msg)
	return d.Sum(nil)
}

var errSignature = errors.New("signature is wrong")

// verifySignature checks a signature by the named algorithm. The algorithm must be the key's own.
func verifySignature(pub crypto.PublicKey, alg string, msg, sig []byte) error {
	want, err := algorithmFor(pub)
	if err != nil {
		return err
	}
	if alg != want {
		return fmt.Errorf("signed by %q, but the key signs by %q", alg, want)
	}
	input := digest(algorithms[alg].Hash, msg)
	ok := false
	switch k := pub.(type) {
	case ed25519.PublicKey:
		ok = ed25519.Verify(k, msg, sig)
	case *ecdsa.PublicKey:
		ok = ecdsa.VerifyASN1(k, input, sig)
	case *rsa.PublicKey:
		ok = rsa.VerifyPSS(k, crypto.SHA256, input, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
	}
	if !ok {
		return errSignature
	}
	return nil
}

// keyring holds public keys by their ids.
type keyring map[Hash]crypto.PublicKey

func newKeyring(keys []crypto.PublicKey) (keyring, error) {
	ring := make(keyring, len(keys))
	for _, pub := range keys {
		id, err := KeyID(pub)
		if err != nil {
			return nil, err
		}
		ring[id] = pub
	}
	return ring, nil
}

var errUnknownKey = errors.New("signed by a key that was not given")

// check verifies the signature of a checkpoint line.
func (ring keyring) check(l *Line) error {
	pub, ok := ring[l.Checkpoint.Key]
	if !ok {
		return fmt.Errorf("%w: %s", errUnknownKey, l.Checkpoint.Key)
	}
	return verifySignature(pub, l.Checkpoint.Alg, l.Checkpoint.message(l.Time), l.Checkpoint.Sig)
}
