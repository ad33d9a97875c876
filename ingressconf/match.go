package ingressconf

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/keyhaven/keyhaven/internal/reqtarget"
	"github.com/keyhaven/keyhaven/vnet"
)

// CanonicalHost returns the form of a request's host, which may have a port, in which rules are looked up: a host name in
// the form of [vnet.CanonicalHost], or an address.
func CanonicalHost(host string) (string, error) {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	} else if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
		host = host[1 : len(host)-1]
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return a.Unmap().WithZone("").String(), nil
	}
	name, err := vnet.CanonicalHost(host)
	if err != nil {
		return "", err
	}
	if strings.HasPrefix(name, "*.") {
		return "", fmt.Errorf("%q is a pattern, not a host name", host)
	}
	return name, nil
}

// Match returns the first rule that takes a request, and its index from 0. host is in canonical form, path as it was sent,
// undecoded and without the query. The index is -1 if there are no rules.
func (c *Config) Match(host, path string) (int, *Target) {
	for i, t := range c.Targets() {
		if t.takesHost(host) && t.takesPath(path) {
			return i, t
		}
	}
	return -1, nil
}

// MatchFlow returns the first rule that takes a flow of bytes or packets for host, which has no path: rules with a path take
// none.
func (c *Config) MatchFlow(host string) (int, *Target) {
	for i, t := range c.Targets() {
		if t.takesHost(host) && t.path == nil {
			return i, t
		}
	}
	return -1, nil
}

// byPath reports whether the path of a request for host can make a difference.
func (c *Config) byPath(host string) bool {
	for _, t := range c.Targets() {
		if !t.takesHost(host) {
			continue
		}
		if t.path != nil {
			return true
		}
		return false
	}
	return false
}

// Ambiguous reports whether a request for host with the target t could be for another rule than the one that takes it, if the
// service reads the path in another way. Where no rule looks at the path, none is.
func (c *Config) Ambiguous(host string, t reqtarget.Target) bool {
	if !c.byPath(host) {
		return false
	}
	if t.Ambiguous() {
		return true
	}
	i, _ := c.Match(host, t.Path)
	return slices.ContainsFunc(t.Readings(), func(path string) bool {
		j, _ := c.Match(host, path)
		return i != j
	})
}

func (t *Target) takesHost(host string) bool {
	switch {
	case t.host == "":
		return true
	case t.below:
		return len(host) > len(t.host)+1 && strings.HasSuffix(host, t.host) && host[len(host)-len(t.host)-1] == '.'
	}
	return host == t.host
}

func (t *Target) takesPath(path string) bool { return t.path == nil || t.path.MatchString(path) }

// Explain says for each rule, up to the one that takes the request, why it does or does not.
func (c *Config) Explain(host, path string) []string {
	var lines []string
	for i, t := range c.Targets() {
		line := fmt.Sprintf("ingress[%d]: ", i)
		switch {
		case !t.takesHost(host):
			line += fmt.Sprintf("hostname %q does not match", t.Rule.Hostname)
		case !t.takesPath(path):
			line += fmt.Sprintf("path %q does not match", t.Rule.Path)
		default:
			why := "takes every request"
			if !t.catchesAll() {
				var parts []string
				if t.host != "" {
					parts = append(parts, fmt.Sprintf("hostname %q matches", t.Rule.Hostname))
				}
				if t.path != nil {
					parts = append(parts, fmt.Sprintf("path %q matches", t.Rule.Path))
				}
				why = strings.Join(parts, ", ")
			}
			return append(lines, line+why+": "+t.Service.String())
		}
		lines = append(lines, line)
	}
	return lines
}
