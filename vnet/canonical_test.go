package vnet

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
)

func TestCanonicalHost(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, tt := range []struct{ in, want string }{
		{"example", "example"},
		{"WWW.Example.COM", "www.example.com"},
		{"www.example.com.", "www.example.com"},
		{"*.Example.com", "*.example.com"},
		{"bücher.example", "xn--bcher-kva.example"},
		{"BÜCHER.example", "xn--bcher-kva.example"},
		{"xn--bcher-kva.example", "xn--bcher-kva.example"},
		{"straße.example", "xn--strae-oqa.example"},
		{"a。b", "a.b"},
		{"ＡＢＣ.example", "abc.example"},
		{"_sip._tcp.example", "_sip._tcp.example"},
		{"r3---sn-x.example", "r3---sn-x.example"},
		{"1.2.3.example", "1.2.3.example"},
		{"1e2", "1e2"},
		{long + "." + long + "." + long + "." + strings.Repeat("b", 61), long + "." + long + "." + long + "." + strings.Repeat("b", 61)},
	} {
		got, err := CanonicalHost(tt.in)
		if err != nil || got != tt.want {
			t.Errorf("CanonicalHost(%q): got %q, %v, want %q", tt.in, got, err, tt.want)
		}
	}
	for _, in := range []string{
		"", ".", "*", "*.", "a..b", ".a", "a..", "*.*.a", "a.*.b", "a*.b", "a b", "a\x00b", "a/b", "a:80", "[::1]", "::1", "10.0.0.1", "１０.0.0.1",
		"0x7f.1", "0x7f000001", "127", "example.1", "-a.example", "a-.example", long + "a.example", "xn--a.example", "xn--.example",
		strings.Repeat("a.", 127) + "b", "*." + long + "." + long + "." + long + "." + strings.Repeat("b", 61),
		strings.Repeat("ü", 2000), "a\xff.example", "user@example", "a%2e.example",
	} {
		if got, err := CanonicalHost(in); !errors.Is(err, ErrInvalid) {
			t.Errorf("CanonicalHost(%q): got %q, %v, want ErrInvalid", in, got, err)
		}
	}
}

func TestParsePrefix(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"10.0.0.0/8", "10.0.0.0/8"}, {"10.1.2.3", "10.1.2.3/32"}, {"fd00::/8", "fd00::/8"}, {"fd00::1", "fd00::1/128"},
		{"::ffff:10.0.0.0/104", "10.0.0.0/8"}, {"::ffff:10.1.2.3", "10.1.2.3/32"}, {"::ffff:0:0/96", "0.0.0.0/0"}, {"::/0", "::/0"},
		{"0.0.0.0/0", "0.0.0.0/0"},
	} {
		got, err := ParsePrefix(tt.in)
		if err != nil || got.String() != tt.want {
			t.Errorf("ParsePrefix(%q): got %v, %v, want %s", tt.in, got, err, tt.want)
		}
	}
	for _, tt := range []struct{ in, says string }{
		{"", "10.0.0.0/8"}, {"10.0.0.0/33", "10.0.0.0/8"}, {"10.0.0.1/8", "write 10.0.0.0/8"}, {"fd00::1/64", "write fd00::/64"},
		{"::ffff:10.0.0.1/104", "write 10.0.0.0/8"}, {"fe80::1%eth0", "zone"}, {"fe80::%eth0/64", "zone"}, {"::ffff:0:0/90", "write ::ffc0:0:0/90"},
		{"10.0.0.0/08", "10.0.0.0/8"}, {"010.0.0.0/8", "10.0.0.0/8"}, {"host", "10.0.0.0/8"},
	} {
		_, err := ParsePrefix(tt.in)
		checkError(t, err, ErrInvalid, []string{tt.says})
	}
	if _, err := CanonicalPrefix(netip.Prefix{}); !errors.Is(err, ErrInvalid) {
		t.Errorf("CanonicalPrefix of the zero value: got %v, want ErrInvalid", err)
	}
}

// FuzzCanonicalHost takes names as whoever may add a route or open a flow may send them. What comes out must be its
// own canonical form, and equal to what the slow path through the IDNA tables makes of it; else two spellings of one
// name would have two routes.
func FuzzCanonicalHost(f *testing.F) {
	for _, s := range []string{"www.example.com", "*.Example.com.", "bücher.example", "xn--bcher-kva.example", "a。b", "_sip.example", "ＡＢＣ", "1.2.3.4", "0x7f.1", "a--b.example"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, err := CanonicalHost(in)
		if err != nil {
			if !errors.Is(err, ErrInvalid) || got != "" {
				t.Fatalf("CanonicalHost(%q): got %q, %v", in, got, err)
			}
			return
		}
		if again, err := CanonicalHost(got); err != nil || again != got {
			t.Fatalf("CanonicalHost(%q) is %q, but that becomes %q, %v", in, got, again, err)
		}
		if upper, err := CanonicalHost(strings.ToUpper(got) + "."); err != nil || upper != got {
			t.Fatalf("CanonicalHost(%q) is %q, but its upper case becomes %q, %v", in, got, upper, err)
		}
		name := strings.TrimPrefix(got, "*.")
		if slow, err := profile.ToASCII(name); err != nil || slow != name {
			t.Fatalf("CanonicalHost(%q) is %q, but the tables make it %q, %v", in, got, slow, err)
		}
		if _, err := netip.ParseAddr(name); err == nil {
			t.Fatalf("CanonicalHost(%q) is the address %q", in, got)
		}
		table := mustBuild(t, hostRoute("v", in, "t"))
		if host, wild := strings.CutPrefix(got, "*."); !wild {
			if _, ok := table.LookupHost("v", in); !ok {
				t.Fatalf("the route for %q is not found under its own name", in)
			}
		} else if len(host) < 250 {
			if _, ok := table.LookupHost("v", "x."+host); !ok {
				t.Fatalf("the route for %q is not found below its name", in)
			}
		}
	})
}

// FuzzParsePrefix takes prefixes as an operator or an API client may write them.
func FuzzParsePrefix(f *testing.F) {
	for _, s := range []string{"10.0.0.0/8", "fd00::/8", "::ffff:10.0.0.0/104", "10.1.2.3", "fe80::1%eth0", "::/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		p, err := ParsePrefix(in)
		if err != nil {
			return
		}
		if again, err := ParsePrefix(p.String()); err != nil || again != p {
			t.Fatalf("ParsePrefix(%q) is %s, but that becomes %v, %v", in, p, again, err)
		}
		if p.Addr().Is4In6() || p != p.Masked() {
			t.Fatalf("ParsePrefix(%q): %s is not canonical", in, p)
		}
	})
}

// FuzzQuickForm holds the quick check of names against the thorough one.
func FuzzQuickForm(f *testing.F) {
	for _, s := range []string{"", ".", "a", "a.", ".a", "a..b", "-a", "a-", "a-b", "a.-b", "a-.b", "xn--a", "a--b", "1", "a.1", "a.0x1f", "a_b.c", "*.a", "A.b", "ä.b", "10.0.0.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if canonical(s) {
			if got, err := CanonicalHost(s); err != nil || got != s {
				t.Errorf("canonical(%q): got true, want false: its form is %q, %v", s, got, err)
			}
		} else if checkHost(s) == "" && plain(s) {
			for i := 1; i < len(s); i++ {
				if s[i-1] == '-' && s[i] == '-' {
					return
				}
			}
			t.Errorf("canonical(%q): got false, want true", s)
		}
	})
}
