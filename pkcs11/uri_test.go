package pkcs11

import (
	"bytes"
	"strings"
	"testing"
)

func TestParseURI(t *testing.T) {
	for _, tc := range []struct {
		in   string
		want func(URI) bool
		out  string // canonical form; in if empty
	}{
		{in: "pkcs11:", want: func(u URI) bool { return u.Token == "" }},
		{in: "pkcs11:token=hsm", want: func(u URI) bool { return u.Token == "hsm" }},
		{in: "PKCS11:token=hsm", want: func(u URI) bool { return u.Token == "hsm" }, out: "pkcs11:token=hsm"},
		{in: "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken", want: func(u URI) bool { return u.Token == "The Software PKCS#11 Softtoken" }},
		{in: "pkcs11:serial=4A;manufacturer=Snake%20Oil,%20Inc.", want: func(u URI) bool { return u.Manufacturer == "Snake Oil, Inc." },
			out: "pkcs11:manufacturer=Snake%20Oil,%20Inc.;serial=4A"},
		{in: "pkcs11:id=%01%ffA", want: func(u URI) bool { return bytes.Equal(u.ID, []byte{1, 0xff, 'A'}) }, out: "pkcs11:id=%01%FF%41"},
		{in: "pkcs11:slot-id=327;object=my-key;type=private", want: func(u URI) bool { return u.SlotID == "327" && u.Type == "private" }},
		{in: "pkcs11:token=a&b%3Bc", want: func(u URI) bool { return u.Token == "a&b;c" }},
		{in: "pkcs11:library-version=3.1;token=x", want: func(u URI) bool { return u.LibraryVersion == "3.1" }, out: "pkcs11:token=x;library-version=3.1"},
		{in: "pkcs11:token=t?pin-source=/etc/pin&module-name=softhsm2", want: func(u URI) bool { return u.PINSource == "/etc/pin" && u.ModuleName == "softhsm2" }},
		{in: "pkcs11:token=t?pin-source=file:///etc/pin%20file", want: func(u URI) bool { return u.PINSource == "file:///etc/pin file" }},
		{in: "pkcs11:?module-path=/usr/lib/m.so", want: func(u URI) bool { return u.ModulePath == "/usr/lib/m.so" }},
		{in: "pkcs11:token=t?pin-value=" + canary, want: func(u URI) bool { return u.pinValue.value() == canary }, out: "pkcs11:token=t"},
	} {
		u, err := ParseURI(tc.in)
		if err != nil {
			t.Errorf("ParseURI(%q): %v", tc.in, err)
			continue
		}
		if !tc.want(u) {
			t.Errorf("ParseURI(%q) = %#v", tc.in, u)
		}
		want := tc.out
		if want == "" {
			want = tc.in
		}
		if got := u.String(); got != want {
			t.Errorf("ParseURI(%q).String() = %q, want %q", tc.in, got, want)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	for in, want := range map[string]string{
		"":                                       "does not begin",
		"token=x":                                "does not begin",
		"pkcs12:token=x":                         "does not begin",
		"pkcs11:token":                           `no "="`,
		"pkcs11:;token=x":                        `no "="`,
		"pkcs11:token=x;":                        `no "="`,
		"pkcs11:token=x?":                        `no "="`,
		"pkcs11:token=":                          "empty",
		"pkcs11:token=a;token=a":                 "twice",
		"pkcs11:id=%01;id=%01":                   "twice",
		"pkcs11:Token=a":                         "unknown",
		"pkcs11:x-vendor=a":                      "unknown",
		"pkcs11:pin-source=/x":                   "unknown",
		"pkcs11:token=a b":                       "percent-encoded",
		"pkcs11:token=a/b":                       "percent-encoded",
		"pkcs11:token=ü":                         "percent-encoded",
		"pkcs11:token=a%2":                       "broken",
		"pkcs11:token=a%zz":                      "broken",
		"pkcs11:token=a%+1":                      "broken",
		"pkcs11:token=%ff":                       "UTF-8",
		"pkcs11:token=a%00":                      "printable",
		"pkcs11:token=a%0a":                      "printable",
		"pkcs11:slot-id=x":                       "number",
		"pkcs11:slot-id=-1":                      "number",
		"pkcs11:slot-id=007":                     "number",
		"pkcs11:type=key":                        "none of",
		"pkcs11:library-version=a":               "version",
		"pkcs11:library-version=1.":              "version",
		"pkcs11:token=t?token=t":                 "unknown",
		"pkcs11:?pin-source=|cat":                "command",
		"pkcs11:?pin-source=%7Ccat":              "command",
		"pkcs11:?pin-source=pin.txt":             "absolute",
		"pkcs11:?pin-source=file:pin.txt":        "file: URI",
		"pkcs11:?pin-source=file://host/etc/pin": "another host",
		"pkcs11:?pin-source=https://host/pin":    "absolute",
		"pkcs11:?pin-source=/a&pin-source=/a":    "twice",
		"pkcs11:?pin-value=" + canary + "&pin-value=" + canary:     "twice",
		"pkcs11:?pin-value=" + canary + "&pin-source=/etc/pin":     "exclude each other",
		"pkcs11:?pin-source=/etc/pin&pin-value=" + canary:          "exclude each other",
		"pkcs11:?pin-value=" + canary + " ":                        "percent-encoded",
		"pkcs11:?pin-value=x&" + canary + "=y":                     "unknown",
		"pkcs11:?" + canary:                                        `no "="`,
		"pkcs11:?pin-value=" + canary + "%00":                      "zero byte",
		"pkcs11:?module-name=a&module-path=/b":                     "exclude each other",
		"pkcs11:?module-name=../evil":                              "path",
		"pkcs11:?module-path=lib.so":                               "absolute",
		"pkcs11:?module-path=/usr/lib/../evil.so":                  "clean",
		"pkcs11:token=" + strings.Repeat("x", 33):                  "longer",
		"pkcs11:token=x;manufacturer=" + strings.Repeat("x", 5000): "longer",
	} {
		u, err := ParseURI(in)
		if err == nil {
			t.Errorf("ParseURI(%q) = %v, want an error about %q", in, u, want)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("ParseURI(%q): %v, want an error about %q", in, err, want)
		}
		if strings.Contains(err.Error(), canary) {
			t.Errorf("the error of ParseURI holds the PIN: %v", err)
		}
	}
}

func TestPINPath(t *testing.T) {
	for in, want := range map[string]string{
		"/etc/pin": "/etc/pin", "file:///etc/pin": "/etc/pin", "file:/etc/pin": "/etc/pin", "FILE:///etc/pin": "/etc/pin",
		"file://localhost/etc/pin": "/etc/pin", "file:///etc/a%20b": "/etc/a b", "/etc/a%20b": "/etc/a%20b",
	} {
		if got, err := pinPath(in); err != nil || got != want {
			t.Errorf("pinPath(%q) = %q, %v, want %q", in, got, err, want)
		}
	}
}

// FuzzParseURI: the attacker wrote part of a configuration, or a URI that came from elsewhere. What is accepted means the same after it
// was printed, and printing is stable.
func FuzzParseURI(f *testing.F) {
	for _, u := range []URI{
		{Token: "hsm", PINSource: "/etc/pin", ModulePath: "/usr/lib/m.so"},
		{Serial: "4a", ID: []byte{0, 0xff, '%'}, Object: "a;b&c?d=e/ü", Type: "private", ModuleName: "softhsm2"},
		{SlotID: "12", SlotDescription: "x y", SlotManufacturer: "m", LibraryVersion: "1.2", LibraryDescription: "d", LibraryManufacturer: "|"},
	} {
		f.Add(u.String())
	}
	f.Add("pkcs11:token=x?pin-value=" + canary)
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURI(s)
		if err != nil {
			return
		}
		text := u.String()
		again, err := ParseURI(text)
		if err != nil {
			t.Fatalf("%q was accepted, but not what it prints, %q: %v", s, text, err)
		}
		if got := again.String(); got != text {
			t.Fatalf("%q prints %q, then %q", s, text, got)
		}
		if !u.pinValue.IsZero() && strings.Contains(text, "pin-value") {
			t.Fatalf("%q prints its PIN", s)
		}
		u.pinValue = PIN{}
		if !bytes.Equal(u.ID, again.ID) {
			t.Fatalf("id is %x, then %x", u.ID, again.ID)
		}
		u.ID, again.ID = nil, nil
		for _, a := range append(append([]attribute{}, pathAttributes...), queryAttributes...) {
			if *a.value(&u) != *a.value(&again) {
				t.Fatalf("%s is %q, then %q", a.name, *a.value(&u), *a.value(&again))
			}
		}
	})
}
