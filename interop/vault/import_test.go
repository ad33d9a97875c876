package vault

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"

	"github.com/google/tink/go/kwp/subtle"
)

// importKey brings a key of our own into the engine, as its documentation of "bring your own key" says: PKCS #8 wrapped by AES-KWP (RFC
// 5649) with a key that is encrypted by RSA-OAEP with SHA-256 to the engine.
func (l *lab) importKey(name, typ string, key *ecdsa.PrivateKey) {
	l.t.Helper()
	must := func(err error) {
		l.t.Helper()
		if err != nil {
			l.t.Fatal(err)
		}
	}
	wrapping, err := l.Do("wrapping_key", nil)
	must(err)
	block, _ := pem.Decode([]byte(wrapping["public_key"].(string)))
	pub, err := x509.ParsePKIXPublicKey(block.Bytes)
	must(err)
	ephemeral := make([]byte, 32)
	rand.Read(ephemeral)
	kwp, err := subtle.NewKWP(ephemeral)
	must(err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	wrapped, err := kwp.Wrap(der)
	must(err)
	encrypted, err := rsa.EncryptOAEP(sha256.New(), rand.Reader, pub.(*rsa.PublicKey), ephemeral, nil)
	must(err)
	_, err = l.Do("keys/"+name+"/import", map[string]any{
		"type": typ, "hash_function": "SHA256", "ciphertext": base64.StdEncoding.EncodeToString(append(encrypted, wrapped...)),
	})
	must(err)
}
