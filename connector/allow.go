package connector

import (
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/keyhaven/keyhaven/vnet"
)

// Ports is an inclusive range of TCP ports. The zero value holds no port.
type Ports struct{ First, Last uint16 }

// AllPorts is every port that can be dialled.
var AllPorts = Ports{First: 1, Last: 65535}

// ParsePorts reads a port, a range such as "8000-8099", or "*" for all ports.
func ParsePorts(s string) (Ports, error) {
	if s == "*" {
		return AllPorts, nil
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || a > b {
		return Ports{}, fmt.Errorf("%q is neither a port (1 to 65535), nor a range such as 8000-8099, nor \"*\"", s)
	}
	return Ports{uint16(a), uint16(b)}, nil
}

// String returns what ParsePorts reads.
func (p Ports) String() string {
	switch {
	case p == AllPorts:
		return "*"
	case p.First == p.Last:
		return strconv.Itoa(int(p.First))
	}
	return fmt.Sprintf("%d-%d", p.First, p.Last)
}

// A Rule permits flows to one prefix or to the hosts of one pattern.
type Rule struct {
	// VNet is the virtual network whose flows the rule is about. Empty means every network.
	VNet vnet.ID
	// To is a prefix, an address, a host name, or "*." and a host name for every name below it.
	To string
	// Ports are the ports that may be dialled. At least one range.
	Ports []Ports
}

// A RuleError says which rule of a list is malformed.
type RuleError struct {
	Index int    // of the rule, from 0
	Field string // "to" or "ports"
	Err   error
}

// Error implements error.
func (e *RuleError) Error() string {
	return fmt.Sprintf("connector: allow rule %d: %s: %v", e.Index+1, e.Field, e.Err)
}

// Unwrap returns the cause.
func (e *RuleError) Unwrap() error { return e.Err }

// Allow is a compiled allow-list: what this connector may dial. It is immutable and safe for concurrent use. The zero
// value and nil permit nothing.
//
// A flow to an address needs a rule with a prefix that holds it. A flow to a host name is resolved here, and each
// resulting address needs either such a rule or one whose host pattern has the name. Addresses that lead to this host
// itself, to the link, or to the metadata service of a cloud are reached only if a rule's prefix lies wholly inside
// their special range: neither 0.0.0.0/0 nor a host name reaches 127.0.0.1 or 169.254.169.254.
type Allow struct {
	nets  map[vnet.ID]*ruleSet // by network; the empty ID holds the rules for every network
	rules int
}

// ruleSet is the rules of one network.
type ruleSet struct {
	prefixes map[netip.Prefix][]Ports
	lens4    []int // the prefix lengths that occur, so that a look-up asks for no others
	lens6    []int
	exact    map[string][]Ports
	below    map[string][]Ports // "*." patterns, without the "*."
}

// NewAllow compiles rules. Its errors are *RuleError, joined.
func NewAllow(rules []Rule) (*Allow, error) {
	a := &Allow{nets: map[vnet.ID]*ruleSet{}, rules: len(rules)}
	var errs []error
	for i, r := range rules {
		if len(r.Ports) == 0 {
			errs = append(errs, &RuleError{i, "ports", errors.New(`no port is permitted; list ports, or write "*" for all`)})
		}
		if slices.ContainsFunc(r.Ports, func(p Ports) bool { return p.First == 0 || p.First > p.Last }) {
			errs = append(errs, &RuleError{i, "ports", errors.New("a range is empty or begins at 0")})
		}
		set := a.nets[r.VNet]
		if set == nil {
			set = &ruleSet{prefixes: map[netip.Prefix][]Ports{}, exact: map[string][]Ports{}, below: map[string][]Ports{}}
			a.nets[r.VNet] = set
		}
		if err := set.add(r); err != nil {
			errs = append(errs, &RuleError{i, "to", err})
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return a, nil
}

func (s *ruleSet) add(r Rule) error {
	if strings.Contains(r.To, "/") || isAddr(r.To) {
		p, err := vnet.ParsePrefix(r.To)
		if err != nil {
			return err
		}
		if _, ok := s.prefixes[p]; !ok {
			lens := &s.lens6
			if p.Addr().Is4() {
				lens = &s.lens4
			}
			if !slices.Contains(*lens, p.Bits()) {
				*lens = append(*lens, p.Bits())
			}
		}
		s.prefixes[p] = append(s.prefixes[p], r.Ports...)
		return nil
	}
	host, err := vnet.CanonicalHost(r.To)
	if err != nil {
		return err
	}
	if name, ok := strings.CutPrefix(host, "*."); ok {
		s.below[name] = append(s.below[name], r.Ports...)
	} else {
		s.exact[host] = append(s.exact[host], r.Ports...)
	}
	return nil
}

func isAddr(s string) bool {
	_, err := netip.ParseAddr(s)
	return err == nil
}

// anyPort stands for a flow without a port, which every rule that has ports at all permits.
const anyPort = 0

func holds(ports []Ports, port uint16) bool {
	return port == anyPort && len(ports) > 0 || slices.ContainsFunc(ports, func(p Ports) bool { return p.First <= port && port <= p.Last })
}

// Len returns the number of rules. Zero permits nothing.
func (a *Allow) Len() int {
	if a == nil {
		return 0
	}
	return a.rules
}

// networks yields the networks that have rules; the empty ID stands for the rules for every network.
func (a *Allow) networks() iter.Seq[vnet.ID] {
	return func(yield func(vnet.ID) bool) {
		if a == nil {
			return
		}
		for v := range a.nets {
			if !yield(v) {
				return
			}
		}
	}
}

// sets returns the rules that count for flows of network v.
func (a *Allow) sets(v vnet.ID) []*ruleSet {
	if a == nil {
		return nil
	}
	sets := make([]*ruleSet, 0, 2)
	for _, id := range []vnet.ID{v, ""} {
		if s := a.nets[id]; s != nil {
			sets = append(sets, s)
		}
		if v == "" {
			break
		}
	}
	return sets
}

// Addr reports whether a flow of network v may be connected to this address and port. An IPv4-mapped IPv6 address
// counts as IPv4; an address with a zone is never permitted.
func (a *Allow) Addr(v vnet.ID, to netip.AddrPort) bool {
	return a.permits(v, "", to)
}

// Host reports whether a flow of network v that asked for the host name, in canonical form, may be connected to this
// address and port, which the name resolved to.
func (a *Allow) Host(v vnet.ID, name string, to netip.AddrPort) bool {
	return a.permits(v, name, to)
}

// Echo reports whether a flow of network v may ping this address, for which a rule's ports do not count. name is the host
// name that resolved to it, in canonical form, or empty.
func (a *Allow) Echo(v vnet.ID, name string, to netip.Addr) bool {
	return a.reaches(v, name, netip.AddrPortFrom(to, anyPort))
}

func (a *Allow) permits(v vnet.ID, name string, to netip.AddrPort) bool {
	return to.Port() != anyPort && a.reaches(v, name, to)
}

// reaches is permits, but with anyPort rules count whatever their ports are.
func (a *Allow) reaches(v vnet.ID, name string, to netip.AddrPort) bool {
	addr := to.Addr()
	if !addr.IsValid() || addr.Zone() != "" {
		return false
	}
	addr = addr.Unmap()
	special := specialRange(addr)
	for _, s := range a.sets(v) {
		if s.hasAddr(addr, to.Port(), special) || name != "" && special == 0 && s.hasName(name, to.Port()) {
			return true
		}
	}
	return false
}

// Resolvable reports whether any address of the host name could be permitted, so that it makes sense to resolve it.
func (a *Allow) Resolvable(v vnet.ID, name string, port uint16) bool {
	return port != anyPort && a.resolvable(v, name, port)
}

// resolvable is Resolvable, but with anyPort rules count whatever their ports are.
func (a *Allow) resolvable(v vnet.ID, name string, port uint16) bool {
	for _, s := range a.sets(v) {
		if s.hasName(name, port) {
			return true
		}
		for _, ports := range s.prefixes {
			if holds(ports, port) {
				return true
			}
		}
	}
	return false
}

// hasAddr reports whether a prefix of at least atLeast bits holds addr and permits port.
func (s *ruleSet) hasAddr(addr netip.Addr, port uint16, atLeast int) bool {
	lens := s.lens6
	if addr.Is4() {
		lens = s.lens4
	}
	for _, n := range lens {
		if n < atLeast {
			continue
		}
		if p, err := addr.Prefix(n); err == nil && holds(s.prefixes[p], port) {
			return true
		}
	}
	return false
}

func (s *ruleSet) hasName(name string, port uint16) bool {
	if holds(s.exact[name], port) {
		return true
	}
	for {
		_, above, ok := strings.Cut(name, ".")
		if !ok {
			return false
		}
		if holds(s.below[above], port) {
			return true
		}
		name = above
	}
}

// special are the ranges that only a prefix inside them opens. See RFC 6890 and the documentation of the clouds whose
// metadata services are named.
var special = func() (list []netip.Prefix) {
	for _, s := range []string{
		"0.0.0.0/8", "127.0.0.0/8", "::/128", "::1/128", // this host
		"169.254.0.0/16", "fe80::/10", // the link; 169.254.169.254 is the metadata service of most clouds
		"224.0.0.0/4", "255.255.255.255/32", "ff00::/8", // many hosts
		"100.100.100.200/32", "168.63.129.16/32", "192.0.0.0/24", "fd00:ec2::254/128", "fd20:ce::254/128", // further metadata services
	} {
		list = append(list, netip.MustParsePrefix(s))
	}
	return list
}()

// embedding are IPv6 ranges whose addresses carry an IPv4 address, at the given octet: NAT64 (RFC 6052, RFC 8215), 6to4
// (RFC 3056), IPv4-translated (RFC 2765), and the obsolete IPv4-compatible form (RFC 4291, section 2.5.5.1). A site's own
// NAT64 prefix cannot be known.
var embedding = []struct {
	prefix netip.Prefix
	at     int
}{
	{netip.MustParsePrefix("64:ff9b::/96"), 12},
	{netip.MustParsePrefix("64:ff9b:1::/48"), 12},
	{netip.MustParsePrefix("::ffff:0:0:0/96"), 12},
	{netip.MustParsePrefix("2002::/16"), 2},
	{netip.MustParsePrefix("::/96"), 12},
}

// specialRange returns the length of the special range that holds a, or 0 if none does.
func specialRange(a netip.Addr) int {
	for _, p := range special {
		if p.Contains(a) {
			return p.Bits()
		}
	}
	for _, e := range embedding {
		if e.prefix.Contains(a) {
			b := a.As16()
			if specialRange(netip.AddrFrom4([4]byte(b[e.at:e.at+4]))) > 0 {
				return e.prefix.Bits()
			}
		}
	}
	return 0
}
