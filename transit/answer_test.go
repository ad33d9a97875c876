package transit

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

func der(t testing.TB, r, s *big.Int) string {
	t.Helper()
	b, err := asn1.Marshal(struct{ R, S *big.Int }{r, s})
	if err != nil {
		t.Fatal(err)
	}
	return base64.StdEncoding.EncodeToString(b)
}

func TestDecodeSignature(t *testing.T) {
	ec := &ecdsa.PublicKey{Curve: elliptic.P256()}
	n := ec.Curve.Params().N
	one, less := big.NewInt(1), new(big.Int).Sub(n, big.NewInt(1))
	ed := ed25519.PublicKey(make([]byte, 32))
	rsaKey := &rsa.PublicKey{N: new(big.Int).Lsh(one, 2047), E: 65537}
	bytesOf := func(n int) string { return base64.StdEncoding.EncodeToString(make([]byte, n)) }
	for name, test := range map[string]struct {
		text string
		pub  crypto.PublicKey
		err  string // "" for none
	}{
		"smallest":         {"vault:v3:" + der(t, one, one), ec, ""},
		"greatest":         {"vault:v3:" + der(t, less, less), ec, ""},
		"zero":             {"vault:v3:" + der(t, new(big.Int), one), ec, "range"},
		"order":            {"vault:v3:" + der(t, one, n), ec, "range"},
		"negative":         {"vault:v3:" + der(t, big.NewInt(-1), one), ec, "range"},
		"trailing":         {"vault:v3:" + base64.StdEncoding.EncodeToString([]byte{0x30, 6, 2, 1, 1, 2, 1, 1, 0}), ec, "ASN.1"},
		"inside":           {"vault:v3:" + base64.StdEncoding.EncodeToString([]byte{0x30, 7, 2, 1, 1, 2, 1, 1, 0}), ec, "ASN.1"},
		"long form":        {"vault:v3:" + base64.StdEncoding.EncodeToString([]byte{0x30, 0x81, 6, 2, 1, 1, 2, 1, 1}), ec, "ASN.1"},
		"padded integer":   {"vault:v3:" + base64.StdEncoding.EncodeToString([]byte{0x30, 7, 2, 2, 0, 1, 2, 1, 1}), ec, "ASN.1"},
		"other version":    {"vault:v4:" + der(t, one, one), ec, `version "4" of the key, asked for was 3`},
		"version, zero":    {"vault:v03:" + der(t, one, one), ec, "version"},
		"version, long":    {"vault:v" + strings.Repeat("9", 1000) + ":x", ec, "version"},
		"no prefix":        {der(t, one, one), ec, "vault:vN:"},
		"no colon":         {"vault:v3", ec, "vault:vN:"},
		"empty":            {"", ec, "vault:vN:"},
		"nothing":          {"vault:v3:", ec, "ASN.1"},
		"jws":              {"vault:v3:_-_-", ec, "base64"},
		"line end":         {"vault:v3:" + strings.Replace(der(t, one, one), "M", "M\n", 1), ec, "base64"},
		"loose base64":     {"vault:v3:MAYCAQECAQF=", ec, "base64"},
		"Ed25519":          {"vault:v3:" + bytesOf(64), ed, ""},
		"Ed25519, short":   {"vault:v3:" + bytesOf(63), ed, "63 bytes"},
		"RSA":              {"vault:v3:" + bytesOf(256), rsaKey, ""},
		"RSA, other size":  {"vault:v3:" + bytesOf(255), rsaKey, "255 bytes"},
		"RSA, other size2": {"vault:v3:" + bytesOf(512), rsaKey, "512 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			sig, err := decodeSignature(test.text, test.pub, 3)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("got %v, want %q", err, test.err)
			}
			if err != nil && (len(err.Error()) > 200 || sig != nil) {
				t.Errorf("got %x with an error of %d bytes", sig, len(err.Error()))
			}
		})
	}
}

func TestVerifies(t *testing.T) {
	digest := make([]byte, 32)
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	r, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		key  crypto.Signer
		pub  crypto.PublicKey
		alg  signer.Algorithm
		opts crypto.SignerOpts
	}{
		{ec, &ec.PublicKey, p256, crypto.SHA256},
		{ed, pub, signer.Algorithm{Kind: signer.Ed25519}, crypto.Hash(0)},
		{r, &r.PublicKey, signer.Algorithm{Kind: signer.PKCS1v15, Hash: crypto.SHA256}, crypto.SHA256},
		{r, &r.PublicKey, signer.Algorithm{Kind: signer.PSS, Hash: crypto.SHA256}, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash, Hash: crypto.SHA256}},
	} {
		sig, err := test.key.Sign(rand.Reader, digest, test.opts)
		if err != nil {
			t.Fatal(err)
		}
		if !verifies(test.pub, test.alg, digest, sig) {
			t.Errorf("%s: a right signature is wrong", test.alg)
		}
		if verifies(test.pub, test.alg, bytes.Repeat([]byte{1}, 32), sig) {
			t.Errorf("%s: a wrong signature is right", test.alg)
		}
	}
	auto, err := rsa.SignPSS(rand.Reader, r, crypto.SHA256, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto})
	if err != nil {
		t.Fatal(err)
	}
	if verifies(&r.PublicKey, signer.Algorithm{Kind: signer.PSS, Hash: crypto.SHA256}, digest, auto) {
		t.Error("the longest salt is right, which TLS does not allow")
	}
}

func TestRetryAfter(t *testing.T) {
	for v, want := range map[string]time.Duration{
		"": 0, "0": 0, "1": time.Second, " 2 ": 2 * time.Second, "3": maxRetryAfter, "99999999999999999999": 0, "-1": 0,
		"99999999999": maxRetryAfter, "Wed, 21 Oct 2015 07:28:00 GMT": 0,
	} {
		if got := retryAfter(v); got != want {
			t.Errorf("%q: got %v, want %v", v, got, want)
		}
	}
}

// The attacker is a server, or who stands in its place: its answers reach the decoders as they are.
func FuzzSignature(f *testing.F) {
	f.Add("vault:v3:"+der(f, big.NewInt(1), big.NewInt(2)), uint8(0))
	f.Add("vault:v3:"+base64.StdEncoding.EncodeToString(make([]byte, 64)), uint8(1))
	f.Add("vault:v3:"+base64.StdEncoding.EncodeToString(make([]byte, 256)), uint8(2))
	f.Add("vault:v3:", uint8(0))
	pubs := []crypto.PublicKey{
		&ecdsa.PublicKey{Curve: elliptic.P256()}, ed25519.PublicKey(make([]byte, 32)), &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), 2047), E: 65537},
	}
	f.Fuzz(func(t *testing.T, s string, kind uint8) {
		sig, err := decodeSignature(s, pubs[int(kind)%len(pubs)], 3)
		if err != nil {
			if sig != nil {
				t.Errorf("got %x and %v", sig, err)
			}
			return
		}
		if again := "vault:v3:" + base64.StdEncoding.EncodeToString(sig); again != s {
			t.Errorf("accepted %q, which is not the one form %q", s, again)
		}
	})
}

// The attacker is the same.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte(`{"data":{"batch_results":[{"signature":"vault:v1:AAAA"},{"error":"x"}]}}`))
	f.Add([]byte(`{"data":{"signature":"vault:v1:AAAA"},"errors":["x"]}`))
	f.Add([]byte(`{"data":{"type":"ed25519","latest_version":1,"exportable":false,"allow_plaintext_backup":false,"keys":{"1":{"public_key":"` +
		base64.StdEncoding.EncodeToString(make([]byte, 32)) + `"}}}}`))
	f.Add([]byte(`{"data":{"type":"aes256-gcm96","latest_version":2,"keys":{"1":1700000000,"2":null}}}`))
	b := &Backend{name: "fuzz", session: &session{known: secrets{"canary"}}}
	f.Fuzz(func(t *testing.T, body []byte) {
		if out, ok := decodeBatch(body, 2); ok && len(out) != 2 {
			t.Errorf("got %d results for 2", len(out))
		}
		for _, status := range []int{200, 307, 400, 403, 404, 429, 500} {
			err := b.refusal(&answer{status: status, body: body, location: string(body), retry: string(body)}, "fuzz", "hint")
			if len(err.Error()) > 1000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
		}
		d, err := decodeKey(body)
		if err != nil {
			return
		}
		k, err := b.admit(KeyConfig{Name: "web"}, d)
		if err != nil {
			return
		}
		if *d.Exportable || *d.Backup || d.Derived || signer.TypeOf(k.Public()) == "" {
			t.Errorf("admitted %s", body)
		}
		if _, err := json.Marshal(k.Info()); err != nil {
			t.Error(err)
		}
	})
}

func TestAdmitWantsWordOnExport(t *testing.T) {
	d, err := decodeKey([]byte(`{"data":{"type":"ed25519","latest_version":1,"keys":{"1":{"public_key":""}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	b := &Backend{name: "home"}
	if _, err := b.admit(KeyConfig{Name: "web"}, d); err == nil || !strings.Contains(err.Error(), "can leave it") {
		t.Errorf("got %v", err)
	}
	if _, err := decodeKey([]byte(`{"data":null}`)); err == nil {
		t.Error("nothing is a key")
	}
	if errors.Is(err, signer.ErrUnavailable) {
		t.Error("a key that is unfit is no outage")
	}
}
