package connector

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/vnet"
)

func ports(t testing.TB, list ...string) (out []Ports) {
	t.Helper()
	for _, s := range list {
		p, err := ParsePorts(s)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

func mustAllow(t testing.TB, rules ...Rule) *Allow {
	t.Helper()
	a, err := NewAllow(rules)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestAllowAddr(t *testing.T) {
	allow := mustAllow(t,
		Rule{To: "10.0.0.0/8", Ports: ports(t, "443", "8000-8099")},
		Rule{To: "10.1.0.0/16", Ports: ports(t, "22")},
		Rule{To: "192.0.2.7", Ports: ports(t, "*"), VNet: "blue"},
		Rule{To: "::ffff:198.51.100.0/120", Ports: ports(t, "80")},
		Rule{To: "fd00::/8", Ports: ports(t, "443")},
		Rule{To: "0.0.0.0/0", Ports: ports(t, "25"), VNet: "mail"},
		Rule{To: "::/0", Ports: ports(t, "25"), VNet: "mail"},
		Rule{To: "127.0.0.1", Ports: ports(t, "9000")},
		Rule{To: "169.254.0.0/16", Ports: ports(t, "81")},
		Rule{To: "64:ff9b::/96", Ports: ports(t, "82")},
	)
	for _, tt := range []struct {
		vnet vnet.ID
		to   string
		want bool
	}{
		{"default", "10.2.3.4:443", true},
		{"default", "10.2.3.4:8000", true},
		{"default", "10.2.3.4:8099", true},
		{"default", "10.2.3.4:8100", false},
		{"default", "10.2.3.4:22", false},
		{"default", "10.1.3.4:22", true},
		{"default", "10.1.3.4:443", true}, // the wider rule counts too
		{"default", "[::ffff:10.1.3.4]:443", true},
		{"default", "11.1.3.4:443", false},
		{"default", "192.0.2.7:1", false},
		{"blue", "192.0.2.7:1", true},
		{"blue", "192.0.2.7:65535", true},
		{"blue", "192.0.2.7:0", false},
		{"blue", "192.0.2.8:1", false},
		{"blue", "10.2.3.4:443", true}, // a rule without a network counts in all
		{"", "192.0.2.7:1", false},
		{"", "10.2.3.4:443", true},
		{"default", "198.51.100.9:80", true},
		{"default", "[fd12::1]:443", true},
		{"default", "[fe80::1]:443", false},
		{"default", "[fd12::1%eth0]:443", false},
		{"mail", "203.0.113.1:25", true},
		{"mail", "[2001:db8::1]:25", true},
		{"default", "203.0.113.1:25", false},
		// Special ranges: the rules for everything do not open them.
		{"mail", "127.0.0.1:25", false},
		{"mail", "127.8.9.1:25", false},
		{"mail", "[::1]:25", false},
		{"mail", "[::ffff:127.0.0.1]:25", false},
		{"mail", "[::]:25", false},
		{"mail", "0.0.0.0:25", false},
		{"mail", "169.254.169.254:25", false},
		{"mail", "[fe80::1]:25", false},
		{"mail", "224.0.0.1:25", false},
		{"mail", "255.255.255.255:25", false},
		{"mail", "[ff02::1]:25", false},
		{"mail", "[fd00:ec2::254]:25", false},
		{"mail", "100.100.100.200:25", false},
		{"mail", "168.63.129.16:25", false},
		{"mail", "[64:ff9b::a9fe:a9fe]:25", false}, // 169.254.169.254 through NAT64
		{"mail", "[64:ff9b:1::a9fe:a9fe]:25", false},
		{"mail", "[64:ff9b:1:2::7f00:1]:25", false},
		{"mail", "[::ffff:0:7f00:1]:25", false},   // 127.0.0.1, IPv4-translated
		{"mail", "[2002:7f00:1::1]:25", false},    // 127.0.0.1 through 6to4
		{"mail", "[64:ff9b::cb00:7101]:25", true}, // 203.0.113.1 through NAT64
		{"default", "127.0.0.1:9000", true},
		{"default", "127.0.0.2:9000", false},
		{"default", "169.254.169.254:81", true},
		{"default", "[64:ff9b::a9fe:a9fe]:82", true},
	} {
		if got := allow.Addr(tt.vnet, netip.MustParseAddrPort(tt.to)); got != tt.want {
			t.Errorf("Addr(%q, %s): got %v, want %v", tt.vnet, tt.to, got, tt.want)
		}
	}
	if allow.Addr("default", netip.AddrPort{}) {
		t.Error("the zero address is permitted")
	}
}

func TestAllowHost(t *testing.T) {
	allow := mustAllow(t,
		Rule{To: "DB.corp.example", Ports: ports(t, "5432")},
		Rule{To: "*.web.example", Ports: ports(t, "80", "443"), VNet: "blue"},
		Rule{To: "10.0.0.0/8", Ports: ports(t, "443")},
		Rule{To: "127.0.0.1", Ports: ports(t, "5432")},
	)
	for _, tt := range []struct {
		vnet       vnet.ID
		name, addr string
		port       uint16
		want       bool
	}{
		{"default", "db.corp.example", "203.0.113.5", 5432, true},
		{"default", "db.corp.example", "203.0.113.5", 5433, false},
		{"default", "x.db.corp.example", "203.0.113.5", 5432, false},
		{"default", "corp.example", "203.0.113.5", 5432, false},
		{"blue", "a.web.example", "203.0.113.5", 443, true},
		{"blue", "a.b.web.example", "203.0.113.5", 443, true},
		{"blue", "web.example", "203.0.113.5", 443, false},
		{"blue", "evilweb.example", "203.0.113.5", 443, false},
		{"default", "a.web.example", "203.0.113.5", 443, false},
		// A name without a rule reaches what its addresses could be reached by.
		{"default", "other.example", "10.1.1.1", 443, true},
		{"default", "other.example", "10.1.1.1", 80, false},
		// A name never opens a special range; a prefix written for it does.
		{"blue", "a.web.example", "127.0.0.1", 443, false},
		{"blue", "a.web.example", "169.254.169.254", 80, false},
		{"blue", "a.web.example", "::1", 80, false},
		{"default", "db.corp.example", "127.0.0.1", 5432, true},
		{"default", "db.corp.example", "127.0.0.2", 5432, false},
	} {
		to := netip.AddrPortFrom(netip.MustParseAddr(tt.addr), tt.port)
		if got := allow.Host(tt.vnet, tt.name, to); got != tt.want {
			t.Errorf("Host(%q, %q, %s): got %v, want %v", tt.vnet, tt.name, to, got, tt.want)
		}
	}
	for _, tt := range []struct {
		vnet vnet.ID
		name string
		port uint16
		want bool
	}{
		{"default", "db.corp.example", 5432, true},
		{"default", "unknown.example", 443, true}, // it might resolve into 10.0.0.0/8
		{"default", "unknown.example", 22, false},
		{"default", "a.web.example", 80, false},
		{"blue", "a.web.example", 80, true},
	} {
		if got := allow.Resolvable(tt.vnet, tt.name, tt.port); got != tt.want {
			t.Errorf("Resolvable(%q, %q, %d): got %v, want %v", tt.vnet, tt.name, tt.port, got, tt.want)
		}
	}
}

func TestAllowNothing(t *testing.T) {
	for name, a := range map[string]*Allow{"nil": nil, "zero": {}, "empty": mustAllow(t)} {
		to := netip.MustParseAddrPort("10.0.0.1:443")
		if a.Addr("default", to) || a.Host("default", "a.example", to) || a.Resolvable("default", "a.example", 443) || a.Len() != 0 {
			t.Errorf("the %s allow-list permits something", name)
		}
	}
}

func TestAllowErrors(t *testing.T) {
	good := ports(t, "443")
	for _, tt := range []struct {
		name  string
		rule  Rule
		field string
		says  string
	}{
		{"bits beyond the length", Rule{To: "10.0.0.1/8", Ports: good}, "to", "write 10.0.0.0/8"},
		{"zone", Rule{To: "fe80::1%eth0", Ports: good}, "to", "zone"},
		{"port in the host", Rule{To: "a.example:443", Ports: good}, "to", "no host name has"},
		{"empty", Rule{Ports: good}, "to", "empty"},
		{"everything", Rule{To: "*", Ports: good}, "to", "no host name has"},
		{"half an address", Rule{To: "10.0.0", Ports: good}, "to", "prefixes"},
		{"no ports", Rule{To: "10.0.0.0/8"}, "ports", `"*"`},
		{"zero port", Rule{To: "10.0.0.0/8", Ports: []Ports{{}}}, "ports", "0"},
		{"reversed", Rule{To: "10.0.0.0/8", Ports: []Ports{{9, 8}}}, "ports", "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := NewAllow([]Rule{{To: "10.0.0.0/8", Ports: good}, tt.rule})
			e, ok := errors.AsType[*RuleError](err)
			if !ok || e.Index != 1 || e.Field != tt.field || !strings.Contains(err.Error(), tt.says) || a != nil {
				t.Errorf("got %v, %v, want a RuleError of rule 1's %s that says %q", a, err, tt.field, tt.says)
			}
		})
	}
}

func TestParsePorts(t *testing.T) {
	for _, s := range []string{"*", "1", "443", "65535", "8000-8099"} {
		p, err := ParsePorts(s)
		if err != nil || p.String() != s {
			t.Errorf("ParsePorts(%q): got %v, %v", s, p, err)
		}
	}
	for _, s := range []string{"", "0", "65536", "-1", "+5", "5-", "-", "9-8", "0-5", "a", "1 2", "1-2-3", "**"} {
		if p, err := ParsePorts(s); err == nil {
			t.Errorf("ParsePorts(%q): got %v, want an error", s, p)
		}
	}
}

// FuzzAllow takes a rule as an operator may write it and a destination as a hostile edge may send it: whatever the rule,
// a host rule or a wide prefix must not open the metadata service or this host.
func FuzzAllow(f *testing.F) {
	f.Add("10.0.0.0/8", "10.1.2.3")
	f.Add("0.0.0.0/0", "169.254.169.254")
	f.Add("*.example", "a.example")
	f.Add("::/0", "::ffff:127.0.0.1")
	f.Fuzz(func(t *testing.T, to, host string) {
		a, err := NewAllow([]Rule{{To: to, Ports: []Ports{AllPorts}}})
		if err != nil {
			return
		}
		p, prefixErr := vnet.ParsePrefix(to)
		for _, s := range []string{"127.0.0.1", "169.254.169.254", "::1", "fe80::1", host} {
			addr, err := netip.ParseAddr(s)
			if err != nil {
				continue
			}
			got := a.Addr("v", netip.AddrPortFrom(addr, 80)) || a.Host("v", "a.example", netip.AddrPortFrom(addr, 80)) && prefixErr == nil
			want := prefixErr == nil && addr.Zone() == "" && p.Contains(addr.Unmap()) && p.Bits() >= specialRange(addr.Unmap())
			if got != want {
				t.Fatalf("rule %q, address %s: permitted %v, want %v", to, addr, got, want)
			}
			if addr.Zone() == "" && specialRange(addr.Unmap()) > 0 && prefixErr != nil && a.Host("v", strings.TrimPrefix(to, "*."), netip.AddrPortFrom(addr, 80)) {
				t.Fatalf("host rule %q opens %s", to, addr)
			}
		}
	})
}
