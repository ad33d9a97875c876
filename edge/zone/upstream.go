package zone

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/edge/install"
	"github.com/keyhaven/keyhaven/edge/spec"
)

// An Upstream is a compiled [Origin]. It is immutable.
type Upstream struct {
	Path string // prefix without a slash at its end; "" fits every path
	VNet string
	Host string // name or address to dial; "" with Pool, Tunnel or Site
	Port uint16
	// Pool names a pool of endpoints, Tunnel a tunnel whose ingress answers, instead of the address.
	Pool, Tunnel string
	// Site is what the edge answers with itself, instead of the address.
	Site *install.Site
	// ProxyProtocol is "", "v1" or "v2".
	ProxyProtocol string
	// Carrier is "", "quic" or "tcp".
	Carrier string
	// TLS is nil for http. It must be cloned before use.
	TLS *tls.Config
	H2C bool
	// HostHeader replaces the visitor's Host, unless empty.
	HostHeader string
}

// Addr returns host:port, or what stands for it in a URL.
func (u *Upstream) Addr() string {
	switch {
	case u.Pool != "":
		return "pool"
	case u.Tunnel != "":
		return "ingress"
	case u.Site != nil:
		return "install"
	}
	return net.JoinHostPort(u.Host, strconv.Itoa(int(u.Port)))
}

// Scheme returns "http" or "https".
func (u *Upstream) Scheme() string {
	if u.TLS != nil {
		return "https"
	}
	return "http"
}

func (u *Upstream) matches(path string) bool {
	return strings.HasPrefix(path, u.Path) && (len(path) == len(u.Path) || path[len(u.Path)] == '/')
}

func (z *Zone) compileOrigins(c *Config, r *report) (warnings []string) {
	if len(c.Origins) == 0 {
		r.fault("origins", "the zone has no origin")
	}
	for i := range c.Origins {
		o, at := &c.Origins[i], fmt.Sprintf("origins[%d]", i)
		u, ok := o.compile(at, r)
		if !ok {
			continue
		}
		if slices.ContainsFunc(z.upstreams, func(v *Upstream) bool { return v.Path == u.Path }) {
			r.fault(at+".path", "%q has an origin already; a path has one", o.Path)
			continue
		}
		z.upstreams = append(z.upstreams, u)
		if u.Site != nil {
			if err := u.Site.Check(); err != nil {
				warnings = append(warnings, fmt.Sprintf("%s.%s.install: nothing is served before this is mended: %v", r.at, at, err))
			}
		}
	}
	slices.SortStableFunc(z.upstreams, func(a, b *Upstream) int { return len(b.Path) - len(a.Path) })
	return warnings
}

func (o *Origin) compile(at string, r *report) (u *Upstream, ok bool) {
	fault := func(key, format string, args ...any) {
		r.fault(at+"."+key, format, args...)
		ok = false
	}
	ok = true
	u = &Upstream{Path: strings.TrimSuffix(o.Path, "/"), VNet: o.VNet, H2C: o.H2C, HostHeader: o.Host, ProxyProtocol: o.ProxyProtocol, Carrier: o.Carrier}
	if o.Path != "" && (o.Path[0] != '/' || strings.ContainsAny(o.Path, "?#%\\; \t") || strings.Contains(o.Path, "//") || strings.Contains(o.Path+"/", "/./") || strings.Contains(o.Path+"/", "/../")) {
		fault("path", "%q is not a plain path; it must begin with / and hold no dot segment, escape or delimiter", o.Path)
	}
	if o.Host != "" {
		if _, err := CanonicalHost(o.Host); err != nil {
			fault("host", "%q: %v", o.Host, err)
		}
	}
	o.checkWay(fault)
	var scheme string
	if scheme = o.target(u, fault); scheme == "" {
		return u, false
	}
	if scheme == "http" {
		if o.TLS != (OriginTLS{}) {
			fault("tls", "the origin's url is http, or it has none, so there is no TLS to configure")
		}
		return u, ok
	}
	if o.H2C {
		fault("h2c", "is for http origins; an https origin negotiates HTTP/2 by itself")
	}
	u.TLS = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: u.Host, InsecureSkipVerify: o.TLS.InsecureSkipVerify} //nolint:gosec // G402: the operator's explicit switch, off by default
	if o.TLS.ServerName != "" {
		u.TLS.ServerName = o.TLS.ServerName
	}
	roots, err := o.TLS.roots()
	if err != nil {
		fault("tls.ca", "%v", err)
	}
	u.TLS.RootCAs = roots
	return u, ok
}

// checkWay checks how the origin is reached.
func (o *Origin) checkWay(fault func(key, format string, args ...any)) {
	switch o.ProxyProtocol {
	case "", spec.ProxyV1, spec.ProxyV2:
	default:
		fault("proxy_protocol", "%q is not v1 or v2", o.ProxyProtocol)
	}
	switch o.Carrier {
	case "", "quic", "tcp":
	default:
		fault("carrier", "%q is not quic or tcp; leave it out to have it chosen by what is sent", o.Carrier)
	}
	if o.Pool == "" && o.Scheme != "" {
		fault("scheme", "goes with pool; a url has its own, and a tunnel's ingress speaks http")
	}
	if o.URL == "" && o.VNet != "" {
		fault("vnet", "goes with url; the endpoints of a pool have their own")
	}
	if o.URL == "" && o.ProxyProtocol != "" {
		fault("proxy_protocol", "goes with url; set it at the pool, or at the tunnel's ingress rule")
	}
}

// target fills in where u leads and returns the scheme, "" after a fault.
func (o *Origin) target(u *Upstream, fault func(key, format string, args ...any)) (scheme string) {
	n := 0
	for _, s := range []string{o.URL, o.Pool, o.Tunnel, o.Install} {
		if s != "" {
			n++
		}
	}
	switch {
	case n > 1:
		fault("url", "an origin has exactly one of url, pool, tunnel and install")
		return ""
	case o.Install != "":
		return o.site(u, fault)
	case len(o.InstallKeys) > 0:
		fault("install_keys", "goes with install")
		return ""
	case o.Tunnel != "":
		u.Tunnel = o.Tunnel
		return "http"
	case o.Pool != "" && (o.Scheme == "" || o.Scheme == "http"):
		u.Pool = o.Pool
		return "http"
	case o.Pool != "" && o.Scheme == "https":
		u.Pool = o.Pool
		return "https"
	case o.Pool != "":
		fault("scheme", "%q is not http or https", o.Scheme)
		return ""
	}
	t, err := url.Parse(o.URL)
	if err != nil || (t.Scheme != "http" && t.Scheme != "https") || t.Hostname() == "" ||
		t.User != nil || (t.Path != "" && t.Path != "/") || t.RawQuery != "" || t.Fragment != "" {
		fault("url", "%q is not http://host:port or https://host:port", o.URL)
		return ""
	}
	u.Host, u.Port = t.Hostname(), 80
	if t.Scheme == "https" {
		u.Port = 443
	}
	if p := t.Port(); p != "" {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			fault("url", "%q: port %q is not a number from 1 to 65535", o.URL, p)
		}
		u.Port = uint16(n)
	}
	return t.Scheme
}

// site fills in what the edge serves itself, and returns the scheme, "" after a fault.
func (o *Origin) site(u *Upstream, fault func(key, format string, args ...any)) (scheme string) {
	if o.H2C || o.Host != "" || o.Carrier != "" {
		fault("install", "the edge itself answers, so that h2c, host and carrier have no meaning")
		return ""
	}
	keys := make([]minisign.PublicKey, 0, len(o.InstallKeys))
	for i, text := range o.InstallKeys {
		k, err := install.ParseKey(text)
		if err != nil {
			fault(fmt.Sprintf("install_keys[%d]", i), "%v", err)
			return ""
		}
		keys = append(keys, k)
	}
	s, err := install.New(o.Install, keys)
	if err != nil {
		fault("install", "%v; name the directory in install, and in install_keys the keys that its SHA256SUMS is signed with", err)
		return ""
	}
	u.Site = s
	return "http"
}

// roots returns the roots to trust, nil for the system's.
func (t *OriginTLS) roots() (*x509.CertPool, error) {
	var certs []*x509.Certificate
	var err error
	switch {
	case t.CA != "":
		certs, err = readChain(t.CA)
	case t.CAPEM != "":
		certs, err = parseChain("ca_pem", []byte(t.CAPEM))
	default:
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	for _, c := range certs {
		pool.AddCert(c)
	}
	return pool, nil
}
