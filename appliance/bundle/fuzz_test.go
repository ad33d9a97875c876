package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"testing"

	"aead.dev/minisign"
)

func keysOf(k ...minisign.PublicKey) []minisign.PublicKey { return k }

// Whoever can change what a device downloads changes bytes of a bundle. What is taken nevertheless is what was signed.
func FuzzOpen(f *testing.F) {
	pub, key := newKey(f)
	slot := image(16 << 10)
	good := made(f, key, example(), slot)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(append(bytes.Clone(good), good...))
	f.Add([]byte(Magic))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Open(bytes.NewReader(b), keysOf(pub))
		if err != nil {
			return
		}
		defer r.Close()
		got, err := io.ReadAll(r)
		if int64(len(got)) > r.Manifest().Size {
			t.Errorf("%d bytes came out, the manifest says %d", len(got), r.Manifest().Size)
		}
		if err == nil && !bytes.Equal(got, slot) {
			t.Error("something else than what was signed was taken")
		}
	})
}

// A publisher's mistake is found: what is taken is valid and says the same when it is written again.
func FuzzManifest(f *testing.F) {
	m := example()
	sum := sha256.Sum256(nil)
	m.Format, m.Product, m.Size, m.SHA256 = Format, Product, 512, hex.EncodeToString(sum[:])
	b, err := json.Marshal(m)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseManifest(b)
		if err != nil {
			return
		}
		text, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		again, err := parseManifest(text)
		if err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if twice, err := json.Marshal(again); err != nil || !bytes.Equal(text, twice) {
			t.Errorf("got %s, then %s, %v", text, twice, err)
		}
	})
}

// Whoever can change what a device downloads changes bytes of an index.
func FuzzReadIndex(f *testing.F) {
	pub, key := newKey(f)
	var b bytes.Buffer
	if err := WriteIndex(&b, exampleIndex(), Signer(key, "")); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		x, err := ReadIndex(bytes.NewReader(b), keysOf(pub))
		if err == nil && (len(x.Releases) != 2 || x.Releases[0].Version != "0.6.0") {
			t.Errorf("got %+v, which was not signed", x)
		}
	})
}

// Versions are in one order, whatever they are.
func FuzzCompare(f *testing.F) {
	f.Add("0.5.0-dev.12+gabc", "0.5.0", "1.0.0-rc.1")
	f.Fuzz(func(t *testing.T, a, b, c string) {
		if Compare(a, b) != -Compare(b, a) {
			t.Errorf("%q and %q: %d and %d", a, b, Compare(a, b), Compare(b, a))
		}
		if Compare(a, b) <= 0 && Compare(b, c) <= 0 && Compare(a, c) > 0 {
			t.Errorf("%q ≤ %q ≤ %q, but not the first and the last", a, b, c)
		}
	})
}
