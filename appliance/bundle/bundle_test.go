package bundle

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"aead.dev/minisign"
	"github.com/klauspost/compress/zstd"
)

func newKey(t testing.TB) (minisign.PublicKey, minisign.PrivateKey) {
	t.Helper()
	pub, key, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return pub, key
}

func example() Manifest {
	return Manifest{
		Version: "0.6.0", Arch: "arm64", Boards: []string{"raspberrypi,4-model-b", "linux,dummy-virt"},
		Built: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), MinVersion: "0.4.0", Channel: "stable", Notes: "Faster.",
	}
}

// image is something like a slot: some of it random, some repeated, some empty.
func image(size int) []byte {
	b := make([]byte, size)
	x := uint32(1)
	for i := range b[:size/2] {
		x = x*1664525 + 1013904223
		b[i] = byte(x >> 24)
	}
	copy(b[size/2:size*3/4], b)
	return b
}

// made is a whole bundle of an image.
func made(t testing.TB, key minisign.PrivateKey, m Manifest, slot []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	if _, err := Write(&b, m, bytes.NewReader(slot), Signer(key, "test")); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// read opens a bundle and reads it to its end.
func read(b io.Reader, keys ...minisign.PublicKey) (Manifest, []byte, error) {
	r, err := Open(b, keys)
	if err != nil {
		return Manifest{}, nil, err
	}
	defer r.Close()
	slot, err := io.ReadAll(r)
	return r.Manifest(), slot, err
}

func TestRoundTrip(t *testing.T) {
	pub, key := newKey(t)
	old, _ := newKey(t)
	for _, size := range []int{512, 4096, 1 << 20, 3<<20 + 512} {
		slot := image(size)
		b := made(t, key, example(), slot)
		if again := made(t, key, example(), slot); !bytes.Equal(b, again) {
			t.Errorf("%d bytes: made twice, the bundles differ", size)
		}
		for _, r := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)), iotest.DataErrReader(bytes.NewReader(b))} {
			m, got, err := read(r, old, pub) // two keys, as during a roll-over
			if err != nil || !bytes.Equal(got, slot) {
				t.Fatalf("%d bytes: got %d bytes, %v", size, len(got), err)
			}
			if m.Version != "0.6.0" || m.Size != int64(size) || m.Product != Product || !m.Built.Equal(example().Built) {
				t.Errorf("got manifest %+v", m)
			}
		}
	}
}

// The file is what docs/updates.md says, byte for byte, and the signature is one that minisign checks.
func TestForm(t *testing.T) {
	pub, key := newKey(t)
	slot := image(4096)
	b := made(t, key, example(), slot)
	if string(b[:7]) != "KHUPD1\n" {
		t.Fatalf("got magic %q", b[:7])
	}
	n := binary.BigEndian.Uint32(b[7:])
	manifest := b[11 : 11+n]
	rest := b[11+n:]
	k := binary.BigEndian.Uint32(rest)
	sig, stream := rest[4:4+k], rest[4+k:]
	if !minisign.Verify(pub, append([]byte("KHUPD1\n"), manifest...), sig) {
		t.Error("minisign does not accept the signature")
	}
	sum := sha256.Sum256(slot)
	if want := `"sha256":"` + hex.EncodeToString(sum[:]) + `"`; !strings.Contains(string(manifest), want) {
		t.Errorf("manifest %s has no %s", manifest, want)
	}
	dec, err := zstd.NewReader(bytes.NewReader(stream))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	if got, err := io.ReadAll(dec); err != nil || !bytes.Equal(got, slot) {
		t.Errorf("the rest is not the slot by Zstandard: %v", err)
	}
}

// seal makes a bundle of any manifest text and any stream.
func seal(t testing.TB, key minisign.PrivateKey, manifest string, stream []byte) []byte {
	t.Helper()
	sig, err := Signer(key, "test")([]byte(Magic + manifest))
	if err != nil {
		t.Fatal(err)
	}
	b := append([]byte(Magic), binary.BigEndian.AppendUint32(nil, uint32(len(manifest)))...)
	b = append(b, manifest...)
	b = append(b, binary.BigEndian.AppendUint32(nil, uint32(len(sig)))...)
	b = append(b, sig...)
	return append(b, stream...)
}

func TestRefuses(t *testing.T) {
	pub, key := newKey(t)
	slot := image(64 << 10)
	good := made(t, key, example(), slot)
	head := bytes.Index(good, []byte{0x28, 0xb5, 0x2f, 0xfd}) // where the stream of Zstandard begins
	text := string(good[11 : 11+binary.BigEndian.Uint32(good[7:])])
	stream := good[head:]
	alter := func(at int, to byte) []byte {
		b := bytes.Clone(good)
		if b[at] == to {
			to++
		}
		b[at] = to
		return b
	}
	manifest := func(old, new string) []byte {
		if !strings.Contains(text, old) {
			t.Fatalf("manifest %s has no %s", text, old)
		}
		return seal(t, key, strings.Replace(text, old, new, 1), stream)
	}
	_, other := newKey(t)
	legacy := minisign.Sign(key, []byte(Magic+text)) // of the message, not of its hash
	unhashed := append([]byte(Magic), binary.BigEndian.AppendUint32(nil, uint32(len(text)))...)
	unhashed = append(append(unhashed, text...), binary.BigEndian.AppendUint32(nil, uint32(len(legacy)))...)
	unhashed = append(append(unhashed, legacy...), stream...)

	for name, c := range map[string]struct {
		b    []byte
		want error
		text string // of the error, with what to do
	}{
		"nothing":              {nil, ErrTruncated, "get it again"},
		"another file":         {[]byte("<html>404</html>"), ErrFormat, "ends in .update"},
		"signed by another":    {made(t, other, example(), slot), ErrKey, "where the image came from"},
		"signed without hash":  {unhashed, ErrSignature, "hashed"},
		"manifest altered":     {alter(20, 'a'), ErrSignature, "get it again"},
		"signature altered":    {alter(head-20, 'A'), ErrSignature, "changed after"}, // still of the alphabet of base64
		"signature unreadable": {alter(head-20, '!'), ErrSignature, "cannot be read; get it again"},
		"stream altered":       {alter(head+len(stream)/2, 0), ErrCorrupt, "get it again"},
		"cut in the head":      {good[:head/2], ErrTruncated, "get it again"},
		"cut in the stream":    {good[:len(good)-100], ErrTruncated, "bytes are missing"},
		"cut before the end":   {good[:len(good)-1], ErrTruncated, "get it again"},
		"stream missing":       {good[:head], ErrTruncated, "get it again"},
		"more after the end":   {append(bytes.Clone(good), "more"...), ErrCorrupt, "get it again"},
		"more in the slot":     {append(bytes.Clone(good), stream...), ErrTooLarge, "make it again"},
		"less in the slot":     {manifest(`"size":65536`, `"size":131072`), ErrTruncated, "bytes are missing"},
		"hash of another":      {manifest(`"sha256":"`, `"sha256":"`+strings.Repeat("0", 64)+`","x":"`), ErrCorrupt, "get it again"},
		"long manifest":        {[]byte(Magic + "\x00\x01\x00\x01"), ErrTooLarge, "get it again"},
		"no manifest":          {[]byte(Magic + "\x00\x00\x00\x00"), ErrFormat, "get it again"},
		"another product":      {manifest(Product, "toaster"), ErrProduct, "get the one for"},
		"format of the future": {manifest(`"format":1`, `"format":2`), ErrFormat, "in between"},
		"no version":           {manifest(`"0.6.0"`, `"newest"`), ErrFormat, "make it again"},
		"strange architecture": {manifest(`"arm64"`, `"vax"`), ErrFormat, "make it again"},
		"no boards":            {manifest(`["raspberrypi,4-model-b","linux,dummy-virt"]`, `[]`), ErrFormat, "make it again"},
		"board of a path":      {manifest(`"linux,dummy-virt"`, `"../x"`), ErrFormat, "make it again"},
		"time of nothing":      {manifest(`2026-01-02T03:04:05Z`, `0001-01-01T00:00:00Z`), ErrFormat, "make it again"},
		"negative size":        {manifest(`"size":65536`, `"size":-512`), ErrFormat, "make it again"},
		"half a sector":        {manifest(`"size":65536`, `"size":65535`), ErrFormat, "make it again"},
		"too large":            {manifest(`"size":65536`, `"size":1073742336`), ErrTooLarge, "smaller"},
		"sha256 in capitals":   {manifest(`"sha256":"`, `"sha256":"AB`), ErrFormat, "make it again"},
		"bad channel":          {manifest(`"stable"`, `"../x"`), ErrFormat, "make it again"},
		"bad min_version":      {manifest(`"0.4.0"`, `"4"`), ErrFormat, "make it again"},
		"not JSON":             {seal(t, key, "{", stream), ErrFormat, "make it again"},
		"endless frames":       {append(bytes.Clone(good), bytes.Repeat([]byte{0x50, 0x2a, 0x4d, 0x18, 0, 0, 0, 0}, 64<<10)...), ErrTooLarge, "make it again"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := read(bytes.NewReader(c.b), pub)
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("got %v, want %v with %q", err, c.want, c.text)
			}
		})
	}
	if _, _, err := read(bytes.NewReader(good)); !errors.Is(err, ErrKey) {
		t.Errorf("without keys: got %v", err)
	}
}

// An error of the connection is not taken for one of the bundle.
func TestSourceErrorsPass(t *testing.T) {
	pub, key := newKey(t)
	good := made(t, key, example(), image(64<<10))
	lost := errors.New("connection lost")
	for _, at := range []int{0, 9, 100, len(good) - 1000} {
		_, _, err := read(io.MultiReader(bytes.NewReader(good[:at]), iotest.ErrReader(lost)), pub)
		if !errors.Is(err, lost) {
			t.Errorf("cut at %d: got %v", at, err)
		}
	}
}

func TestFits(t *testing.T) {
	device := Device{Arch: "arm64", Boards: []string{"raspberrypi,4-model-b", "brcm,bcm2711"}, Version: "0.5.0", MaxSize: 1 << 20}
	for name, c := range map[string]struct {
		change func(*Manifest, *Device)
		force  bool
		want   error
	}{
		"newer":               {func(*Manifest, *Device) {}, false, nil},
		"the same":            {func(m *Manifest, _ *Device) { m.Version = "0.5.0" }, false, ErrOlder},
		"another build":       {func(m *Manifest, _ *Device) { m.Version = "0.5.0+other" }, false, ErrOlder},
		"older":               {func(m *Manifest, _ *Device) { m.Version = "0.4.9" }, false, ErrOlder},
		"older, forced":       {func(m *Manifest, _ *Device) { m.Version = "0.4.9" }, true, nil},
		"unknown runs":        {func(_ *Manifest, d *Device) { d.Version = "" }, false, nil},
		"other arch":          {func(m *Manifest, _ *Device) { m.Arch = "armhf" }, false, ErrArch},
		"other arch, forced":  {func(m *Manifest, _ *Device) { m.Arch = "armhf" }, true, ErrArch},
		"other board":         {func(m *Manifest, _ *Device) { m.Boards = []string{"raspberrypi,3-model-b"} }, false, ErrBoard},
		"other board, forced": {func(m *Manifest, _ *Device) { m.Boards = []string{"raspberrypi,3-model-b"} }, true, ErrBoard},
		"too large":           {func(m *Manifest, _ *Device) { m.Size = 2 << 20 }, true, ErrTooLarge},
		"from too old":        {func(m *Manifest, _ *Device) { m.MinVersion = "0.5.1" }, false, ErrTooOld},
		"from just enough":    {func(m *Manifest, _ *Device) { m.MinVersion = "0.5.0" }, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			m, d := example(), device
			m.Size = 1 << 20
			c.change(&m, &d)
			if err := m.Fits(d, c.force); !errors.Is(err, c.want) || (err == nil) != (c.want == nil) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
}

func TestCompare(t *testing.T) {
	// In the order that Semantic Versioning gives.
	sorted := []string{"", "nothing", "0.4.9", "0.5.0-dev.2+gabc", "0.5.0-dev.12", "0.5.0-dev.x", "0.5.0-rc.1", "0.5.0-rc.1.1", "0.5.0", "0.5.1", "0.10.0", "1.0.0"}
	for i, a := range sorted {
		for j, b := range sorted {
			want := 0
			switch {
			case i < 2 && j < 2:
			case i < j:
				want = -1
			case i > j:
				want = 1
			}
			if got := Compare(a, b); got != want {
				t.Errorf("Compare(%q, %q) = %d, want %d", a, b, got, want)
			}
		}
	}
	for _, bad := range []string{"1", "1.2", "1.2.3.4", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3-a..b", "v1.2.3", "1.2.3 ", "1.2.9999999999"} {
		if _, err := ParseVersion(bad); err == nil {
			t.Errorf("%q was taken for a version", bad)
		}
	}
}

func TestLoadKeys(t *testing.T) {
	pub, key := newKey(t)
	text, err := pub.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if _, err := LoadKeys(dir); err == nil {
		t.Error("a directory without keys was taken")
	}
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("a.pub", text)
	write("README", []byte("not a key"))
	keys, err := LoadKeys(dir)
	if err != nil || len(keys) != 1 || !keys[0].Equal(pub) {
		t.Errorf("got %v, %v", keys, err)
	}
	write("b.pub", []byte("rubbish"))
	if _, err := LoadKeys(dir); err == nil {
		t.Error("rubbish was taken for a key")
	}
	plain, err := key.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	write("plain.key", append(plain, '\n'))
	got, err := LoadPrivateKey(filepath.Join(dir, "plain.key"), func() (string, error) { return "", errors.New("asked for a password") })
	if err != nil || !got.Equal(key) {
		t.Errorf("got %v", err)
	}
}
