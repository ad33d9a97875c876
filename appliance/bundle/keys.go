package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"aead.dev/minisign"
)

// maxKeys bounds the keys of a device. A roll-over needs two.
const maxKeys = 16

// LoadKeys reads the public keys, in minisign's form, from the files of dir whose names end in .pub. While keys are rolled
// over there are several. No key, or a file that holds none, is an error: a device never goes without its check.
func LoadKeys(dir string) ([]minisign.PublicKey, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.pub"))
	if err != nil {
		return nil, fmt.Errorf("update keys: %w", err)
	}
	if len(files) == 0 || len(files) > maxKeys {
		return nil, fmt.Errorf("update keys: %s has %d files that end in .pub, 1 to %d are needed; write a card anew with an image that has them", dir, len(files), maxKeys)
	}
	var keys []minisign.PublicKey
	for _, f := range files {
		key, err := LoadKey(f)
		if err != nil {
			return nil, err
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// LoadKey reads one public key in minisign's form.
func LoadKey(file string) (minisign.PublicKey, error) {
	key, err := minisign.PublicKeyFromFile(file)
	if err != nil {
		return key, fmt.Errorf("update key %s: %w", file, err)
	}
	return key, nil
}

// LoadPrivateKey reads a secret key in minisign's form, encrypted by password unless the file is not encrypted.
func LoadPrivateKey(file string, password func() (string, error)) (minisign.PrivateKey, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return minisign.PrivateKey{}, err
	}
	var key minisign.PrivateKey
	text = bytes.TrimSpace(text)
	if !minisign.IsEncrypted(text) {
		if err := key.UnmarshalText(text); err != nil {
			return key, fmt.Errorf("secret key %s: %w; make one with minisign -G", file, err)
		}
		return key, nil
	}
	pass, err := password()
	if err != nil {
		return key, err
	}
	if key, err = minisign.DecryptKey(pass, text); err != nil {
		return key, fmt.Errorf("secret key %s: %w; is the password right?", file, err)
	}
	return key, nil
}

// Signer returns a function that signs with key, as [Write] and [WriteIndex] want it. It takes no time and no chance: the
// same message gives the same signature. Comment, one line, is signed too.
func Signer(key minisign.PrivateKey, comment string) func([]byte) ([]byte, error) {
	return func(message []byte) ([]byte, error) {
		if strings.ContainsAny(comment, "\r\n") {
			return nil, errors.New("the comment has more than one line")
		}
		r := minisign.NewReader(bytes.NewReader(message))
		if _, err := io.Copy(io.Discard, r); err != nil {
			return nil, err
		}
		return r.SignWithComments(key, comment, "signature of a Keyhaven update"), nil
	}
}

// verify checks that one of keys made sig of message, which it signs by its hash.
func verify(keys []minisign.PublicKey, message, sig []byte) error {
	if len(keys) == 0 {
		return fmt.Errorf("%w: this device has none; write a card anew with an image that has them", ErrKey)
	}
	var s minisign.Signature
	if err := s.UnmarshalText(sig); err != nil {
		return fmt.Errorf("%w: it cannot be read; get it again", ErrSignature)
	}
	if s.Algorithm != minisign.HashEdDSA {
		return fmt.Errorf("%w: it is not of a hashed message; sign with a current minisign", ErrSignature)
	}
	known := false
	for _, key := range keys {
		if key.ID() != s.KeyID {
			continue
		}
		known = true
		if minisign.Verify(key, message, sig) {
			return nil
		}
	}
	if !known {
		return fmt.Errorf("%w: it is signed by %016X, known here are %s; get it from where the image came from", ErrKey, s.KeyID, ids(keys))
	}
	return fmt.Errorf("%w: the update was changed after %016X signed it; get it again", ErrSignature, s.KeyID)
}

func ids(keys []minisign.PublicKey) string {
	var b []string
	for _, k := range keys {
		b = append(b, fmt.Sprintf("%016X", k.ID()))
	}
	return strings.Join(b, ", ")
}
