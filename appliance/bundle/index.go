package bundle

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"aead.dev/minisign"
)

const (
	// MaxIndex bounds an index, in bytes.
	MaxIndex = 256 << 10
	// maxReleases bounds the releases of an index.
	maxReleases = 256
	// indexMagic keeps the signature of an index from being taken for one of anything else.
	indexMagic = "KHIDX1\n"
)

// An Index names the updates of one channel for one architecture. A source has it at <source>/<channel>/<arch>.json.
type Index struct {
	Format    int       `json:"format"`
	Product   string    `json:"product"`
	Arch      string    `json:"arch"`
	Channel   string    `json:"channel"`
	Published time.Time `json:"published"`        // a device refuses an index older than one that it has seen
	Expires   time.Time `json:"expires,omitzero"` // a device refuses it from then on; zero: never
	Releases  []Release `json:"releases"`         // newest first
}

// A Release is one bundle of an [Index].
type Release struct {
	Version string `json:"version"`
	URL     string `json:"url"`             // of the bundle: absolute, or relative to the index
	Size    int64  `json:"size"`            // of the bundle, in bytes
	SHA256  string `json:"sha256"`          // of the bundle
	Percent int    `json:"percent"`         // of the devices that may install it by themselves; 0: none
	Salt    string `json:"salt"`            // which devices are the first
	Notes   string `json:"notes,omitempty"` // for people
}

// signedIndex is the file form: the text of the index as a string, so that it can be stored and sent as any JSON, and its
// signature.
type signedIndex struct {
	Index     string `json:"index"`
	Signature string `json:"signature"`
}

// ReadIndex reads an index and checks its signature with keys.
func ReadIndex(r io.Reader, keys []minisign.PublicKey) (Index, error) {
	b, err := io.ReadAll(io.LimitReader(r, MaxIndex+1))
	if err != nil {
		return Index{}, err
	}
	if len(b) > MaxIndex {
		return Index{}, fmt.Errorf("%w: the index has more than %d bytes; take old releases out of it", ErrTooLarge, MaxIndex)
	}
	var s signedIndex
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil || dec.More() {
		return Index{}, fmt.Errorf("%w: this is not an index of an update source; look at its address", ErrFormat)
	}
	if err := verify(keys, []byte(indexMagic+s.Index), []byte(s.Signature)); err != nil {
		return Index{}, err
	}
	var x Index
	if err := json.Unmarshal([]byte(s.Index), &x); err != nil {
		return Index{}, fmt.Errorf("%w: the index is not as expected (%w); make it again", ErrFormat, err)
	}
	return x, x.Validate()
}

// WriteIndex signs x and writes it to w, its releases newest first.
func WriteIndex(w io.Writer, x Index, sign func([]byte) ([]byte, error)) error {
	x.Format, x.Product, x.Published, x.Expires = Format, Product, x.Published.UTC(), x.Expires.UTC()
	x.Releases = slices.SortedStableFunc(slices.Values(x.Releases), func(a, b Release) int { return Compare(b.Version, a.Version) })
	if err := x.Validate(); err != nil {
		return err
	}
	text, err := json.MarshalIndent(x, "", "  ")
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	sig, err := sign(append([]byte(indexMagic), text...))
	if err != nil {
		return fmt.Errorf("bundle: sign the index: %w", err)
	}
	b, err := json.MarshalIndent(signedIndex{Index: string(text), Signature: string(sig)}, "", "  ")
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	if len(b) >= MaxIndex {
		return fmt.Errorf("%w: the index has %d bytes, %d are allowed; leave old releases out", ErrTooLarge, len(b), MaxIndex)
	}
	_, err = w.Write(append(b, '\n'))
	return err
}

// Validate reports the first thing that is wrong with x itself.
func (x Index) Validate() error {
	switch {
	case x.Format != Format:
		return fmt.Errorf("%w: the index has format %d, this version reads %d; update by a bundle first", ErrFormat, x.Format, Format)
	case x.Product != Product:
		return fmt.Errorf("%w: the index is for %q; set update.source to a source for %s", ErrProduct, clip(x.Product), Product)
	case !slices.Contains(Archs(), x.Arch):
		return fmt.Errorf("%w: the index is for %q, which is none of %s", ErrFormat, clip(x.Arch), strings.Join(Archs(), ", "))
	case !channel.MatchString(x.Channel):
		return fmt.Errorf("%w: the index has channel %q, which is not like stable", ErrFormat, clip(x.Channel))
	case x.Published.IsZero():
		return fmt.Errorf("%w: the index does not say when it was published", ErrFormat)
	case !x.Expires.IsZero() && !x.Expires.After(x.Published):
		return fmt.Errorf("%w: the index expires before it is published; make it again", ErrFormat)
	case len(x.Releases) > maxReleases:
		return fmt.Errorf("%w: the index has %d releases, %d are allowed; leave old ones out", ErrTooLarge, len(x.Releases), maxReleases)
	}
	for i, r := range x.Releases {
		if err := r.validate(); err != nil {
			return fmt.Errorf("%w: release %d of the index: %w; make the index again", ErrFormat, i+1, err)
		}
		if i > 0 && Compare(x.Releases[i-1].Version, r.Version) <= 0 {
			return fmt.Errorf("%w: the index has %s and %s, which are not in order, or the same; make the index again",
				ErrFormat, x.Releases[i-1].Version, r.Version)
		}
	}
	return nil
}

func (r Release) validate() error {
	if _, err := ParseVersion(r.Version); err != nil {
		return fmt.Errorf("version %q: %w", clip(r.Version), err)
	}
	u, err := url.Parse(r.URL)
	if err != nil || r.URL == "" || len(r.URL) > 2048 {
		return errors.New("its address is none")
	}
	if u.IsAbs() && (u.Scheme != "https" && u.Scheme != "http" || u.Host == "") || u.User != nil {
		return errors.New("its address is not http or https, or holds a password")
	}
	if r.Size <= 0 || r.Size > maxCompressed(MaxSlot) {
		return fmt.Errorf("its size is %d", r.Size)
	}
	if b, err := hex.DecodeString(r.SHA256); err != nil || len(b) != 32 || strings.ToLower(r.SHA256) != r.SHA256 {
		return errors.New("its sha256 is not 64 hexadecimal digits in lower case")
	}
	if r.Percent < 0 || r.Percent > 100 {
		return fmt.Errorf("its percentage is %d", r.Percent)
	}
	if len(r.Salt) > 64 || len(r.Notes) > 4096 {
		return errors.New("its salt or notes are too long")
	}
	return nil
}

// Release returns the release of a version, or the newest if version is empty.
func (x Index) Release(version string) (Release, bool) {
	for _, r := range x.Releases {
		if version == "" || Compare(r.Version, version) == 0 {
			return r, true
		}
	}
	return Release{}, false
}
