package pkcs11

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	ck "github.com/miekg/pkcs11"
)

// module is a PKCS#11 module loaded into this process. There is one for each file, however many tokens use it.
type module struct {
	path string
	fns  functions

	// calls is held for reading by every call into the module and for writing by C_Initialize and C_Finalize, which must not run
	// beside others. It is never taken twice by one goroutine.
	calls   sync.RWMutex
	ctx     *ck.Ctx
	foreign bool // somebody else in this process initialised the module: never finalise it. Guarded by calls

	sessionsMu sync.Mutex // guards sessions, and is held while one is opened or closed. It is taken after calls
	sessions   map[ck.SessionHandle]*session

	tokens int // open tokens. Guarded by modules.mu
}

var modules = struct {
	mu     sync.Mutex // guards loaded, and the tokens of each module
	loaded map[string]*module
}{loaded: map[string]*module{}}

// openModule loads the module and initialises it if no token uses it yet. The caller must call release.
func openModule(path string) (*module, error) {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	m := modules.loaded[path]
	if m == nil {
		ctx, fns, err := load(path)
		if err != nil {
			return nil, err
		}
		m = &module{path: path, fns: fns, ctx: ctx, sessions: map[ck.SessionHandle]*session{}}
		modules.loaded[path] = m
	}
	if m.tokens == 0 {
		m.calls.Lock()
		err := m.initialiseLocked()
		m.calls.Unlock()
		if err != nil {
			return nil, err
		}
	}
	m.tokens++
	return m, nil
}

// initialiseLocked runs C_Initialize.
func (m *module) initialiseLocked() error {
	m.sessionsMu.Lock()
	clear(m.sessions)
	m.sessionsMu.Unlock()
	err := m.ctx.Initialize()
	m.foreign = errors.Is(err, ck.Error(ck.CKR_CRYPTOKI_ALREADY_INITIALIZED))
	if err != nil && !m.foreign {
		return fmt.Errorf("initialise module %s: %w", m.path, coded(err))
	}
	return nil
}

// release ends one token's use of the module and finalises it after the last.
func (m *module) release() error {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	m.tokens--
	if m.tokens > 0 {
		return nil
	}
	m.calls.Lock()
	defer m.calls.Unlock()
	if m.foreign {
		return nil
	}
	err := m.ctx.Finalize()
	if err != nil && !errors.Is(err, ck.Error(ck.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		return fmt.Errorf("finalise module %s: %w", m.path, coded(err))
	}
	return nil
}

// reinitialise finalises the module and initialises it again, if one token at most uses it. That token must have no sessions.
func (m *module) reinitialise() error {
	modules.mu.Lock()
	defer modules.mu.Unlock()
	m.calls.Lock()
	defer m.calls.Unlock()
	if m.foreign || m.tokens > 1 {
		return nil
	}
	// A failure is of no interest: C_Initialize shows whether the module is usable.
	_ = m.ctx.Finalize()
	return m.initialiseLocked()
}

// call runs f, which calls into the module but must not use sessions or objects.
func (m *module) call(f func(*ck.Ctx) error) error {
	m.calls.RLock()
	defer m.calls.RUnlock()
	return coded(f(m.ctx))
}

// resolveModule finds the module that the configuration asks for and checks that it may be loaded. The result has no symbolic
// links in it, so that one file is one module.
func (c *Config) resolveModule() (string, error) {
	allowed := c.AllowedModules
	if c.Module != "" {
		if len(allowed) > 0 && !containsModule(allowed, c.Module) {
			return "", fmt.Errorf("%w: %s is not among the allowed modules %s", ErrModuleNotAllowed, c.Module, strings.Join(allowed, ", "))
		}
		allowed = []string{c.Module}
	}
	path, err := c.chooseModule(allowed)
	if err != nil {
		return "", err
	}
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("module %q: give an absolute path", path)
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		return "", fmt.Errorf("module %s: %w: install the token's module, or correct the path", path, err)
	}
	return resolved, nil
}

func (c *Config) chooseModule(allowed []string) (string, error) {
	switch {
	case c.URI.ModulePath != "":
		if !containsModule(allowed, c.URI.ModulePath) {
			return "", fmt.Errorf("%w: the URI's module-path %s is not among the allowed modules %q", ErrModuleNotAllowed, c.URI.ModulePath, allowed)
		}
		return c.URI.ModulePath, nil
	case c.URI.ModuleName != "":
		return byName(c.URI.ModuleName, allowed)
	case c.Module != "":
		return c.Module, nil
	}
	return "", errors.New("no module: set its absolute path in the configuration, or give module-path or module-name in the URI")
}

// byName finds the allowed module whose file name is name, name.so, libname.so, or one of these with a version behind it.
func byName(name string, allowed []string) (string, error) {
	var found []string
	for _, path := range allowed {
		base := filepath.Base(path)
		stem := strings.TrimPrefix(base, "lib")
		for _, ext := range []string{".so", ".dylib"} {
			stem, _, _ = strings.Cut(stem, ext)
		}
		if (base == name || stem == strings.TrimPrefix(name, "lib")) && !containsModule(found, path) {
			found = append(found, path)
		}
	}
	switch len(found) {
	case 0:
		return "", fmt.Errorf("%w: no allowed module has the URI's module-name %q; allowed are %q", ErrModuleNotAllowed, name, allowed)
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("%w: module-name %q fits %s", ErrAmbiguous, name, strings.Join(found, " and "))
}

// containsModule reports whether path is the same file as one of list.
func containsModule(list []string, path string) bool {
	resolved := realPath(path)
	return slices.ContainsFunc(list, func(p string) bool { return realPath(p) == resolved })
}

func realPath(path string) string {
	if resolved, err := filepath.EvalSymlinks(path); err == nil {
		return resolved
	}
	return filepath.Clean(path)
}
