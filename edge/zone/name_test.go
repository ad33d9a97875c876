package zone

import (
	"strings"
	"testing"
)

func TestCanonical(t *testing.T) {
	long := strings.Repeat("a.", 127) + "a"
	for _, tt := range []struct {
		in, want string
		ok       bool
	}{
		{"www.example.com", "www.example.com", true},
		{"WWW.Example.COM", "www.example.com", true},
		{"www.example.com.", "www.example.com", true},
		{"xn--bcher-kva.example", "xn--bcher-kva.example", true},
		{"_dmarc.example.com", "_dmarc.example.com", true},
		{"localhost", "localhost", true},
		{long[:253], long[:253], true},
		{long + "aa", "", false},
		{"", "", false},
		{".", "", false},
		{"..", "", false},
		{"www..example.com", "", false},
		{".example.com", "", false},
		{"www.example.com..", "", false},
		{strings.Repeat("a", 64) + ".com", "", false},
		{"bücher.example", "", false},
		{"www.example.com\x00", "", false},
		{"www example.com", "", false},
		{"www.example.com:443", "", false},
		{"*.example.com", "", false},
		{"192.0.2.1", "", false},
		{"2001:db8::1", "", false},
		{"www.example.com/", "", false},
		{"user@www.example.com", "", false},
	} {
		got, err := Canonical(tt.in)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("Canonical(%q) = %q, %v; want %q, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

func TestCanonicalHost(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		ok       bool
	}{
		{"www.example.com", "www.example.com", true},
		{"WWW.example.com:8443", "www.example.com", true},
		{"www.example.com.:443", "www.example.com", true},
		{"www.example.com:", "www.example.com", true},
		{"www.example.com:99999", "", false},
		{"www.example.com:80:80", "", false},
		{"www.example.com:http", "", false},
		{"[::1]", "", false},
		{"[::1]:443", "", false},
		{"192.0.2.1:443", "", false},
		{"a,b", "", false},
		{"", "", false},
	} {
		got, err := CanonicalHost(tt.in)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("CanonicalHost(%q) = %q, %v; want %q, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

func TestPattern(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		ok       bool
	}{
		{"www.example.com", "www.example.com", true},
		{"*.Example.com.", "*.example.com", true},
		{"Bücher.example", "xn--bcher-kva.example", true},
		{"*.bücher.example", "*.xn--bcher-kva.example", true},
		{"my_host.example.com", "my_host.example.com", true},
		{"*.com", "", false},
		{"*", "", false},
		{"*.*.example.com", "", false},
		{"w*.example.com", "", false},
		{"192.0.2.1", "", false},
		{"", "", false},
	} {
		got, err := Pattern(tt.in)
		if got != tt.want || (err == nil) != tt.ok {
			t.Errorf("Pattern(%q) = %q, %v; want %q, ok %v", tt.in, got, err, tt.want, tt.ok)
		}
	}
}

// The name comes from a visitor who has proved nothing: the server name of a ClientHello.
func FuzzCanonical(f *testing.F) {
	for _, s := range []string{"www.example.com", "WWW.EXAMPLE.COM.", "a..b", "1.2.3.4", strings.Repeat("a", 300), "\x80"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := Canonical(s)
		if err != nil {
			return
		}
		if again, err := Canonical(c); err != nil || again != c {
			t.Fatalf("Canonical(%q) = %q, which is not canonical: %q, %v", s, c, again, err)
		}
		if !strings.EqualFold(c, strings.TrimSuffix(s, ".")) {
			t.Fatalf("Canonical(%q) = %q is another name", s, c)
		}
	})
}

func TestTableLookup(t *testing.T) {
	a := &Zone{Name: "a", Hosts: []string{"www.example.com", "*.dev.example.com"}}
	b := &Zone{Name: "b", Hosts: []string{"*.example.com"}}
	table := NewTable([]*Zone{a, b})
	for _, tt := range []struct{ name, want string }{
		{"www.example.com", "a"},
		{"api.example.com", "b"},
		{"x.dev.example.com", "a"},
		{"dev.example.com", "b"},
		{"x.y.dev.example.com", ""},
		{"example.com", ""},
		{"com", ""},
		{"www.example.org", ""},
		{"*.example.com", "b"}, // no canonical name, so it is never asked for
	} {
		got := ""
		if z, ok := table.Lookup(tt.name); ok {
			got = z.Name
		}
		if got != tt.want {
			t.Errorf("Lookup(%q) = %q, want %q", tt.name, got, tt.want)
		}
	}
}
