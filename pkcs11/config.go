package pkcs11

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
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
	// PIN yields the PIN, once for each Open. If nil, the URI's pin-source is read.
	PIN func() (PIN, error)
	// Sessions is the greatest number of sessions, and so of operations at one time. If zero, DefaultSessions.
	Sessions int
	// AllowedModules lists absolute paths of the modules that a URI may ask for. If it is empty, a URI may ask for none but
	// Module. If it is not empty, Module must be in it.
	AllowedModules []string
	// AllowExtractable admits, with a warning, keys that the token would give away.
	AllowExtractable bool
	// AllowFinalTry logs in even if the token says that one more wrong PIN would lock it.
	AllowFinalTry bool
	// Leave is asked before each login, and before each use of a key that wants the PIN anew, where several processes share a
	// token and none may try a PIN that another saw refused. If nil, no leave is needed. It is called by one operation at a time.
	Leave func(ctx context.Context) (Leave, error)
	// Progress is called between the steps of work that takes many, such as a discovery, with the context of that work. It may be nil.
	Progress func(ctx context.Context)
	// Logger receives what operators need to know. If nil, nothing is logged.
	Logger *slog.Logger
}

// Leave is the permission to log in once.
type Leave struct {
	// Unproven means that a login with this PIN had no answer. The login is made only if the token has counted no wrong PIN.
	Unproven bool
	// Done is told what became of the login. It must be called.
	Done func(error)
}

// FieldError is a fault of a Config.
type FieldError struct {
	Field string // the field's name: URI, Module, Sessions or PIN
	Err   error
}

// Error says what is wrong and what to do.
func (e *FieldError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *FieldError) Unwrap() error { return e.Err }

// Check finds what Open would refuse before it loads the module. It looks at the PIN's file and does not read it, as
// that may work once only. The errors are *FieldErrors, at most one for each field.
func (c *Config) Check() []error {
	var all []error
	add := func(field string, err error) {
		if err != nil {
			all = append(all, &FieldError{field, err})
		}
	}
	add("URI", c.checkURI())
	add("Sessions", c.checkSessions())
	if c.URI.PINSource != "" || c.PIN == nil {
		add("PIN", c.checkPIN())
	}
	_, err := c.resolveModule()
	add("Module", err)
	return all
}

// validate checks what needs no file.
func (c *Config) validate() error {
	if err := c.checkURI(); err != nil {
		return err
	}
	if err := c.checkSessions(); err != nil {
		return err
	}
	return c.checkPINSources()
}

func (c *Config) checkURI() error {
	named := 0
	for _, v := range []string{c.URI.Token, c.URI.Serial, c.URI.SlotID} {
		if v != "" {
			named++
		}
	}
	switch {
	case named == 0:
		return errors.New("the URI names no token: give token, serial or slot-id")
	case named > 1:
		return errors.New("the URI names the token in several ways: give exactly one of token, serial and slot-id")
	}
	for name, v := range map[string]string{
		"library-manufacturer": c.URI.LibraryManufacturer, "library-description": c.URI.LibraryDescription,
		"library-version": c.URI.LibraryVersion, "slot-manufacturer": c.URI.SlotManufacturer, "slot-description": c.URI.SlotDescription,
	} {
		if v != "" {
			return fmt.Errorf("the URI has %s, which does not select tokens here: take it out", name)
		}
	}
	if c.URI.Type != "" && c.URI.Type != "private" {
		return fmt.Errorf("the URI asks for objects of type %s: only private keys are used", c.URI.Type)
	}
	return nil
}

func (c *Config) checkSessions() error {
	if c.Sessions < 0 || c.Sessions > maxSessions {
		return fmt.Errorf("%d sessions: give 1 to %d, or 0 for %d", c.Sessions, maxSessions, DefaultSessions)
	}
	return nil
}

// ModulePath returns the module that Open would load, without symbolic links.
func (c *Config) ModulePath() (string, error) {
	path, err := c.resolveModule()
	return path, named(err)
}

// ReadPIN reads the PIN as Open would.
func (c *Config) ReadPIN() (PIN, error) {
	if err := c.checkPINSources(); err != nil {
		return PIN{}, named(err)
	}
	pin, err := c.pinSource()()
	return pin, named(err)
}

// pinSource is what the PIN is read from.
func (c *Config) pinSource() func() (PIN, error) {
	if c.PIN != nil {
		return c.PIN
	}
	uri := c.URI
	return uri.pin
}

func (c *Config) checkPINSources() error {
	if c.PIN != nil && (c.URI.PINSource != "" || !c.URI.pinValue.IsZero()) {
		return errors.New("two sources of the PIN: the URI's and the configuration's; keep one")
	}
	return nil
}

func (c *Config) checkPIN() error {
	if err := c.checkPINSources(); err != nil {
		return err
	}
	if !c.URI.pinValue.IsZero() {
		return nil
	}
	path, err := c.URI.pinFile()
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return pinFileError(err)
	}
	return checkPINFile(path, info)
}
