//go:build netns

package testnet

import (
	"net/netip"
	"testing"
)

// Two hosts on one cable; the second has a private address besides.
//
//	edge 198.51.100.1 ──── 198.51.100.2 site, 10.20.0.10 on lo
func TestOutwardOnly(t *testing.T) {
	n, err := New("khtn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	edge, site := must(n.Namespace("edge"))(t), must(n.Namespace("site"))(t)
	dev, _, err := n.Link(site, edge, netip.MustParsePrefix("198.51.100.2/30"), netip.MustParsePrefix("198.51.100.1/30"))
	if err != nil {
		t.Fatal(err)
	}
	check(t, site.AddAddr("lo", netip.MustParsePrefix("10.20.0.10/32")))
	check(t, edge.Route(netip.MustParsePrefix("10.20.0.0/24"), netip.MustParseAddr("198.51.100.2")))

	// A closed port answers with a reset where the address can be reached at all: curl ends with 7, not with 28.
	reach := func(from *Namespace, addr string) bool {
		cmd := from.Command(t.Context(), "curl", "-sS", "--connect-timeout", "2", "http://"+addr+":9/")
		cmd.Run()
		t.Logf("%s to %s: %v", from.Name(), addr, cmd.ProcessState)
		return cmd.ProcessState.ExitCode() == 7
	}
	if !reach(edge, "10.20.0.10") {
		t.Fatal("the private address is closed before the rules are set: the test proves nothing")
	}
	check(t, site.OutwardOnly(dev, netip.MustParseAddr("198.51.100.2")))
	if reach(edge, "10.20.0.10") {
		t.Error("the private address can be reached through the outgoing link")
	}
	if !reach(edge, "198.51.100.2") || !reach(site, "198.51.100.1") || !reach(site, "10.20.0.10") {
		t.Error("the link itself or the site's inside does not work")
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T { check(t, err); return v }
}
