package pkcs11

import (
	"errors"
	"fmt"
	"log/slog"
)

// DefaultSessions is the number of sessions when Config.Sessions is zero.
const DefaultSessions = 4

// maxSessions bounds Config.Sessions: each session in use occupies a thread.
const maxSessions = 256

// Config says which token to open and how. Open does not modify it.
type Config struct {
	// URI names the token in exactly one way, by token label, serial or slot-id; manufacturer and model may be added and
	// must fit. object and id narrow the keys down. Module and PIN may come from it too.
	URI URI
	// Module is the absolute path of the module. If empty, the URI's module-path or module-name decides, within AllowedModules.
	Module string
	// PIN yields the PIN, once for each Open and Reopen. If nil, the URI's pin-source is read.
	PIN func() (PIN, error)
	// Sessions is the greatest number of sessions, and so of operations at one time. If zero, DefaultSessions.
	Sessions int
	// AllowedModules lists absolute paths of the modules that a URI may ask for. If it is empty, a URI may ask for none but
	// Module. If it is not empty, Module must be in it.
	AllowedModules []string
	// AllowExtractable admits, with a warning, keys that the token would give away.
	AllowExtractable bool
	// Logger receives what operators need to know. If nil, nothing is logged.
	Logger *slog.Logger
}

// validate checks what can be checked before anything is loaded.
func (c *Config) validate() error {
	named := 0
	for _, v := range []string{c.URI.Token, c.URI.Serial, c.URI.SlotID} {
		if v != "" {
			named++
		}
	}
	switch {
	case named == 0:
		return errors.New("pkcs11: the URI names no token: give token, serial or slot-id")
	case named > 1:
		return errors.New("pkcs11: the URI names the token in several ways: give exactly one of token, serial and slot-id")
	}
	for name, v := range map[string]string{
		"library-manufacturer": c.URI.LibraryManufacturer, "library-description": c.URI.LibraryDescription,
		"library-version": c.URI.LibraryVersion, "slot-manufacturer": c.URI.SlotManufacturer, "slot-description": c.URI.SlotDescription,
	} {
		if v != "" {
			return fmt.Errorf("pkcs11: the URI has %s, which does not select tokens here: take it out", name)
		}
	}
	if c.URI.Type != "" && c.URI.Type != "private" {
		return fmt.Errorf("pkcs11: the URI asks for objects of type %s: only private keys are used", c.URI.Type)
	}
	if c.Sessions < 0 || c.Sessions > maxSessions {
		return fmt.Errorf("pkcs11: %d sessions: give 1 to %d, or 0 for %d", c.Sessions, maxSessions, DefaultSessions)
	}
	if c.PIN != nil && (c.URI.PINSource != "" || !c.URI.pinValue.IsZero()) {
		return errors.New("pkcs11: two sources of the PIN: the URI's and the configuration's; keep one")
	}
	return nil
}
