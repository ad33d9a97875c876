package bundle

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// PC is the board of machines without a device tree, such as virtual ones.
const PC = "pc"

// Archs returns the architectures that there are images for, as Debian names them.
func Archs() []string { return []string{"arm64", "armhf", "armel", "amd64"} }

// A Device is what a bundle has to fit.
type Device struct {
	Arch    string
	Boards  []string // every name that the machine answers to
	Version string   // that runs; empty: unknown, so any version is newer
	MaxSize int64    // of a slot, in bytes
}

var (
	name    = regexp.MustCompile(`^[a-z0-9][a-z0-9,._+-]{0,63}$`)
	channel = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,31}$`)
)

// parseManifest reads text, whose signature is good. Fields that it does not know are passed over, so that later
// versions can add some; what older versions must not pass over needs another format.
func parseManifest(text []byte) (Manifest, error) {
	var m Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		return m, fmt.Errorf("%w: its manifest is not JSON as expected (%w); make it again", ErrFormat, err)
	}
	return m, m.Validate()
}

// Validate reports the first thing that is wrong with m itself.
func (m Manifest) Validate() error {
	bad := func(field, format string, args ...any) error {
		return fmt.Errorf("%w: %s %s; make it again", ErrFormat, field, fmt.Sprintf(format, args...))
	}
	if m.Format != Format {
		return fmt.Errorf("%w: it has format %d, this version reads %d; update to a version in between first", ErrFormat, m.Format, Format)
	}
	if m.Product != Product {
		return fmt.Errorf("%w: it is for %q, this is %q; get the one for %s", ErrProduct, clip(m.Product), Product, Product)
	}
	if _, err := ParseVersion(m.Version); err != nil {
		return bad("version", "%q: %v", clip(m.Version), err)
	}
	if !slices.Contains(Archs(), m.Arch) {
		return bad("arch", "%q is none of %s", clip(m.Arch), strings.Join(Archs(), ", "))
	}
	if len(m.Boards) == 0 || len(m.Boards) > 64 {
		return bad("boards", "has %d entries, not 1 to 64", len(m.Boards))
	}
	for _, b := range m.Boards {
		if !name.MatchString(b) {
			return bad("boards", "has %q, which is not like raspberrypi,4-model-b", clip(b))
		}
	}
	if m.Built.Before(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)) || m.Built.Year() > 9998 {
		return bad("built", "is not a time after 2020")
	}
	if m.Size <= 0 || m.Size%512 != 0 {
		return bad("size", "is %d, not a number of whole sectors of 512 bytes", m.Size)
	}
	if m.Size > MaxSlot {
		return fmt.Errorf("%w: its slot has %d bytes, %d are allowed; make a smaller one", ErrTooLarge, m.Size, int64(MaxSlot))
	}
	if b, err := hex.DecodeString(m.SHA256); err != nil || len(b) != 32 || strings.ToLower(m.SHA256) != m.SHA256 {
		return bad("sha256", "is not 64 hexadecimal digits in lower case")
	}
	if m.MinVersion != "" {
		if _, err := ParseVersion(m.MinVersion); err != nil {
			return bad("min_version", "%q: %v", clip(m.MinVersion), err)
		}
	}
	if m.Channel != "" && !channel.MatchString(m.Channel) {
		return bad("channel", "%q is not like stable", clip(m.Channel))
	}
	if len(m.Notes) > 4096 || !utf8.ValidString(m.Notes) {
		return bad("notes", "has more than 4096 bytes or is not UTF-8")
	}
	return nil
}

// Fits reports why a device cannot take the bundle. With force it may be of any version; product, architecture, board and
// size must fit all the same, since the device could not start what does not fit.
func (m Manifest) Fits(d Device, force bool) error {
	if m.Arch != d.Arch {
		return fmt.Errorf("%w: it is for %s, this device is %s; get the one whose name has %s", ErrArch, m.Arch, d.Arch, d.Arch)
	}
	if !slices.ContainsFunc(m.Boards, func(b string) bool { return slices.Contains(d.Boards, b) }) {
		return fmt.Errorf("%w: it is for %s, this device is %s; look in its notes for the boards that it supports",
			ErrBoard, strings.Join(m.Boards, ", "), strings.Join(d.Boards, ", "))
	}
	if m.Size > d.MaxSize {
		return fmt.Errorf("%w: its slot has %d bytes, this card's have %d; write a card anew with the current image", ErrTooLarge, m.Size, d.MaxSize)
	}
	if d.Version == "" || force {
		return nil
	}
	if Compare(m.Version, d.Version) <= 0 {
		return fmt.Errorf("%w: it is %s, %s runs; to install it all the same, say --force", ErrOlder, m.Version, d.Version)
	}
	if m.MinVersion != "" && Compare(d.Version, m.MinVersion) < 0 {
		return fmt.Errorf("%w: %s runs, it needs %s; update to %s first", ErrTooOld, d.Version, m.MinVersion, m.MinVersion)
	}
	return nil
}

// CheckChannel reports whether s can be the name of a channel, such as stable.
func CheckChannel(s string) error {
	if !channel.MatchString(s) {
		return fmt.Errorf("%w: channel %q is not like stable", ErrFormat, clip(s))
	}
	return nil
}

// clip keeps foreign text in errors short.
func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
