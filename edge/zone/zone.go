package zone

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/reqtarget"
	"github.com/keyhaven/keyhaven/keyless"
)

// A Zone is a compiled [Config]. It is immutable.
type Zone struct {
	Name                string
	Hosts               []string       // canonical patterns
	Certificates        []*Certificate // at least one, best first
	KeyServer           string
	AllowRSADecrypt     bool
	PlainDigest         bool
	KeyEpoch            uint64
	HTTP1, HTTP2, HTTP3 bool

	upstreams []*Upstream // longest path first
}

// A Certificate is a chain with what follows from its leaf. It is immutable.
type Certificate struct {
	File  string
	Chain [][]byte // DER, leaf first
	Leaf  *x509.Certificate
	SKI   keyless.SKI // of the leaf's public key
	// Schemes holds what the leaf's key can sign in TLS 1.2 and 1.3, nothing weaker.
	Schemes []tls.SignatureScheme
}

// InForce reports whether the time lies within the leaf's validity.
func (c *Certificate) InForce(now time.Time) bool {
	return !now.Before(c.Leaf.NotBefore) && !now.After(c.Leaf.NotAfter)
}

// expiryWarning is how long before its end a certificate is remarked upon.
const expiryWarning = 14 * 24 * time.Hour

// A report collects the faults of one zone.
type report struct {
	at     string
	failed bool
	errorf func(key, format string, args ...any)
}

func (r *report) fault(key, format string, args ...any) {
	r.failed = true
	r.errorf(r.at+"."+key, format, args...)
}

// Compile checks configurations and loads their certificates. Faults go to errorf with keys below at ("zones[1].hosts[0]").
// Zones with a fault are left out. hasGroup says whether a key server group exists.
func Compile(at string, cfgs []Config, hasGroup func(string) bool, errorf func(key, format string, args ...any)) (zones []*Zone, warnings []string) {
	names := make(map[string]bool, len(cfgs))
	owners := make(map[string]string)
	for i := range cfgs {
		r := &report{at: fmt.Sprintf("%s[%d]", at, i), errorf: errorf}
		c := &cfgs[i]
		switch {
		case c.Name == "":
			r.fault("name", "the zone has no name; logs, metrics and session tickets refer to it by name")
		case names[c.Name]:
			r.fault("name", "%q names two zones", c.Name)
		}
		names[c.Name] = true
		z, w := compile(c, owners, hasGroup, r)
		if !r.failed {
			zones = append(zones, z)
		}
		warnings = append(warnings, w...)
	}
	return zones, warnings
}

// CompileBeside is [Compile] for zones that stand beside others, which win where both want a name or a host. It reads no
// files: certificates must be inline. Zones with a fault are left out, and faults has an entry for each, by its place.
func CompileBeside(others []*Zone, cfgs []Config, hasGroup func(string) bool) (zones []*Zone, faults map[int][]error, warnings []string) {
	names, owners := map[string]bool{}, map[string]string{}
	for _, z := range others {
		names[z.Name] = true
		for _, h := range z.Hosts {
			owners[h] = z.Name
		}
	}
	faults = map[int][]error{}
	for i := range cfgs {
		c := &cfgs[i]
		r := &report{at: "zone " + c.Name, errorf: func(key, format string, args ...any) {
			faults[i] = append(faults[i], fmt.Errorf("%s: %s", key, fmt.Sprintf(format, args...)))
		}}
		switch {
		case c.Name == "":
			r.fault("name", "is missing")
		case names[c.Name]:
			r.fault("name", "another zone, of the configuration file as a rule, is called %q already; give this one another name", c.Name)
		}
		c.refuseFiles(r)
		if r.failed {
			continue
		}
		names[c.Name] = true
		claimed := maps.Clone(owners)
		z, w := compile(c, claimed, hasGroup, r)
		if r.failed {
			continue
		}
		owners = claimed // a zone that is left out has no hosts
		zones, warnings = append(zones, z), append(warnings, w...)
	}
	return zones, faults, warnings
}

// refuseFiles reports what names a file.
func (c *Config) refuseFiles(r *report) {
	if c.Certificate != "" || len(c.Certificates) > 0 {
		r.fault("certificate", "names a file, which only the edge's own configuration may do; give certificate_pem")
	}
	for i := range c.Origins {
		if c.Origins[i].TLS.CA != "" {
			r.fault(fmt.Sprintf("origins[%d].tls.ca", i), "names a file, which only the edge's own configuration may do; give ca_pem")
		}
	}
}

func compile(c *Config, owners map[string]string, hasGroup func(string) bool, r *report) (z *Zone, warnings []string) {
	z = &Zone{
		Name: c.Name, KeyServer: c.KeyServer, AllowRSADecrypt: c.AllowRSADecrypt, PlainDigest: c.PlainDigest, KeyEpoch: c.KeyEpoch,
	}
	z.compileHosts(c, owners, r)
	if c.KeyServer == "" {
		r.fault("key_server", "no key server group; name one of key_servers")
	} else if !hasGroup(c.KeyServer) {
		r.fault("key_server", "%q is not the name of a sound entry of key_servers", c.KeyServer)
	}
	for i, v := range c.HTTP {
		switch v {
		case "1.1":
			z.HTTP1 = true
		case "2":
			z.HTTP2 = true
		case "3":
			z.HTTP3 = true
		default:
			r.fault(fmt.Sprintf("http[%d]", i), "%q is not an HTTP version; use \"1.1\", \"2\" or \"3\"", v)
		}
	}
	if len(c.HTTP) == 0 {
		z.HTTP1, z.HTTP2, z.HTTP3 = true, true, true
	}
	warnings = z.loadCertificates(c, r, time.Now())
	return z, append(warnings, z.compileOrigins(c, r)...)
}

func (z *Zone) compileHosts(c *Config, owners map[string]string, r *report) {
	if len(c.Hosts) == 0 {
		r.fault("hosts", "the zone has no host name")
	}
	for i, h := range c.Hosts {
		key := fmt.Sprintf("hosts[%d]", i)
		p, err := Pattern(h)
		if err != nil {
			r.fault(key, "%v", err)
			continue
		}
		if owner, taken := owners[p]; taken {
			r.fault(key, "%s belongs to zone %q already; a host belongs to one zone", p, owner)
			continue
		}
		owners[p] = c.Name
		z.Hosts = append(z.Hosts, p)
	}
}

// Upstream returns the origin for a path, by the longest prefix that ends at a segment's end, and false if none fits. The
// path is taken as it is on the wire: what is matched is what is forwarded.
func (z *Zone) Upstream(path string) (*Upstream, bool) {
	for _, u := range z.upstreams {
		if u.matches(path) {
			return u, true
		}
	}
	return nil, false
}

// Upstreams returns all origins, longest path first.
func (z *Zone) Upstreams() []*Upstream { return slices.Clone(z.upstreams) }

// Ambiguous reports whether t could be for another origin than the one its path leads to, if that origin reads the path in
// another way; a zone whose path decides nothing takes any.
func (z *Zone) Ambiguous(t reqtarget.Target) bool {
	if len(z.upstreams) == 1 && z.upstreams[0].Path == "" {
		return false
	}
	if t.Ambiguous() {
		return true
	}
	up, _ := z.Upstream(t.Path)
	return slices.ContainsFunc(t.Readings(), func(path string) bool {
		other, _ := z.Upstream(path)
		return other != up
	})
}

// A Table finds zones by name. It is immutable.
type Table struct {
	exact    map[string]*Zone
	wildcard map[string]*Zone // "*.example.com"
	zones    []*Zone
}

// NewTable returns a table of zones whose hosts do not overlap, as [Compile] makes sure.
func NewTable(zones []*Zone) *Table {
	t := &Table{exact: make(map[string]*Zone), wildcard: make(map[string]*Zone), zones: zones}
	for _, z := range zones {
		for _, h := range z.Hosts {
			if strings.HasPrefix(h, "*.") {
				t.wildcard[h] = z
			} else {
				t.exact[h] = z
			}
		}
	}
	return t
}

// Zones returns the zones in the order of the configuration.
func (t *Table) Zones() []*Zone { return t.zones }

// Lookup returns the zone of a canonical name: the one with that very name, else the one with a wildcard for its first
// label.
func (t *Table) Lookup(name string) (*Zone, bool) {
	if z, ok := t.exact[name]; ok {
		return z, true
	}
	if len(t.wildcard) == 0 {
		return nil, false
	}
	w, ok := wildcardOf(name)
	if !ok {
		return nil, false
	}
	z, ok := t.wildcard[w]
	return z, ok
}
