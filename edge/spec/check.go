package spec

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Limits of what may be configured.
const (
	MaxEndpoints = 1024 // of one pool
	maxName      = 63
	minInterval  = time.Second
	maxInterval  = time.Hour
	maxTTL       = 7 * 24 * time.Hour
	maxRetries   = 5
	maxThreshold = 100
	maxHeaders   = 32
	maxBody      = 1024
)

func port(p uint16) string { return strconv.Itoa(int(p)) }

// A FieldError is a fault of one field.
type FieldError struct {
	Field string // path below the checked value, such as "endpoints[1].weight"
	Text  string
}

// Error implements error.
func (e *FieldError) Error() string { return e.Field + ": " + e.Text }

// faults collects the faults of one value.
type faults struct {
	at   string
	list *[]error
}

func (f faults) add(field, format string, args ...any) {
	*f.list = append(*f.list, &FieldError{Field: f.at + field, Text: fmt.Sprintf(format, args...)})
}

func (f faults) below(at string) faults { return faults{f.at + at + ".", f.list} }

// oneOf checks a word. The empty word is good where it is among the words.
func (f faults) oneOf(field, got string, words ...string) {
	if slices.Contains(words, got) {
		return
	}
	words = slices.DeleteFunc(slices.Clone(words), func(w string) bool { return w == "" })
	f.add(field, "%q is not one of %s", got, strings.Join(words, ", "))
}

// CheckName says what is wrong with a name of a pool, an endpoint or a port: letters, digits and "-_.:/[]", at most 63 bytes,
// beginning with a letter or digit.
func CheckName(name string) error {
	if name == "" {
		return fmt.Errorf("there is no name")
	}
	if len(name) > maxName {
		return fmt.Errorf("%q has more than %d bytes", name, maxName)
	}
	for i := range len(name) {
		c := name[i]
		letter := 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
		if !letter && (i == 0 || !strings.ContainsRune("-_.:/[]", rune(c))) {
			return fmt.Errorf("%q may hold letters, digits and - _ . : / [ ], and begins with a letter or digit", name)
		}
	}
	return nil
}

// Validate returns every fault of the pool by itself, as [*FieldError]s. References between pools are for [CheckPools].
func (p *PoolConfig) Validate() []error {
	var list []error
	f := faults{list: &list}
	if err := CheckName(p.Name); err != nil {
		f.add("name", "%v", err)
	}
	f.oneOf("steering", p.Steering, "", SteerRandom, SteerRoundRobin, SteerHash, SteerLeastRequests, SteerLeastConnections)
	f.oneOf("pool_steering", p.PoolSteering, "", SteerFailover, SteerRandom, SteerLatency, SteerLeastRequests)
	f.oneOf("proxy_protocol", p.ProxyProtocol, "", ProxyV1, ProxyV2)
	switch {
	case len(p.Endpoints) == 0 && len(p.Members) == 0:
		f.add("endpoints", "the pool has neither endpoints nor members")
	case len(p.Endpoints) > 0 && len(p.Members) > 0:
		f.add("members", "the pool has endpoints; make a pool of their own of them and name it here")
	case len(p.Endpoints) > MaxEndpoints:
		f.add("endpoints", "has %d entries; the limit is %d", len(p.Endpoints), MaxEndpoints)
	case len(p.Members) > 0:
		p.checkMembers(f)
	}
	p.checkEndpoints(f)
	if p.Minimum < 0 || p.Minimum > max(1, len(p.Endpoints)) && len(p.Members) == 0 {
		f.add("minimum", "%d does not lie between 1 and the number of endpoints", p.Minimum)
	}
	if p.Monitor != nil {
		p.Monitor.check(f.below("monitor"))
	}
	if p.Affinity != nil {
		p.Affinity.check(f.below("affinity"))
	}
	return list
}

func (p *PoolConfig) checkMembers(f faults) {
	if p.Monitor != nil {
		f.add("monitor", "a pool of pools has the monitors of its members")
	}
	if p.ProxyProtocol != "" {
		f.add("proxy_protocol", "is a matter of the members")
	}
	if p.Minimum > 1 {
		f.add("minimum", "a pool of pools is healthy if one of its members is")
	}
	for i, m := range p.Members {
		if slices.Index(p.Members, m) < i {
			f.add(fmt.Sprintf("members[%d]", i), "%q is there twice", m)
		}
	}
}

func (p *PoolConfig) checkEndpoints(f faults) {
	type place struct {
		vnet, host, connector string
		port                  uint16
	}
	labels, places := map[string]bool{}, map[place]bool{}
	for i := range p.Endpoints {
		e := &p.Endpoints[i]
		f := f.below(fmt.Sprintf("endpoints[%d]", i))
		if e.Name != "" {
			if err := CheckName(e.Name); err != nil {
				f.add("name", "%v", err)
			}
		}
		checkHost(f, e.Host, e.Port)
		at := place{e.VNet, strings.ToLower(e.Host), e.Connector, e.Port}
		switch {
		case places[at]:
			f.add("host", "%s port %d is in the pool already; an address may stand there once for each virtual network", e.Host, e.Port)
		case labels[e.Label()]:
			f.add("name", "%q names two endpoints", e.Label())
		}
		places[at], labels[e.Label()] = true, true
		if w := e.Share(); math.IsNaN(w) || w < 0 || w > 1 {
			f.add("weight", "must lie between 0 and 1, have %v", w)
		}
		if strings.ContainsAny(e.HostHeader, " \t\r\n/") {
			f.add("host_header", "%q is not a host", e.HostHeader)
		}
	}
}

func checkHost(f faults, host string, port uint16) {
	if host == "" || len(host) > 255 || strings.ContainsAny(host, " \t\r\n/@[]%") {
		f.add("host", "%q is not an address or a host name", host)
	}
	if port == 0 {
		f.add("port", "must lie between 1 and 65535")
	}
}

func (m *Monitor) check(f faults) {
	f.oneOf("type", m.Type, MonitorHTTP, MonitorHTTPS, MonitorTCP, MonitorICMP)
	if m.Path != "" && (m.Path[0] != '/' || strings.ContainsAny(m.Path, " \t\r\n#")) {
		f.add("path", "%q does not begin with /, or holds what may not stand in a path", m.Path)
	}
	f.oneOf("method", m.Method, "", "GET", "HEAD", "OPTIONS", "POST")
	if _, err := ParseCodes(m.Expect); err != nil {
		f.add("expect", "%v", err)
	}
	if len(m.Body) > maxBody {
		f.add("body", "is longer than %d bytes", maxBody)
	}
	if len(m.Headers) > maxHeaders {
		f.add("headers", "has %d entries; the limit is %d", len(m.Headers), maxHeaders)
	}
	for name, value := range m.Headers {
		if name == "" || strings.ContainsAny(name, " \t\r\n:") || strings.ContainsAny(value, "\r\n\x00") {
			f.add("headers", "%q is not a header with a value", name)
		}
	}
	http := m.Type == MonitorHTTP || m.Type == MonitorHTTPS
	if !http && (m.Path != "" || m.Method != "" || m.Expect != "" || m.Body != "" || len(m.Headers) > 0 || m.HostHeader != "" || m.FollowRedirects) {
		f.add("type", "path, method, expect, body, headers, host_header and follow_redirects are for http and https")
	}
	interval, timeout := m.Every(), m.Patience()
	if interval < minInterval || interval > maxInterval {
		f.add("interval", "must lie between %v and %v, have %v", minInterval, maxInterval, interval)
	}
	if timeout <= 0 || timeout > interval {
		f.add("timeout", "must lie between 0 and the interval of %v, have %v", interval, timeout)
	}
	if m.Retries < 0 || m.Retries > maxRetries {
		f.add("retries", "must lie between 0 and %d, have %d", maxRetries, m.Retries)
	}
	if m.Up < 0 || m.Up > maxThreshold {
		f.add("up", "must lie between 1 and %d, have %d", maxThreshold, m.Up)
	}
	if m.Down < 0 || m.Down > maxThreshold {
		f.add("down", "must lie between 1 and %d, have %d", maxThreshold, m.Down)
	}
}

func (a *Affinity) check(f faults) {
	f.oneOf("type", a.Type, AffinityNone, AffinityCookie, AffinityIPCookie, AffinityHeader)
	for i := range len(a.Name) {
		if c := a.Name[i]; c <= ' ' || c >= 0x7f || strings.ContainsRune(`()<>@,;:\"/[]?={}`, rune(c)) {
			f.add("name", "%q is not a token (RFC 9110, section 5.6.2)", a.Name)
			break
		}
	}
	if a.Type == AffinityHeader && a.Name == "" {
		f.add("name", "is empty; name the header whose value keeps a visitor at one endpoint")
	}
	if ttl := time.Duration(a.TTL); ttl != 0 && (ttl < 30*time.Second || ttl > maxTTL) {
		f.add("ttl", "must lie between 30s and %v, have %v", maxTTL, ttl)
	}
}

// Validate returns every fault of the port, as [*FieldError]s. Whether the pool exists is for the caller to check.
func (p *PortConfig) Validate() []error {
	var list []error
	f := faults{list: &list}
	if err := CheckName(p.Name); err != nil {
		f.add("name", "%v", err)
	}
	f.oneOf("protocol", p.Protocol, "tcp", "udp")
	if _, port, err := net.SplitHostPort(p.Listen); err != nil {
		f.add("listen", "%q is not host:port", p.Listen)
	} else if n, err := strconv.ParseUint(port, 10, 16); err != nil {
		f.add("listen", "%q has no port from 0 to 65535", p.Listen)
	} else if n == 7844 {
		f.add("listen", "7844 is the tunnels' own port")
	}
	p.checkTarget(f)
	if p.ProxyProtocol == ProxyV1 && p.Protocol == "udp" {
		f.add("proxy_protocol", "v1 knows TCP alone; use v2")
	} else {
		f.oneOf("proxy_protocol", p.ProxyProtocol, "", ProxyV1, ProxyV2)
	}
	for i, a := range p.Allow {
		if _, err := netip.ParsePrefix(a); err != nil {
			f.add(fmt.Sprintf("allow[%d]", i), "%q is not a prefix such as 192.0.2.0/24; one address is a /32 or /128", a)
		}
	}
	if d := time.Duration(p.IdleTimeout); d != 0 && (d < time.Second || d > 24*time.Hour) {
		f.add("idle_timeout", "must lie between 1s and 24h, have %v", d)
	}
	if p.MaxConnections < 0 || p.MaxConnections > 1_000_000 {
		f.add("max_connections", "must lie between 1 and 1000000, have %d", p.MaxConnections)
	}
	return list
}

func (p *PortConfig) checkTarget(f faults) {
	n := 0
	for _, set := range []bool{p.Host != "", p.Pool != "", p.Tunnel != ""} {
		if set {
			n++
		}
	}
	switch {
	case n != 1:
		f.add("host", "the port leads to exactly one of host, pool and tunnel")
	case p.Host != "":
		checkHost(f, p.Host, p.Port)
	case p.VNet != "" || p.Port != 0:
		f.add("port", "vnet and port go with host")
	case p.Tunnel != "" && p.Service == "":
		f.add("service", "is empty; give the host name of the tunnel's ingress rule")
	}
	if p.Service != "" && p.Tunnel == "" {
		f.add("service", "goes with tunnel")
	}
}
