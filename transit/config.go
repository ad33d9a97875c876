package transit

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Defaults of a [Config].
const (
	DefaultMount    = "transit"
	DefaultBatch    = 16
	DefaultInFlight = 4
	DefaultTimeout  = 5 * time.Second
)

const (
	maxBatch    = 256
	maxInFlight = 256
	maxTimeout  = time.Minute
)

// Config says which Transit engine to use and how. Open does not modify it.
type Config struct {
	// Address is the server's URL: https, or http if the host is a loopback IP address, as that of a local agent.
	Address string
	// Mount is the path at which the engine is mounted. If empty, DefaultMount.
	Mount string
	// Namespace is the namespace of engine and login. If empty, the root namespace.
	Namespace string
	// Keys names the keys to serve. At least one.
	Keys []KeyConfig
	// Auth says how to log in.
	Auth AuthConfig
	// TLS says how to connect. The zero value trusts the system's authorities.
	TLS TLSConfig
	// Batch is the greatest number of signatures in one request. If zero, DefaultBatch; 1 sends each by itself.
	Batch int
	// InFlight is the greatest number of signing requests under way. If zero, DefaultInFlight.
	InFlight int
	// Timeout bounds each request, besides its context. If zero, DefaultTimeout.
	Timeout time.Duration
	// Refusals remembers what the server refused. Give the same to each Open of one engine that is tried again and again. If nil, the backend has
	// its own.
	Refusals *Refusals
	// Logger receives what operators need to know. If nil, nothing is logged.
	Logger *slog.Logger
}

// KeyConfig names a key of the engine.
type KeyConfig struct {
	// Name is the key's name.
	Name string
	// Version is the version to serve. If zero, the one that is the latest when [Backend.Keys] asks.
	Version int
}

// The ways to log in.
const (
	AuthTokenFile  = "token-file"
	AuthAppRole    = "approle"
	AuthKubernetes = "kubernetes"
)

// AuthConfig says how to log in. It holds names of files, never secrets. Files are read at each login.
type AuthConfig struct {
	// Method is AuthTokenFile, AuthAppRole or AuthKubernetes.
	Method string
	// Mount is the path at which the method is mounted. If empty, the method's name. Not for token-file.
	Mount string
	// TokenFile holds a token, for token-file. It is looked at every few seconds and read again when it changed. Group and others
	// must have no access.
	TokenFile string
	// RoleIDFile and SecretIDFile hold the ids of an AppRole. Group and others must have no access to the secret id.
	RoleIDFile, SecretIDFile string
	// SecretIDWrapped says that SecretIDFile holds a response-wrapping token, which yields the secret id once. The secret id is kept in
	// memory until the file changes.
	SecretIDWrapped bool
	// Role is the role of the kubernetes method.
	Role string
	// JWTFile holds the service account token of the kubernetes method.
	JWTFile string
}

// TLSConfig says how to connect. Certificate and key are read again for each connection.
type TLSConfig struct {
	// CA is a PEM file of the authorities to trust. If empty, the system's.
	CA string
	// Cert and Key are PEM files of the client's certificate. Both or neither.
	Cert, Key string
	// ServerName is the name that the server's certificate must have. If empty, the host of the address.
	ServerName string
}

// FieldError is a fault of a Config.
type FieldError struct {
	Field string // the field's path, such as Address, Keys or Auth.TokenFile
	Err   error
}

// Error says what is wrong and what to do.
func (e *FieldError) Error() string { return e.Err.Error() }

// Unwrap returns Err.
func (e *FieldError) Unwrap() error { return e.Err }

// Check finds what Open would refuse before it connects. It looks at files of secrets and does not read them. The errors are
// *FieldErrors, at most one for each field.
func (c *Config) Check() []error {
	var all []error
	seen := map[string]bool{}
	add := func(field string, err error) {
		if err != nil && !seen[field] {
			seen[field] = true
			all = append(all, &FieldError{field, fmt.Errorf("transit: %w", err)})
		}
	}
	_, err := parseAddress(c.Address)
	add("Address", err)
	if c.Mount != "" {
		add("Mount", checkPath("mount", c.Mount))
	}
	if c.Namespace != "" {
		add("Namespace", checkPath("namespace", c.Namespace))
	}
	add("Keys", c.checkKeys())
	c.Auth.check(add)
	c.TLS.check(add)
	if c.Batch < 0 || c.Batch > maxBatch {
		add("Batch", fmt.Errorf("%d signatures in a batch: give 1 to %d, or 0 for %d", c.Batch, maxBatch, DefaultBatch))
	}
	if c.InFlight < 0 || c.InFlight > maxInFlight {
		add("InFlight", fmt.Errorf("%d requests at once: give 1 to %d, or 0 for %d", c.InFlight, maxInFlight, DefaultInFlight))
	}
	if c.Timeout < 0 || c.Timeout > maxTimeout {
		add("Timeout", fmt.Errorf("timeout %s: give at most %s, or 0 for %s", c.Timeout, maxTimeout, DefaultTimeout))
	}
	return all
}

// complete returns the configuration with its defaults filled in.
func (c Config) complete() Config {
	c.Mount = strings.Trim(c.Mount, "/")
	if c.Mount == "" {
		c.Mount = DefaultMount
	}
	c.Namespace = strings.Trim(c.Namespace, "/")
	c.Auth.Mount = strings.Trim(c.Auth.Mount, "/")
	if c.Auth.Mount == "" {
		c.Auth.Mount = c.Auth.Method
	}
	if c.Batch == 0 {
		c.Batch = DefaultBatch
	}
	if c.InFlight == 0 {
		c.InFlight = DefaultInFlight
	}
	if c.Timeout == 0 {
		c.Timeout = DefaultTimeout
	}
	if c.Refusals == nil {
		c.Refusals = new(Refusals)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Name is what operators call the engine, with defaults filled in: host, namespace and mount, as [Backend.Name] says.
func (c Config) Name() string {
	c = c.complete()
	u, err := parseAddress(c.Address)
	if err != nil {
		return c.Mount
	}
	return path.Join(u.Host, u.Path, c.Namespace, c.Mount)
}

func parseAddress(address string) (*url.URL, error) {
	u, err := url.Parse(address)
	switch {
	case address == "":
		return nil, errors.New("no address: give the server's URL, such as https://vault.example.net:8200")
	case err != nil:
		// The error of net/url quotes the whole address, and with it a password that someone may have put there.
		return nil, errors.New("the address is not a URL: give one such as https://vault.example.net:8200")
	case u.User != nil:
		return nil, errors.New("the address holds a user name or password: log in by auth")
	case u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("the address is not a server's URL: give one such as https://vault.example.net:8200")
	case u.Scheme == "https":
		return u, nil
	case u.Scheme != "http":
		return nil, fmt.Errorf("address of scheme %q: give https://", u.Scheme)
	}
	if ip, err := netip.ParseAddr(u.Hostname()); err != nil || !ip.IsLoopback() {
		return nil, fmt.Errorf("plain http to %s would show the login to the network: give https, or a loopback IP address such as 127.0.0.1", u.Hostname())
	}
	return u, nil
}

// pathWord is what a segment of a mount's path or namespace may be.
var pathWord = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?$`)

func checkPath(what, p string) error {
	for s := range strings.SplitSeq(strings.Trim(p, "/"), "/") {
		if !pathWord.MatchString(s) {
			return fmt.Errorf("%s %q: give words of letters, digits, - . _, parted by /", what, p)
		}
	}
	return nil
}

// keyName is what the engine takes for a key's name.
var keyName = regexp.MustCompile(`^\w([\w.-]*\w)?$`)

func (c *Config) checkKeys() error {
	if len(c.Keys) == 0 {
		return errors.New("no keys: name at least one key of the engine")
	}
	seen := map[KeyConfig]bool{}
	for _, k := range c.Keys {
		switch {
		case !keyName.MatchString(k.Name):
			return fmt.Errorf("key %q: give the name of a key in the engine: letters, digits, - . _", k.Name)
		case k.Version < 0:
			return fmt.Errorf("key %q has version %d: give 1 or more, or 0 for the latest", k.Name, k.Version)
		case seen[k]:
			return fmt.Errorf("key %q version %d is named twice: take one out", k.Name, k.Version)
		}
		seen[k] = true
	}
	return nil
}

func (a *AuthConfig) check(add func(string, error)) {
	need := map[string]string{} // field to file
	switch a.Method {
	case AuthTokenFile:
		need["Auth.TokenFile"] = a.TokenFile
		if a.Mount != "" {
			add("Auth.Mount", errors.New("auth method token-file has no mount: take it out"))
		}
	case AuthAppRole:
		need["Auth.RoleIDFile"], need["Auth.SecretIDFile"] = a.RoleIDFile, a.SecretIDFile
	case AuthKubernetes:
		need["Auth.JWTFile"] = a.JWTFile
		if a.Role == "" {
			add("Auth.Role", errors.New("auth method kubernetes needs a role"))
		}
	default:
		add("Auth.Method", fmt.Errorf("auth method %q: give %s, %s or %s", a.Method, AuthTokenFile, AuthAppRole, AuthKubernetes))
		return
	}
	if a.Mount != "" {
		add("Auth.Mount", checkPath("auth mount", a.Mount))
	}
	if a.Role != "" && a.Method != AuthKubernetes {
		add("Auth.Role", fmt.Errorf("auth method %s has no role: take it out", a.Method))
	}
	if a.SecretIDWrapped && a.Method != AuthAppRole {
		add("Auth.SecretIDWrapped", fmt.Errorf("auth method %s has no secret id: take it out", a.Method))
	}
	for field, file := range map[string]string{
		"Auth.TokenFile": a.TokenFile, "Auth.RoleIDFile": a.RoleIDFile, "Auth.SecretIDFile": a.SecretIDFile, "Auth.JWTFile": a.JWTFile,
	} {
		_, needed := need[field]
		switch {
		case needed && file == "":
			add(field, fmt.Errorf("auth method %s needs a file here", a.Method))
		case needed:
			add(field, checkFile(file, field == "Auth.TokenFile" || field == "Auth.SecretIDFile"))
		case file != "":
			add(field, fmt.Errorf("auth method %s does not use this file: take it out", a.Method))
		}
	}
}

func (t *TLSConfig) check(add func(string, error)) {
	if t.CA != "" {
		_, err := t.roots()
		add("TLS.CA", err)
	}
	if (t.Cert == "") != (t.Key == "") {
		add("TLS.Cert", errors.New("give both cert and key, or neither"))
	} else if t.Cert != "" {
		_, err := t.certificate()
		add("TLS.Cert", err)
	}
}

func (t *TLSConfig) roots() (*x509.CertPool, error) {
	if !filepath.IsAbs(t.CA) {
		return nil, fmt.Errorf("file %q: give an absolute path", t.CA)
	}
	pem, err := os.ReadFile(t.CA)
	if err != nil {
		return nil, fmt.Errorf("authorities to trust: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("file %q holds no certificate in PEM", t.CA)
	}
	return pool, nil
}

// certificate reads the client's certificate and key.
func (t *TLSConfig) certificate() (*tls.Certificate, error) {
	if !filepath.IsAbs(t.Cert) {
		return nil, fmt.Errorf("file %q: give an absolute path", t.Cert)
	}
	if err := checkFile(t.Key, true); err != nil {
		return nil, err
	}
	cert, err := tls.LoadX509KeyPair(t.Cert, t.Key)
	if err != nil {
		return nil, fmt.Errorf("client certificate: %w", err)
	}
	return &cert, nil
}
