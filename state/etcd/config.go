package etcd

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/keyhaven/keyhaven/internal/credential"
	"github.com/keyhaven/keyhaven/state"
)

// DefaultPrefix is where an installation's entries stand in the cluster unless [Config] says otherwise.
const DefaultPrefix = "/keyhaven/"

// defaultTimeout bounds each request to the cluster.
const defaultTimeout = 5 * time.Second

// A Config says where the cluster is and how to come in.
type Config struct {
	// Endpoints are the client URLs of the cluster's members. Required. Towards hosts other than this one they must be
	// https.
	Endpoints []string
	// Prefix is put before every key, so that several installations can share a cluster. If empty, [DefaultPrefix].
	Prefix string
	// CA is a file of the certificates, in PEM, that the members' are signed with. If empty, the system's are trusted.
	CA string
	// Cert and Key are files with this edge's client certificate and its key, in PEM. Both or none.
	Cert, Key string
	// Username and PasswordFile are for clusters with users. Both or none; the file's last line end is not part of the
	// password.
	Username, PasswordFile string
	// Timeout bounds each request, and so how long it takes until the cluster counts as away. If zero, 5s.
	Timeout time.Duration
	// Cache is a file with a copy of the state, mode 0600: with it, reads are answered while the cluster is away, and a
	// store opens without it. If empty, there is none. The directory must exist; each process needs its own.
	Cache string
	// Volatile are prefixes of keys whose changes alone do not make the file worth writing anew.
	Volatile []string
	// Logger gets what becomes of the cache. If nil, nothing is logged.
	Logger *slog.Logger
}

// Check reports everything in c that cannot work, without touching the files.
func (c Config) Check() (errs []error) {
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if len(c.Endpoints) == 0 {
		fail("no endpoints; name the client URLs of the cluster's members, such as https://etcd1.example.com:2379")
	}
	for _, e := range c.Endpoints {
		if err := checkEndpoint(e); err != nil {
			errs = append(errs, err)
		}
	}
	if c.Prefix != "" {
		if err := state.CheckKey(c.Prefix); err != nil || len(c.Prefix) > 200 {
			fail("prefix %q is too long or holds characters that no key has", clip(c.Prefix))
		}
	}
	if (c.Cert == "") != (c.Key == "") {
		fail("a client certificate needs both cert and key")
	}
	if (c.Username == "") != (c.PasswordFile == "") {
		fail("a user needs both username and password_file")
	}
	if c.Timeout < 0 {
		fail("the timeout %s is negative", c.Timeout)
	}
	return errs
}

func checkEndpoint(e string) error {
	u, err := url.Parse(e)
	if err != nil || u.Host == "" || u.User != nil || u.Path != "" && u.Path != "/" || u.RawQuery != "" {
		return fmt.Errorf("endpoint %q is no URL such as https://etcd1.example.com:2379", clip(e))
	}
	switch u.Scheme {
	case "https":
		return nil
	case "http":
		host := u.Hostname()
		if a, err := netip.ParseAddr(host); err == nil && a.IsLoopback() || host == "localhost" {
			return nil
		}
		return fmt.Errorf("endpoint %q is not encrypted; use https, since the store holds session ticket keys", clip(e))
	}
	return fmt.Errorf("endpoint %q is neither http nor https", clip(e))
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

// prefix is the one to put before keys.
func (c Config) prefix() string {
	if c.Prefix == "" {
		return DefaultPrefix
	}
	return strings.TrimSuffix(c.Prefix, "/") + "/"
}

func (c Config) client() (clientv3.Config, error) {
	cc := clientv3.Config{
		DialTimeout:          c.Timeout,
		DialKeepAliveTime:    6 * time.Second, // servers refuse more than one in 5s
		DialKeepAliveTimeout: 3 * time.Second,
		Username:             c.Username,
		Logger:               zap.NewNop(), // what matters comes back as an error
	}
	for _, e := range c.Endpoints {
		cc.Endpoints = append(cc.Endpoints, strings.TrimSuffix(e, "/"))
	}
	var err error
	if cc.TLS, err = c.tls(); err != nil {
		return cc, err
	}
	if c.PasswordFile != "" {
		cc.Password, err = readPassword(c.PasswordFile)
	}
	return cc, err
}

// maxPassword bounds a password file.
const maxPassword = 4096

func readPassword(path string) (string, error) {
	path, err := credential.File(path)
	if err != nil {
		return "", fmt.Errorf("password file: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	if info.Size() > maxPassword {
		return "", fmt.Errorf("password file %q has %d bytes; the limit is %d", path, info.Size(), maxPassword)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read the password: %w", err)
	}
	b = bytes.TrimRight(b, "\r\n")
	if len(b) == 0 {
		return "", fmt.Errorf("password file %q is empty", path)
	}
	return string(b), nil
}

// tls is nil if no endpoint is encrypted. The client certificate is read again for each connection, so that a renewed one
// is used without a restart.
func (c Config) tls() (*tls.Config, error) {
	encrypted := false
	for _, e := range c.Endpoints {
		encrypted = encrypted || strings.HasPrefix(e, "https:")
	}
	if !encrypted {
		return nil, nil
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, fmt.Errorf("read the authority of the members: %w", err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("file %q holds no certificate in PEM", c.CA)
		}
	}
	if c.Cert != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.Cert, c.Key)
			if err != nil {
				return nil, fmt.Errorf("read the client certificate: %w", err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return conf, nil
}

// Open connects to the cluster. It fails with [state.ErrUnavailable] if no member answers in time, and there is no cache to
// start from.
func Open(cfg Config) (state.Store, error) {
	if err := errors.Join(cfg.Check()...); err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = defaultTimeout
	}
	if cfg.Cache != "" {
		c, err := openCached(cfg)
		if err != nil {
			return nil, err // not a nil *cached in an interface
		}
		return c, nil
	}
	s, err := open(cfg, maxQueueEvents, maxQueueBytes)
	if err != nil {
		return nil, err // not a nil *store in an interface
	}
	return s, nil
}

// hosts names the endpoints for people.
func hosts(endpoints []string) string {
	var names []string
	for _, e := range endpoints {
		if u, err := url.Parse(e); err == nil {
			e = net.JoinHostPort(u.Hostname(), u.Port())
		}
		names = append(names, e)
	}
	return strings.Join(names, ", ")
}
