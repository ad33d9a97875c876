// Package vnet says which tunnel leads to which private address. It knows virtual networks, routes by prefix and by
// host name, and the questions people ask about them. It owns no socket and keeps no state of its own: a [Table] is an
// immutable value, and a change gives a new one that shares nearly all of the old one's memory.
package vnet

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
)

// ID is the stable identifier of a virtual network. Two virtual networks may hold the same prefix; nothing about a
// route means anything without its ID. The zero value is no network and matches no route. The name that people give
// a network may change; its ID does not.
type ID string

// Errors that callers branch on. Each comes wrapped with the routes or the text it is about.
var (
	// ErrOverlap says that a virtual network already holds a route for the very same prefix or host name. Prefixes
	// that lie inside one another are no overlap: the longest wins.
	ErrOverlap = errors.New("the route exists already")
	// ErrNotFound says that the virtual network holds no route for exactly that prefix or host name.
	ErrNotFound = errors.New("no such route")
	// ErrInvalid says that a route, prefix or host name is malformed.
	ErrInvalid = errors.New("invalid")
)

// A Route says that a tunnel leads to a prefix or to a host name of one virtual network. VNet and Prefix, or VNet and
// Host, are its key.
type Route struct {
	// VNet is the virtual network that the route belongs to. It must not be empty.
	VNet ID
	// Prefix is the route's address range, masked, in IPv4 form where it is IPv4-mapped. Exactly one of Prefix and
	// Host is set.
	Prefix netip.Prefix
	// Host is an exact host name, or "*." and a name, which stands for every name below it, at any depth, but not
	// for the name itself. See [CanonicalHost] for its form.
	Host string
	// Tunnel is the stable identifier of the tunnel that leads there. It must not be empty in a table.
	Tunnel string
	// Comment is free text for people.
	Comment string
}

// Destination returns the prefix or the host name as text.
func (r Route) Destination() string {
	if r.Host != "" {
		return r.Host
	}
	return r.Prefix.String()
}

// String names the route for messages: destination, network and tunnel.
func (r Route) String() string {
	return fmt.Sprintf("%s in vnet %q through tunnel %q", r.Destination(), r.VNet, r.Tunnel)
}

// Canonical returns r with its prefix or host name in canonical form, or an error that wraps [ErrInvalid] and says
// what to write instead.
func (r Route) Canonical() (Route, error) {
	if r.Tunnel == "" {
		return r, fmt.Errorf("vnet: %w route %s: it names no tunnel", ErrInvalid, r.Destination())
	}
	return r.canonicalKey()
}

// canonicalKey is Canonical for a route of which only the key counts.
func (r Route) canonicalKey() (Route, error) {
	if r.VNet == "" {
		return r, fmt.Errorf("vnet: %w route %s: it names no virtual network", ErrInvalid, r.Destination())
	}
	if (r.Host != "") == (r.Prefix != netip.Prefix{}) {
		return r, fmt.Errorf("vnet: %w route in vnet %q: give either a prefix or a host name", ErrInvalid, r.VNet)
	}
	var err error
	if r.Host != "" {
		r.Host, err = CanonicalHost(r.Host)
	} else {
		r.Prefix, err = CanonicalPrefix(r.Prefix)
	}
	return r, err
}

// Compare orders routes for display: by virtual network, prefixes before host names, then by address, length and name.
func Compare(a, b Route) int {
	if c := cmp.Compare(a.VNet, b.VNet); c != 0 {
		return c
	}
	if c := cmp.Compare(a.Host, b.Host); c != 0 {
		return c
	}
	return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
}

// compareLongest orders the most specific prefix first, then by address and virtual network.
func compareLongest(a, b Route) int {
	return cmp.Or(cmp.Compare(b.Prefix.Bits(), a.Prefix.Bits()),
		a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.VNet, b.VNet))
}
