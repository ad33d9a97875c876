package pkcs11

import (
	"fmt"
	"strconv"
	"strings"

	ck "github.com/miekg/pkcs11"
)

// found is a token in a slot.
type found struct {
	slot uint
	info ck.TokenInfo
}

func (f found) String() string {
	return fmt.Sprintf("slot-id %d (token %q, serial %q)", f.slot, f.info.Label, f.info.SerialNumber)
}

// findToken returns the one token that the URI names.
func (m *module) findToken(u *URI) (found, error) {
	var all []found
	err := m.call(func(c *ck.Ctx) error {
		slots, err := c.GetSlotList(true)
		if err != nil {
			return err
		}
		for _, slot := range slots {
			// A slot that cannot be read is not the one: others on the module must not keep ours from working.
			if info, err := c.GetTokenInfo(slot); err == nil && info.Flags&ck.CKF_TOKEN_INITIALIZED != 0 {
				all = append(all, found{slot, info})
			}
		}
		return nil
	})
	if err != nil {
		return found{}, fmt.Errorf("list slots of %s: %w", m.path, err)
	}
	var fit []found
	for _, f := range all {
		if u.fits(f) {
			fit = append(fit, f)
		}
	}
	switch len(fit) {
	case 0:
		return found{}, fmt.Errorf("%w: %s has no %s; it has %s (a module that is in use may not notice new tokens)",
			ErrTokenNotFound, m.path, u.tokenName(), list(all))
	case 1:
		return fit[0], nil
	}
	return found{}, fmt.Errorf("%w: %s fits %s; name one by serial or slot-id", ErrAmbiguous, u.tokenName(), list(fit))
}

// fits reports whether every attribute that the URI has is the token's. See RFC 7512 section 2.3.
func (u *URI) fits(f found) bool {
	return (u.Token == "" || u.Token == f.info.Label) &&
		(u.Serial == "" || u.Serial == f.info.SerialNumber) &&
		(u.SlotID == "" || u.SlotID == strconv.FormatUint(uint64(f.slot), 10)) &&
		(u.Manufacturer == "" || u.Manufacturer == f.info.ManufacturerID) &&
		(u.Model == "" || u.Model == f.info.Model)
}

// tokenName is what the URI calls the token.
func (u *URI) tokenName() string {
	switch {
	case u.Token != "":
		return fmt.Sprintf("token %q", u.Token)
	case u.Serial != "":
		return fmt.Sprintf("token with serial %q", u.Serial)
	}
	return "token with slot-id " + u.SlotID
}

func list(all []found) string {
	if len(all) == 0 {
		return "none"
	}
	s := make([]string, len(all))
	for i, f := range all {
		s[i] = f.String()
	}
	return strings.Join(s, ", ")
}
