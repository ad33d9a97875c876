package transit

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strconv"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/keyhaven/keyhaven/signer"
)

// signRequest is the body of a request to sign/NAME.
type signRequest struct {
	KeyVersion  int         `json:"key_version"`
	Input       []byte      `json:"input,omitempty"`
	Batch       []signInput `json:"batch_input,omitempty"`
	Prehashed   bool        `json:"prehashed"`
	Hash        string      `json:"hash_algorithm,omitempty"`
	Signature   string      `json:"signature_algorithm,omitempty"`
	Salt        string      `json:"salt_length,omitempty"`
	Marshalling string      `json:"marshaling_algorithm,omitempty"`
}

type signInput struct {
	Input []byte `json:"input"`
}

// signAnswer is the body of an answer of sign/NAME.
type signAnswer struct {
	Data *struct {
		Signature string       `json:"signature"`
		Batch     []signOutput `json:"batch_results"`
	} `json:"data"`
}

type signOutput struct {
	Signature string `json:"signature"`
	Error     string `json:"error"`
}

// decodeSingle returns the signature in the answer to a request without a batch.
func decodeSingle(body []byte, pub crypto.PublicKey, version int) ([]byte, error) {
	var a signAnswer
	if err := json.Unmarshal(body, &a); err != nil || a.Data == nil {
		return nil, errors.New("not an answer of a Transit engine")
	}
	return decodeSignature(a.Data.Signature, pub, version)
}

// decodeBatch returns the outputs in the answer to a batch of n, and false if the answer is not that of a server that knows
// batches.
func decodeBatch(body []byte, n int) ([]signOutput, bool) {
	var a signAnswer
	if err := json.Unmarshal(body, &a); err != nil || a.Data == nil || len(a.Data.Batch) != n {
		return nil, false
	}
	return a.Data.Batch, true
}

// decodeSignature reads the engine's form, vault:v3:BASE64, and checks that version and signature are of the kind asked for.
func decodeSignature(s string, pub crypto.PublicKey, version int) ([]byte, error) {
	rest, ok := strings.CutPrefix(s, "vault:v")
	number, encoded, ok2 := strings.Cut(rest, ":")
	if !ok || !ok2 {
		return nil, errors.New("the signature does not begin with vault:vN:")
	}
	if number != strconv.Itoa(version) {
		return nil, fmt.Errorf("signed by version %.20q of the key, asked for was %d", number, version)
	}
	sig, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil || strings.ContainsAny(encoded, "\r\n") {
		return nil, errors.New("the signature is not in base64")
	}
	if err := checkSignature(pub, sig); err != nil {
		return nil, err
	}
	return sig, nil
}

// checkSignature checks the form of a signature, not whether it is right: who asked for it does that.
func checkSignature(pub crypto.PublicKey, sig []byte) error {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if len(sig) != k.Size() {
			return fmt.Errorf("the signature has %d bytes, the key makes %d", len(sig), k.Size())
		}
	case ed25519.PublicKey:
		if len(sig) != ed25519.SignatureSize {
			return fmt.Errorf("the signature has %d bytes, Ed25519 makes %d", len(sig), ed25519.SignatureSize)
		}
	case *ecdsa.PublicKey:
		return checkECDSA(k, sig)
	}
	return nil
}

// checkECDSA checks that sig is an Ecdsa-Sig-Value (RFC 3279 section 2.2.3) with both integers in the group's range.
func checkECDSA(k *ecdsa.PublicKey, sig []byte) error {
	var inner cryptobyte.String
	r, s := new(big.Int), new(big.Int)
	in := cryptobyte.String(sig)
	if !in.ReadASN1(&inner, asn1.SEQUENCE) || !in.Empty() ||
		!inner.ReadASN1Integer(r) || !inner.ReadASN1Integer(s) || !inner.Empty() {
		return errors.New("the signature is not an ASN.1 sequence of two integers")
	}
	n := k.Curve.Params().N
	for _, v := range []*big.Int{r, s} {
		if v.Sign() <= 0 || v.Cmp(n) >= 0 {
			return errors.New("the signature is out of the curve's range")
		}
	}
	return nil
}

// verifies reports whether sig is the key's signature of input.
func verifies(pub crypto.PublicKey, alg signer.Algorithm, input, sig []byte) bool {
	switch k := pub.(type) {
	case *rsa.PublicKey:
		if alg.Kind == signer.PSS {
			return rsa.VerifyPSS(k, alg.Hash, input, sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) == nil
		}
		return rsa.VerifyPKCS1v15(k, alg.Hash, input, sig) == nil
	case *ecdsa.PublicKey:
		return ecdsa.VerifyASN1(k, input, sig)
	case ed25519.PublicKey:
		return ed25519.Verify(k, input, sig)
	}
	return false
}
