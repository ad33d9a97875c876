package reqtarget

import (
	"net/http"
	"slices"
	"testing"
)

func TestOf(t *testing.T) {
	for _, tt := range []struct {
		uri   string
		major int
		path  string
		query string
		ok    bool
	}{
		{"/", 1, "/", "", true},
		{"/a%2Fb?x=1;y=%zz", 1, "/a%2Fb", "x=1;y=%zz", true},
		{"//evil/../x", 2, "//evil/../x", "", true},
		{"/?", 3, "/", "", true},
		{"https://www.example.com/a?b", 1, "/a", "b", true},
		{"https://www.example.com", 1, "/", "", true},
		{"https://www.example.com?b/c", 1, "/", "b/c", true},
		{"https://www.example.com/a", 2, "", "", false},
		{"http://www.example.com/a", 1, "", "", false},
		{"*", 1, "", "", false},
		{"", 1, "", "", false},
		{"a", 1, "", "", false},
		{"/a#b", 1, "", "", false},
		{"/a b", 1, "", "", false},
		{"/a\r\nX: y", 2, "", "", false},
		{"/a\x7f", 2, "", "", false},
		{"/\xc3\xa9|{}^`\"<>", 2, "/\xc3\xa9|{}^`\"<>", "", true},
	} {
		got, err := Of(&http.Request{RequestURI: tt.uri, ProtoMajor: tt.major})
		if (err == nil) != tt.ok || got.Path != tt.path || got.Query != tt.query {
			t.Errorf("Of(%q, %d) = %q ? %q, %v", tt.uri, tt.major, got.Path, got.Query, err)
		}
	}
}

// The request target comes from any visitor. What the URL writes must be what came in, and must never gain an authority.
func FuzzURL(f *testing.F) {
	for _, s := range []string{"/", "/?", "//a/b", "/%2e%2e/", "/a?b?c", "/\xff", "///", "/a%", "/|{}", "https://h/x", "//h|x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, uri string) {
		tgt, err := Of(&http.Request{RequestURI: uri, ProtoMajor: 2})
		if err != nil {
			return
		}
		u, err := tgt.URL("http", "origin:80")
		if err != nil {
			return
		}
		if got := u.RequestURI(); got != uri {
			t.Fatalf("%q is written as %q", uri, got)
		}
		if u.Host != "origin:80" {
			t.Fatalf("%q goes to %q", uri, u.Host)
		}
	})
}

func TestReadings(t *testing.T) {
	for _, tt := range []struct {
		path string
		want []string
	}{
		{"/", nil},
		{"/a/b.c", nil},
		{"/%61dmin", []string{"/admin"}},
		{"/my%20docs/%C3%A9", nil},
		{"/admin;x=1/y", []string{"/admin/y"}},
		{"/%61;x/b", []string{"/a;x/b", "/a/b"}},
		{"/a%3Bx", []string{"/a"}},
		{"/100%", nil},
		{"/%zz%+1%4", nil},
		{"/%25%36%31", []string{"/%2561"}},
	} {
		if got := (Target{Path: tt.path}).Readings(); !slices.Equal(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.path, got, tt.want)
		}
	}
}

func TestAmbiguous(t *testing.T) {
	for _, p := range []string{
		"/a/../b", "/a/..", "/./a", "/a/%2e%2e/b", "/a/%2E./b", "/a/.%2e", "/a%2fb", "/a%5Cb", "/a\\b", "/a//b", "//a", "/a/..;/b", "/a/..;x=y/b", "/a/..%3b/b",
	} {
		if !(Target{Path: p}).Ambiguous() {
			t.Errorf("%s is taken as plain", p)
		}
	}
	for _, p := range []string{"/", "/a/b", "/a/...", "/a/..b", "/.well-known/x", "/a/b.c/", "/a;b=c/d", "/%41"} {
		if (Target{Path: p}).Ambiguous() {
			t.Errorf("%s is taken as ambiguous", p)
		}
	}
}
