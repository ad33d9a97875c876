package vnet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func prefixRoute(v ID, p, tunnel string) Route {
	return Route{VNet: v, Prefix: netip.MustParsePrefix(p), Tunnel: tunnel}
}

func hostRoute(v ID, host, tunnel string) Route {
	return Route{VNet: v, Host: host, Tunnel: tunnel}
}

func mustBuild(t testing.TB, routes ...Route) *Table {
	t.Helper()
	table, err := Build(routes)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestLookup(t *testing.T) {
	table := mustBuild(t,
		prefixRoute("blue", "10.0.0.0/8", "wide"),
		prefixRoute("blue", "10.1.0.0/16", "mid"),
		prefixRoute("blue", "10.1.2.3/32", "one"),
		prefixRoute("blue", "fd00::/8", "six"),
		prefixRoute("blue", "fd00:1:2:3::/64", "six64"),
		prefixRoute("green", "10.0.0.0/8", "green"),
		prefixRoute("rest", "0.0.0.0/0", "all4"),
		prefixRoute("rest", "::/0", "all6"),
		prefixRoute("mapped", "::ffff:192.168.0.0/112", "m"),
	)
	for _, tt := range []struct {
		vnet ID
		addr string
		want string // tunnel, "" for none
	}{
		{"blue", "10.9.9.9", "wide"},
		{"blue", "10.1.9.9", "mid"},
		{"blue", "10.1.2.3", "one"},
		{"blue", "10.1.2.2", "mid"},
		{"blue", "::ffff:10.1.2.3", "one"},
		{"blue", "11.0.0.0", ""},
		{"blue", "fd00:1:2:3::1", "six64"},
		{"blue", "fd00:1:2:4::1", "six"},
		{"blue", "fe80::1%eth0", ""},
		{"blue", "fd00::1%eth0", ""},
		{"green", "10.1.2.3", "green"},
		{"green", "fd00::1", ""},
		{"rest", "8.8.8.8", "all4"},
		{"rest", "2001:db8::1", "all6"},
		{"rest", "::ffff:8.8.8.8", "all4"},
		{"mapped", "192.168.7.7", "m"},
		{"none", "10.1.2.3", ""},
		{"", "10.1.2.3", ""},
	} {
		got, ok := table.Lookup(tt.vnet, netip.MustParseAddr(tt.addr))
		if got.Tunnel != tt.want || ok != (tt.want != "") {
			t.Errorf("Lookup(%q, %s): got %q, %v, want %q", tt.vnet, tt.addr, got.Tunnel, ok, tt.want)
		}
		if tunnel, found := table.LookupTunnel(tt.vnet, netip.MustParseAddr(tt.addr)); tunnel != tt.want || found != ok {
			t.Errorf("LookupTunnel(%q, %s): got %q, %v, want %q", tt.vnet, tt.addr, tunnel, found, tt.want)
		}
	}
	if _, ok := table.Lookup("blue", netip.Addr{}); ok {
		t.Error("Lookup of the zero address: got a route")
	}
}

func TestLookupHost(t *testing.T) {
	table := mustBuild(t,
		hostRoute("blue", "db.corp.example", "exact"),
		hostRoute("blue", "*.corp.example", "wild"),
		hostRoute("blue", "*.eu.corp.example", "deeper"),
		hostRoute("blue", "Bücher.Example.", "idn"),
		hostRoute("green", "db.corp.example", "green"),
		hostRoute("green", "printer", "single"),
	)
	for _, tt := range []struct {
		vnet ID
		host string
		want string
	}{
		{"blue", "db.corp.example", "exact"},
		{"blue", "DB.Corp.EXAMPLE.", "exact"},
		{"blue", "web.corp.example", "wild"},
		{"blue", "a.b.corp.example", "wild"},
		{"blue", "a.eu.corp.example", "deeper"},
		{"blue", "eu.corp.example", "wild"},
		{"blue", "corp.example", ""},
		{"blue", "xcorp.example", ""},
		{"blue", "*.corp.example", ""},
		{"blue", "xn--bcher-kva.example", "idn"},
		{"blue", "bücher.example", "idn"},
		{"blue", "", ""},
		{"blue", "a..corp.example", ""},
		{"blue", ".corp.example", ""},
		{"blue", strings.Repeat("a.", 600) + "corp.example", ""},
		{"green", "db.corp.example", "green"},
		{"green", "web.corp.example", ""},
		{"green", "printer", "single"},
		{"none", "printer", ""},
	} {
		got, ok := table.LookupHost(tt.vnet, tt.host)
		if got.Tunnel != tt.want || ok != (tt.want != "") {
			t.Errorf("LookupHost(%q, %q): got %q, %v, want %q", tt.vnet, tt.host, got.Tunnel, ok, tt.want)
		}
	}
}

func TestQueries(t *testing.T) {
	table := mustBuild(t,
		prefixRoute("blue", "10.0.0.0/8", "a"),
		prefixRoute("blue", "10.1.0.0/16", "b"),
		prefixRoute("green", "10.1.2.0/24", "c"),
		prefixRoute("grey", "172.16.0.0/12", "d"),
		prefixRoute("red", "0.0.0.0/0", "e"),
		prefixRoute("red", "::/0", "f"),
		hostRoute("blue", "*.example", "g"),
		hostRoute("green", "db.example", "h"),
	)
	tunnels := func(routes []Route) string {
		var s []string
		for _, r := range routes {
			s = append(s, r.Tunnel)
		}
		return strings.Join(s, " ")
	}
	for _, tt := range []struct{ addr, want string }{
		{"10.1.2.3", "c b e"}, {"10.9.9.9", "a e"}, {"::ffff:10.1.2.3", "c b e"}, {"2001:db8::1", "f"},
	} {
		if got := tunnels(table.Who(netip.MustParseAddr(tt.addr))); got != tt.want {
			t.Errorf("Who(%s): got %q, want %q", tt.addr, got, tt.want)
		}
	}
	for _, tt := range []struct{ prefix, want string }{
		{"10.1.0.0/16", "c b a e"}, {"10.0.0.0/7", "c b a e"}, {"10.2.0.0/16", "a e"}, {"10.1.2.3/32", "c b a e"},
		{"0.0.0.0/0", "c b d a e"}, {"10.1.2.3/16", "c b a e"}, {"fd00::/8", "f"}, {"::ffff:172.16.0.0/108", "d e"},
	} {
		if got := tunnels(table.Overlaps(netip.MustParsePrefix(tt.prefix))); got != tt.want {
			t.Errorf("Overlaps(%s): got %q, want %q", tt.prefix, got, tt.want)
		}
	}
	if got := table.Overlaps(netip.Prefix{}); got != nil {
		t.Errorf("Overlaps of the zero prefix: got %v, want none", got)
	}
	if got, want := tunnels(table.WhoHost("DB.example")), "h g"; got != want {
		t.Errorf("WhoHost: got %q, want %q", got, want)
	}
	if got, want := table.Len(), 8; got != want {
		t.Errorf("Len: got %d, want %d", got, want)
	}
	if got, want := table.LenOf("blue"), 3; got != want {
		t.Errorf("LenOf: got %d, want %d", got, want)
	}
	sorted := slices.SortedFunc(table.Of("blue"), Compare)
	if got, want := tunnels(sorted), "a b g"; got != want {
		t.Errorf("Of: got %q, want %q", got, want)
	}
}

func TestEmptyTable(t *testing.T) {
	for _, table := range []*Table{nil, {}, mustBuild(t)} {
		if _, ok := table.Lookup("v", netip.MustParseAddr("10.0.0.1")); ok || table.Len() != 0 || table.LenOf("v") != 0 {
			t.Error("an empty table holds a route")
		}
		if _, ok := table.LookupHost("v", "a.example"); ok {
			t.Error("an empty table holds a host route")
		}
		if got := table.Overlaps(netip.MustParsePrefix("0.0.0.0/0")); got != nil {
			t.Errorf("Overlaps: got %v", got)
		}
		for r := range table.All() {
			t.Errorf("All: got %v", r)
		}
		if _, err := table.Without(prefixRoute("v", "10.0.0.0/8", "")); !errors.Is(err, ErrNotFound) {
			t.Errorf("Without: got %v, want ErrNotFound", err)
		}
		one, err := table.With(prefixRoute("v", "10.0.0.0/8", "t"))
		if err != nil || one.Len() != 1 {
			t.Fatalf("With: got %v, %v", one, err)
		}
		none, err := one.Without(prefixRoute("v", "10.0.0.0/8", ""))
		if err != nil || none.Len() != 0 || !none.nets.empty() {
			t.Errorf("Without the last route: got %v, %v, want an empty table", none, err)
		}
	}
}

func TestErrors(t *testing.T) {
	table := mustBuild(t, prefixRoute("blue", "10.0.0.0/8", "first"), hostRoute("blue", "db.example", "first"))
	for _, tt := range []struct {
		name  string
		route Route
		is    error
		says  []string
	}{
		{"same prefix", prefixRoute("blue", "10.0.0.0/8", "second"), ErrOverlap, []string{"10.0.0.0/8", `"first"`, `"second"`, `"blue"`}},
		{"same prefix, mapped", prefixRoute("blue", "::ffff:10.0.0.0/104", "second"), ErrOverlap, []string{"10.0.0.0/8", `"first"`, `"second"`}},
		{"same host", hostRoute("blue", "DB.Example.", "second"), ErrOverlap, []string{"db.example", `"first"`, `"second"`}},
		{"bits beyond the length", prefixRoute("blue", "10.1.2.3/16", "t"), ErrInvalid, []string{"10.1.2.3/16", "write 10.1.0.0/16"}},
		{"bits beyond the length, mapped", prefixRoute("blue", "::ffff:10.1.2.3/112", "t"), ErrInvalid, []string{"write 10.1.0.0/16"}},
		{"no network", prefixRoute("", "10.1.0.0/16", "t"), ErrInvalid, []string{"virtual network"}},
		{"no tunnel", prefixRoute("blue", "10.1.0.0/16", ""), ErrInvalid, []string{"tunnel"}},
		{"neither", Route{VNet: "blue", Tunnel: "t"}, ErrInvalid, []string{"either"}},
		{"both", Route{VNet: "blue", Tunnel: "t", Host: "a.example", Prefix: netip.MustParsePrefix("10.0.0.0/8")}, ErrInvalid, []string{"either"}},
		{"bad host", hostRoute("blue", "a b", "t"), ErrInvalid, []string{`"a b"`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := table.With(tt.route)
			checkError(t, err, tt.is, tt.says)
			_, err = Build([]Route{prefixRoute("blue", "10.0.0.0/8", "first"), hostRoute("blue", "db.example", "first"), tt.route})
			checkError(t, err, tt.is, tt.says)
		})
	}
	_, err := table.Without(prefixRoute("blue", "10.0.0.0/9", ""))
	checkError(t, err, ErrNotFound, []string{"10.0.0.0/9", `"blue"`})
	_, err = table.Without(prefixRoute("green", "10.0.0.0/8", ""))
	checkError(t, err, ErrNotFound, []string{`"green"`})
	_, err = table.Without(prefixRoute("blue", "10.0.0.1/8", ""))
	checkError(t, err, ErrInvalid, []string{"write 10.0.0.0/8"})
	if _, err := table.With(prefixRoute("green", "10.0.0.0/8", "t")); err != nil {
		t.Errorf("the same prefix in another network: got %v, want no error", err)
	}
	if _, err := table.With(prefixRoute("blue", "10.0.0.0/9", "t")); err != nil {
		t.Errorf("a nested prefix: got %v, want no error", err)
	}
}

func checkError(t *testing.T, err, is error, says []string) {
	t.Helper()
	if !errors.Is(err, is) {
		t.Fatalf("got error %v, want %v", err, is)
	}
	for _, want := range says {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got error %q, want it to say %q", err, want)
		}
	}
}

func TestGet(t *testing.T) {
	table := mustBuild(t, prefixRoute("v", "10.0.0.0/8", "a"), prefixRoute("v", "10.1.0.0/16", "b"), prefixRoute("v", "10.1.2.0/24", "d"), hostRoute("v", "*.example", "c"))
	for _, tt := range []struct {
		route Route
		want  string
	}{
		{prefixRoute("v", "10.0.0.0/8", ""), "a"}, {prefixRoute("v", "10.1.0.0/16", ""), "b"}, {prefixRoute("v", "10.1.0.0/17", ""), ""},
		{prefixRoute("v", "10.1.0.0/15", ""), ""}, {prefixRoute("v", "0.0.0.0/0", ""), ""}, {prefixRoute("w", "10.0.0.0/8", ""), ""},
		{prefixRoute("v", "11.0.0.0/8", ""), ""}, {hostRoute("v", "*.EXAMPLE", ""), "c"}, {hostRoute("v", "a.example", ""), ""}, {Route{VNet: "v"}, ""},
	} {
		if got, ok := table.Get(tt.route); got.Tunnel != tt.want || ok != (tt.want != "") {
			t.Errorf("Get(%s): got %q, %v, want %q", tt.route.Destination(), got.Tunnel, ok, tt.want)
		}
	}
}

// TestNoAllocation holds the promise that look-ups cost no garbage.
func TestNoAllocation(t *testing.T) {
	table := mustBuild(t, prefixRoute("v", "10.0.0.0/8", "a"), prefixRoute("v", "10.1.0.0/16", "b"),
		prefixRoute("v", "fd00::/8", "six"), hostRoute("v", "*.corp.example", "c"))
	addrs := []netip.Addr{netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("fd00::1"), netip.MustParseAddr("::ffff:10.1.2.3")}
	n := testing.AllocsPerRun(100, func() {
		for _, a := range addrs {
			if _, ok := table.Lookup("v", a); !ok {
				t.Errorf("no route for %s", a)
			}
		}
		if _, ok := table.LookupHost("v", "a.b.corp.example"); !ok {
			t.Error("no route for the host name")
		}
	})
	if n != 0 {
		t.Errorf("look-ups allocate %v times, want 0", n)
	}
}

// TestEqualHashes gives all names one hash, or few, so that every path of the dictionary is walked.
func TestEqualHashes(t *testing.T) {
	old := hash
	defer func() { hash = old }()
	for name, h := range map[string]func(string) uint64{
		"all equal":      func(string) uint64 { return 7 },
		"by last letter": func(s string) uint64 { return uint64(s[len(s)-1]) << 60 },
	} {
		t.Run(name, func(t *testing.T) {
			hash = h
			var table *Table
			names := []string{"a.example", "b.example", "c.example", "d.test", "e.test", "*.f.test"}
			for i := range 2 * dictFew {
				names = append(names, fmt.Sprintf("%c.test%c", 'a'+i%26, 'a'+i/26))
			}
			for i, n := range names {
				var err error
				if table, err = table.With(hostRoute("v", n, "t")); err != nil {
					t.Fatal(err)
				}
				if _, err = table.With(hostRoute("v", n, "t")); !errors.Is(err, ErrOverlap) {
					t.Fatalf("adding %s again: got %v", n, err)
				}
				if table.Len() != i+1 {
					t.Fatalf("Len: got %d, want %d", table.Len(), i+1)
				}
			}
			if got := len(slices.Collect(table.All())); got != len(names) {
				t.Errorf("All yields %d routes, want %d", got, len(names))
			}
			for i, n := range names {
				if _, ok := table.Get(hostRoute("v", n, "")); !ok {
					t.Errorf("%s is lost", n)
				}
				var err error
				if table, err = table.Without(hostRoute("v", n, "")); err != nil {
					t.Fatal(err)
				}
				if _, ok := table.Get(hostRoute("v", n, "")); ok || table.Len() != len(names)-i-1 {
					t.Errorf("%s is still there", n)
				}
			}
		})
	}
}
