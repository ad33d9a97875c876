package vnet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// More networks than the front of a table has places, some with ids of one byte: each is found while it is there, and not
// afterwards, and no other in its stead.
func TestManyNetworks(t *testing.T) {
	prefix := netip.MustParsePrefix("10.0.0.0/8")
	var routes []Route
	for i := range 3 * frontPlaces {
		id := fmt.Sprintf("net-%d", i)
		if i < 20 {
			id = string(rune('a' + i))
		}
		routes = append(routes, Route{VNet: ID(id), Prefix: prefix, Tunnel: "tunnel-" + id})
	}
	built, err := Build(routes)
	if err != nil {
		t.Fatal(err)
	}
	grown := &Table{}
	for _, r := range routes {
		if grown, err = grown.With(r); err != nil {
			t.Fatal(err)
		}
	}
	there := make(map[ID]bool)
	for _, r := range routes {
		there[r.VNet] = true
	}
	check := func(what string, table *Table) {
		t.Helper()
		for _, r := range routes {
			got, ok := table.LookupTunnel(r.VNet, netip.MustParseAddr("10.1.2.3"))
			if ok != there[r.VNet] || ok && got != r.Tunnel {
				t.Fatalf("%s: %s: got %q, %v, want %v", what, r.VNet, got, ok, there[r.VNet])
			}
		}
	}
	check("built", built)
	check("grown", grown)
	old := built
	for n, i := range rand.New(rand.NewPCG(1, 2)).Perm(len(routes)) {
		if built, err = built.Without(routes[i]); err != nil {
			t.Fatal(err)
		}
		delete(there, routes[i].VNet)
		if n%16 == 0 {
			check("shrinking", built)
		}
	}
	check("empty", built)
	for _, r := range routes {
		there[r.VNet] = true
	}
	check("the old table", old)
}
