package mtls

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"net/url"
	"strings"
	"testing"
)

func TestParseIdentity(t *testing.T) {
	long := strings.Repeat("n", 64)
	for _, s := range []string{
		"spiffe://keyhaven.test/edge/e1",
		"spiffe://a/connector/0",
		"spiffe://a-b.9c.example/keyserver/hsm_1.fra-2",
		"spiffe://127.0.0.1a/edge/x",
		"spiffe://keyhaven.test/edge/" + long,
	} {
		id, err := ParseIdentity(s)
		if err != nil {
			t.Errorf("ParseIdentity(%q): %v", s, err)
		} else if id.String() != s {
			t.Errorf("ParseIdentity(%q) prints %q", s, id)
		}
	}
	for _, s := range []string{
		"", "spiffe://", "spiffe://td", "spiffe://td/edge", "spiffe://td/edge/", "spiffe:///edge/a", "//td/edge/a",
		"SPIFFE://td/edge/a", "https://td/edge/a", " spiffe://td/edge/a", "spiffe://td/edge/a ", "spiffe://td/edge/a\n",
		"spiffe://TD/edge/a", "spiffe://td/Edge/a", "spiffe://td/edge/A", "spiffe://td/server/a", "spiffe://td//a",
		"spiffe://td/edge/a/b", "spiffe://td/edge/a/", "spiffe://td/edge//a", "spiffe://td/edge/..", "spiffe://td/edge/.a",
		"spiffe://td/edge/-a", "spiffe://td/edge/_a", "spiffe://td/edge/%61", "spiffe://td/edge/a?", "spiffe://td/edge/a?x=1",
		"spiffe://td/edge/a#", "spiffe://td:443/edge/a", "spiffe://u@td/edge/a", "spiffe://td./edge/a", "spiffe://.td/edge/a",
		"spiffe://t..d/edge/a", "spiffe://-td/edge/a", "spiffe://td-/edge/a", "spiffe://t_d/edge/a", "spiffe://127.0.0.1/edge/a",
		"spiffe://[::1]/edge/a", "spiffe://td/edge/ä", "spiffe://td/edge/a\x00", "spiffe://td/edge/" + long + "n",
		"spiffe://" + strings.Repeat("a", 64) + "/edge/a", "spiffe://" + strings.Repeat("a.", 127) + "/edge/a",
	} {
		if id, err := ParseIdentity(s); err == nil {
			t.Errorf("ParseIdentity(%q) accepts it as %v", s, id)
		} else if id != (Identity{}) {
			t.Errorf("ParseIdentity(%q) returns %v with its error", s, id)
		}
	}
}

// FuzzParseIdentity stands for a peer whose certificate was signed by an authority that takes names from elsewhere.
func FuzzParseIdentity(f *testing.F) {
	for _, kind := range []Kind{KindEdge, KindConnector, KindKeyServer, KindOperator} {
		f.Add(testID(kind, "a-1.b_c").String())
	}
	f.Add("spiffe://td/edge/%61?#")
	f.Fuzz(func(t *testing.T, s string) {
		id, err := ParseIdentity(s)
		if err != nil {
			return
		}
		if id.String() != s {
			t.Errorf("accepted %q, which is spelled %q", s, id)
		}
		u, err := url.Parse(s)
		if err != nil || u.String() != s || u.Host != id.TrustDomain || u.Path != "/"+string(id.Kind)+"/"+id.Name {
			t.Errorf("net/url reads %q as %v (%v), we read %+v", s, u, err, id)
		}
	})
}

func TestIdentityText(t *testing.T) {
	type doc struct {
		ID Identity `json:"id,omitzero"`
	}
	want := doc{testID(KindConnector, "berlin-1")}
	data, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	if string(data) != `{"id":"spiffe://keyhaven.test/connector/berlin-1"}` {
		t.Errorf("got %s", data)
	}
	var got doc
	if err := json.Unmarshal(data, &got); err != nil || got != want {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
	if err := json.Unmarshal([]byte(`{"id":"spiffe://keyhaven.test/connector/BERLIN"}`), &got); err == nil {
		t.Error("a malformed identity was read")
	}
	if _, err := json.Marshal(doc{Identity{Name: "x"}}); err == nil {
		t.Error("a malformed identity was written")
	}
	if s := (Identity{}).String(); s != "" {
		t.Errorf("zero identity prints %q", s)
	}
}

// san encodes a subjectAltName extension of URI names as they are given.
func san(t testing.TB, uris ...string) []byte {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestIdentityOf(t *testing.T) {
	a := newAuthority(t, testDomain)
	id := testID(KindEdge, "e1")
	withSAN := func(uris ...string) *x509.Certificate {
		return forge(t, a, id, func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = append(c.ExtraExtensions, pkixExtension(san(t, uris...)))
		}).Leaf
	}
	for _, c := range []struct {
		name string
		cert *x509.Certificate
		want bool
	}{
		{"one", withSAN(id.String()), true},
		{"with host names too", forge(t, a, id, func(c *x509.Certificate) { c.DNSNames = []string{"e1.example"} }).Leaf, true},
		{"none", forge(t, a, id, func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"e1.example"} }).Leaf, false},
		{"two", withSAN(id.String(), testID(KindEdge, "e2").String()), false},
		{"the same twice", withSAN(id.String(), id.String()), false},
		{"ours and a foreign one", withSAN(id.String(), "https://keyhaven.test/"), false},
		{"scheme in capitals", withSAN("SPIFFE://keyhaven.test/edge/e1"), false},
		{"empty fragment", withSAN(id.String() + "#"), false},
		{"percent-encoded", withSAN("spiffe://keyhaven.test/edge/%651"), false},
		{"root", a.Root(), false},
		{"nil", nil, false},
	} {
		got, err := IdentityOf(c.cert)
		switch {
		case c.want && (err != nil || got != id):
			t.Errorf("%s: got %v, %v, want %v", c.name, got, err, id)
		case !c.want && !errors.Is(err, ErrNoIdentity):
			t.Errorf("%s: got %v, %v, want ErrNoIdentity", c.name, got, err)
		}
	}
}

func TestAcceptNobody(t *testing.T) {
	id := testID(KindEdge, "e1")
	for name, accept := range map[string]func(Identity) error{
		"no kinds":          AcceptKinds(),
		"other kinds":       AcceptKinds(KindConnector, KindKeyServer, KindOperator),
		"no identities":     AcceptIdentities(),
		"other identities":  AcceptIdentities(testID(KindConnector, "e1"), testID(KindEdge, "e2")),
		"other trustdomain": AcceptIdentities(Identity{"other.test", KindEdge, "e1"}),
	} {
		if err := accept(id); !errors.Is(err, ErrRefused) {
			t.Errorf("%s: got %v, want ErrRefused", name, err)
		}
	}
	if err := errors.Join(AcceptKinds(KindEdge)(id), AcceptIdentities(id)(id)); err != nil {
		t.Error(err)
	}
}
