package pkcs11

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// Selector names one key of a token. Every field that is not zero must fit. The zero value names none.
type Selector struct {
	SKI   keyless.SKI
	ID    []byte // CKA_ID
	Label string // CKA_LABEL
}

// ParseSelector reads what an operator calls a key: 40 hexadecimal digits are an SKI, "id:" and hexadecimal digits a CKA_ID,
// everything else a label.
func ParseSelector(s string) (Selector, error) {
	sel, err := parseSelector(s)
	return sel, named(err)
}

func parseSelector(s string) (Selector, error) {
	if s == "" {
		return Selector{}, errors.New("the name of the key is empty: give its SKI, id:<hex> or label")
	}
	if digits, ok := strings.CutPrefix(s, "id:"); ok {
		id, err := hex.DecodeString(digits)
		if err != nil || len(id) == 0 {
			return Selector{}, fmt.Errorf("%q: want hexadecimal digits after id:", s)
		}
		return Selector{ID: id}, nil
	}
	if ski, err := keyless.ParseSKI(s); err == nil {
		return Selector{SKI: ski}, nil
	}
	return Selector{Label: s}, nil
}

// String returns what ParseSelector reads, if one field is set.
func (s Selector) String() string {
	var parts []string
	if !s.SKI.IsZero() {
		parts = append(parts, s.SKI.String())
	}
	if len(s.ID) > 0 {
		parts = append(parts, "id:"+hex.EncodeToString(s.ID))
	}
	if s.Label != "" {
		parts = append(parts, s.Label)
	}
	return strings.Join(parts, " ")
}

func (s Selector) isZero() bool { return s.SKI.IsZero() && len(s.ID) == 0 && s.Label == "" }

func (s Selector) fits(ski keyless.SKI, id []byte, label string) bool {
	return (s.SKI.IsZero() || s.SKI == ski) && (len(s.ID) == 0 || bytes.Equal(s.ID, id)) && (s.Label == "" || s.Label == label)
}

// Key looks through the token and returns the one key that sel names: ErrAmbiguous if several fit, ErrKeyNotFound if none, or
// the reason, such as ErrExtractable, why the one that fits is not used.
func (t *Token) Key(ctx context.Context, sel Selector) (signer.Key, error) {
	k, err := t.key(ctx, sel)
	if err != nil {
		return nil, named(err)
	}
	return k.face(), nil
}

func (t *Token) key(ctx context.Context, sel Selector) (*key, error) {
	if sel.isZero() {
		return nil, errors.New("no key is named: give its SKI, id:<hex> or label")
	}
	inv, err := t.discover(ctx)
	if err != nil {
		return nil, err
	}
	var fit []*key
	var names []string
	for _, k := range inv.keys {
		info := k.info.Load()
		if sel.fits(info.SKI, info.ID, info.Label) {
			fit = append(fit, k)
			names = append(names, fmt.Sprintf("%q (SKI %s)", info.Label, info.SKI))
		}
	}
	switch len(fit) {
	case 1:
		return fit[0], nil
	case 0:
	default:
		return nil, fmt.Errorf("%w: %q fits %s; name one by its SKI", ErrAmbiguous, sel, strings.Join(names, ", "))
	}
	// The SKI of a key that is not used is not known: the other names decide.
	rest := Selector{ID: sel.ID, Label: sel.Label}
	for _, p := range inv.refused {
		if !rest.isZero() && rest.fits(keyless.SKI{}, p.id, p.label) {
			return nil, fmt.Errorf("key %q: %w", p.label, p.why)
		}
	}
	return nil, fmt.Errorf("%w: token %s has no usable key %q", ErrKeyNotFound, t.name, sel)
}
