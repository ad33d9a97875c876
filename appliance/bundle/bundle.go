// Package bundle is the file form of an update of an appliance, and of the index by which an update source names its
// updates. Both carry a minisign signature, and neither is read before its signature was checked.
//
// A bundle is, in this order: the text [Magic]; the length of the manifest in four bytes, big-endian; the manifest in
// JSON; the length of the signature in four bytes; the signature, in minisign's form for hashed messages, of magic and
// manifest; and the image of a slot, compressed by Zstandard, which the manifest names by size and SHA-256.
package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"time"

	"aead.dev/minisign"
	"github.com/klauspost/compress/zstd"
)

const (
	// Magic begins each bundle.
	Magic = "KHUPD1\n"
	// Format is the version of the manifest that this package writes and reads.
	Format = 1
	// Product is what all bundles of this project are for.
	Product = "keyhaven-appliance"

	// MaxManifest, MaxSignature and MaxSlot bound the parts of a bundle, in bytes.
	MaxManifest  = 64 << 10
	MaxSignature = 4 << 10
	MaxSlot      = 1 << 30

	// window is how far the compression looks back: a Pi Zero has to hold it in memory.
	window = 1 << 20
)

// Faults of a bundle or an index, for errors.Is. The error's text says what to do.
var (
	ErrFormat    = errors.New("not an update of a form that is known here")
	ErrTruncated = errors.New("the update ends too early")
	ErrKey       = errors.New("the update is not signed by a key of this device")
	ErrSignature = errors.New("the update's signature is wrong")
	ErrProduct   = errors.New("the update is for another product")
	ErrArch      = errors.New("the update is for another architecture")
	ErrBoard     = errors.New("the update is for other boards")
	ErrOlder     = errors.New("the update is not newer than what runs")
	ErrTooOld    = errors.New("what runs is too old for the update")
	ErrTooLarge  = errors.New("the update is too large")
	ErrCorrupt   = errors.New("the update is damaged")
	ErrExpired   = errors.New("the index of the update source has expired")
	ErrChannel   = errors.New("the update is for another channel")
)

// A Manifest says what a bundle holds and for which devices.
type Manifest struct {
	Format     int       `json:"format"`
	Product    string    `json:"product"`
	Version    string    `json:"version"` // by semantic versioning
	Arch       string    `json:"arch"`    // arm64, armhf, armel or amd64
	Boards     []string  `json:"boards"`  // names of device trees such as raspberrypi,4-model-b, or PC
	Built      time.Time `json:"built"`
	Size       int64     `json:"size"`                  // of the slot's image, in bytes
	SHA256     string    `json:"sha256"`                // of the slot's image, in hexadecimal
	MinVersion string    `json:"min_version,omitempty"` // oldest version that can be updated from; empty: any
	Channel    string    `json:"channel,omitempty"`     // the channel it was published for; empty: any
	Notes      string    `json:"notes,omitempty"`       // for people
}

// A Reader gives the image of a slot as it streams out of a bundle. It is for one goroutine. Close frees its memory.
type Reader struct {
	manifest Manifest
	src      *limited
	dec      *zstd.Decoder
	hash     hash.Hash
	left     int64
	err      error
}

// Open reads a bundle's head from r, checks its signature with keys, and returns a Reader of the slot's image. It asks
// nothing of the device: see [Manifest.Fits]. Errors of r itself are passed on; the others are the faults above.
func Open(r io.Reader, keys []minisign.PublicKey) (*Reader, error) {
	magic := make([]byte, len(Magic))
	if err := readFull(r, magic); err != nil {
		return nil, err
	}
	if string(magic) != Magic {
		return nil, fmt.Errorf("%w: it does not begin like a bundle; take the file whose name ends in .update", ErrFormat)
	}
	text, err := readPart(r, "manifest", MaxManifest)
	if err != nil {
		return nil, err
	}
	sig, err := readPart(r, "signature", MaxSignature)
	if err != nil {
		return nil, err
	}
	if err := verify(keys, append(magic, text...), sig); err != nil {
		return nil, err
	}
	m, err := parseManifest(text)
	if err != nil {
		return nil, err
	}
	src := &limited{r: r, left: maxCompressed(m.Size)}
	dec, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(8<<20))
	if err != nil {
		return nil, fmt.Errorf("bundle: %w", err)
	}
	return &Reader{manifest: m, src: src, dec: dec, hash: sha256.New(), left: m.Size}, nil
}

// maxCompressed is more than any encoder makes of size bytes.
func maxCompressed(size int64) int64 { return size + size/64 + 64<<10 }

// Manifest returns the manifest, whose signature is good.
func (r *Reader) Manifest() Manifest { return r.manifest }

// Read reads from the slot's image. The last bytes come with io.EOF or before it, and io.EOF comes only if size and
// SHA-256 are those of the manifest and nothing follows in the bundle.
func (r *Reader) Read(p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.left == 0 {
		r.err = r.end()
		return 0, r.err
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := r.dec.Read(p)
	r.hash.Write(p[:n])
	r.left -= int64(n)
	if err != nil && (err != io.EOF || r.left > 0) {
		r.err = r.fault(err)
		return n, r.err
	}
	return n, nil
}

// end checks what can be checked only after the last byte.
func (r *Reader) end() error {
	var more [1]byte
	switch n, err := io.ReadFull(r.dec, more[:]); {
	case n > 0:
		return fmt.Errorf("%w: it holds more than the %d bytes that it promises; make it again", ErrTooLarge, r.manifest.Size)
	case err != io.EOF:
		return r.fault(err)
	}
	if got := hex.EncodeToString(r.hash.Sum(nil)); got != r.manifest.SHA256 {
		return fmt.Errorf("%w: its SHA-256 is %s, the manifest says %s; get it again", ErrCorrupt, got, r.manifest.SHA256)
	}
	return io.EOF
}

// fault tells an error of the source from one of its content.
func (r *Reader) fault(err error) error {
	switch {
	case r.src.err != nil:
		return r.src.err
	case r.src.full:
		return fmt.Errorf("%w: it goes on after its end; make it again", ErrTooLarge)
	case err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF):
		return fmt.Errorf("%w: %d of %d bytes are missing; get it again", ErrTruncated, r.left, r.manifest.Size)
	}
	return fmt.Errorf("%w: %w; get it again", ErrCorrupt, err)
}

// Close frees what the Reader holds. It does not close the source.
func (r *Reader) Close() error {
	r.dec.Close()
	return nil
}

// limited reads at most left bytes and keeps an error of the source apart.
type limited struct {
	r    io.Reader
	left int64
	full bool
	err  error
}

func (l *limited) Read(p []byte) (int, error) {
	if l.left == 0 {
		l.full = true
		return 0, ErrTooLarge
	}
	if int64(len(p)) > l.left {
		p = p[:l.left]
	}
	n, err := l.r.Read(p)
	l.left -= int64(n)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF { // as they are: an error that wraps one is of a connection
		l.err = err
	}
	return n, err
}

// Write writes a bundle of the slot's image to w. Format, Product, Size and SHA256 of m are set here: Size may be zero,
// in which case it is found. The same manifest, image and signature give the same bytes.
func Write(w io.Writer, m Manifest, slot io.ReaderAt, sign func([]byte) ([]byte, error)) (Manifest, error) {
	h := sha256.New()
	size, err := io.Copy(h, io.NewSectionReader(slot, 0, MaxSlot+1))
	if err != nil {
		return m, fmt.Errorf("bundle: read the slot: %w", err)
	}
	m.Format, m.Product, m.Size, m.SHA256 = Format, Product, size, hex.EncodeToString(h.Sum(nil))
	m.Built = m.Built.UTC()
	if err := m.Validate(); err != nil {
		return m, err
	}
	text, err := json.Marshal(m)
	if err != nil {
		return m, fmt.Errorf("bundle: %w", err)
	}
	if len(text) > MaxManifest {
		return m, fmt.Errorf("%w: its manifest has %d bytes, %d are allowed; shorten the notes", ErrTooLarge, len(text), MaxManifest)
	}
	sig, err := sign(append([]byte(Magic), text...))
	if err != nil {
		return m, fmt.Errorf("bundle: sign: %w", err)
	}
	if len(sig) > MaxSignature {
		return m, fmt.Errorf("bundle: the signature has %d bytes, %d are allowed", len(sig), MaxSignature)
	}
	var head bytes.Buffer
	head.WriteString(Magic)
	for _, part := range [][]byte{text, sig} {
		head.Write(binary.BigEndian.AppendUint32(nil, uint32(len(part))))
		head.Write(part)
	}
	if _, err := w.Write(head.Bytes()); err != nil {
		return m, fmt.Errorf("bundle: %w", err)
	}
	return m, compress(w, io.NewSectionReader(slot, 0, size))
}

func compress(w io.Writer, r io.Reader) error {
	enc, err := zstd.NewWriter(w, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window), zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if _, err := io.Copy(enc, r); err != nil {
		return fmt.Errorf("bundle: compress the slot: %w", errors.Join(err, enc.Close()))
	}
	if err := enc.Close(); err != nil {
		return fmt.Errorf("bundle: compress the slot: %w", err)
	}
	return nil
}

// readPart reads a part that its length precedes.
func readPart(r io.Reader, name string, most uint32) ([]byte, error) {
	var length [4]byte
	if err := readFull(r, length[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(length[:])
	switch {
	case n == 0:
		return nil, fmt.Errorf("%w: its %s is empty; get it again", ErrFormat, name)
	case n > most:
		return nil, fmt.Errorf("%w: its %s has %d bytes, %d are allowed; get it again", ErrTooLarge, name, n, most)
	}
	b := make([]byte, n)
	if err := readFull(r, b); err != nil {
		return nil, err
	}
	return b, nil
}

func readFull(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("%w: not even its head is whole; get it again", ErrTruncated)
	}
	return err
}
