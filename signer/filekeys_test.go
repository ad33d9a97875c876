package signer

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func writeFile(t *testing.T, name string, mode os.FileMode, text []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, text, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func pkcs8(t *testing.T, key any) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

func selfSigned(t *testing.T, key crypto.Signer) []byte {
	t.Helper()
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func TestLoadFileKeys(t *testing.T) {
	ec, r := testKeys()["p256"].(*ecdsa.PrivateKey), testKeys()["rsa"].(*rsa.PrivateKey)
	sec1, err := x509.MarshalECPrivateKey(ec)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{
		"p256": pkcs8(t, ec), "rsa": pkcs8(t, r), "ed": pkcs8(t, testKeys()["ed"]), "p384": append(selfSigned(t, testKeys()["p384"]), pkcs8(t, testKeys()["p384"])...),
		"sec1":  append([]byte("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: sec1})...),
		"pkcs1": pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(r)}),
	}
	for name, text := range files {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			path := writeFile(t, "www."+name+".pem", 0o600, text)
			b, err := LoadFileKeys(slog.New(slog.NewTextHandler(&log, nil)), path)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(log.String(), "level=WARN") || !strings.Contains(log.String(), path) {
				t.Errorf("no warning about %s: %s", path, log.String())
			}
			keys, err := b.Keys(t.Context())
			if err != nil || len(keys) != 1 {
				t.Fatalf("got %d keys, %v", len(keys), err)
			}
			info := keys[0].Info()
			if info.Label != "www."+name || info.Home != "file:"+path || !info.Extractable || info.Type != TypeOf(keys[0].Public()) {
				t.Errorf("got %+v", info)
			}
			if (info.Certificate != nil) != (name == "p384") {
				t.Errorf("got certificate %v", info.Certificate)
			}
			if err := b.Check(t.Context()); err != nil {
				t.Error(err)
			}
			b.Close()
			if err := b.Check(t.Context()); !errors.Is(err, ErrUnavailable) {
				t.Errorf("after Close: got %v", err)
			}
			if _, err := keys[0].Sign(t.Context(), Algorithm{ECDSA, crypto.SHA256}, make([]byte, 32)); !errors.Is(err, ErrUnavailable) {
				t.Errorf("after Close: got %v", err)
			}
		})
	}
}

func TestLoadFileKeysRefuses(t *testing.T) {
	good := pkcs8(t, testKeys()["p256"])
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		mode os.FileMode
		text []byte
		want string
	}{
		{"readable by the group", 0o640, good, "chmod 600"},
		{"readable by all", 0o604, good, "chmod 600"},
		{"empty", 0o600, nil, "no private key"},
		{"certificate alone", 0o600, selfSigned(t, testKeys()["p256"]), "no private key"},
		{"two keys", 0o600, append(bytes.Clone(good), good...), "two private keys"},
		{"other certificate", 0o600, append(selfSigned(t, testKeys()["p384"]), good...), "another key"},
		{"P-224", 0o600, pkcs8(t, p224), "P-224"},
		{"encrypted", 0o600, pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte{1}}), "encrypted"},
		{"garbage", 0o600, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte{1}}), "PRIVATE KEY"},
		{"too large", 0o600, bytes.Repeat([]byte("x"), maxKeyFile+1), "larger"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, "k.pem", tt.mode, tt.text)
			b, err := LoadFileKeys(nil, path)
			if err == nil || b != nil || !strings.Contains(err.Error(), tt.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want an error with %q and the path", err, tt.want)
			}
		})
	}
	if _, err := LoadFileKeys(nil, filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if _, err := LoadFileKeys(nil, t.TempDir()); err == nil {
		t.Error("a directory was taken")
	}
}

func TestMemoryKeyRefuses(t *testing.T) {
	k := memoryKey(t, "p256")
	if _, err := k.Sign(t.Context(), Algorithm{PSS, crypto.SHA256}, make([]byte, 32)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("RSA with an EC key: got %v", err)
	}
	if _, err := k.Sign(t.Context(), Algorithm{ECDSA, crypto.SHA256}, make([]byte, 31)); err == nil {
		t.Error("a short digest was signed")
	}
	if _, err := k.(Decrypter).DecryptRaw(t.Context(), make([]byte, 256)); !errors.Is(err, ErrUnsupported) {
		t.Errorf("decryption with an EC key: got %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.Sign(gone, Algorithm{ECDSA, crypto.SHA256}, make([]byte, 32)); !errors.Is(err, context.Canceled) {
		t.Errorf("after the deadline: got %v", err)
	}
	r := memoryKey(t, "rsa").(Decrypter)
	if _, err := r.DecryptRaw(t.Context(), testKeys()["rsa"].(*rsa.PrivateKey).N.Bytes()); err == nil {
		t.Error("a ciphertext that is not below the modulus was taken")
	}
}

func TestDecryptRawIsTheInverse(t *testing.T) {
	priv := testKeys()["rsa"].(*rsa.PrivateKey)
	k := memoryKey(t, "rsa").(Decrypter)
	for range 20 {
		m, err := rand.Int(rand.Reader, priv.N)
		if err != nil {
			t.Fatal(err)
		}
		c := new(big.Int).Exp(m, big.NewInt(int64(priv.E)), priv.N)
		got, err := k.DecryptRaw(t.Context(), c.FillBytes(make([]byte, priv.Size())))
		if err != nil || new(big.Int).SetBytes(got).Cmp(m) != 0 || len(got) != priv.Size() {
			t.Fatalf("got %x, %v; want %x", got, err, m)
		}
	}
}

// FuzzKeyPEM is for files that an operator hands in; it must name a fault and not fall over.
func FuzzKeyPEM(f *testing.F) {
	der, err := x509.MarshalPKCS8PrivateKey(testKeys()["p256"])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}))
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, _, err := parseKeyPEM(text)
		if (key == nil) == (err == nil) {
			t.Errorf("got key %T and error %v", key, err)
		}
	})
}
