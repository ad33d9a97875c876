package ingressconf

import (
	"bytes"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/vnet"
)

// FuzzParse stands for an edge that has been taken over: whatever it sends must be refused, or be a configuration that
// names no file and has the same meaning in its canonical form.
func FuzzParse(f *testing.F) {
	f.Add([]byte("ingress:\n  - hostname: \"*.example\"\n    path: ^/a\n    service: https://10.0.0.1:8443\n    origin: {no_tls_verify: true, connect_timeout: 5s}\n  - service: http_status:404\n"))
	f.Add([]byte(`{"ingress":[{"service":"hello_world"}],"ingress_origin":{"keep_alive_connections":5}}`))
	f.Add([]byte("ingress: [{service: unix:/run/x}]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ParseRemote(b)
		if err != nil {
			return
		}
		for _, target := range c.Targets() {
			if target.Service.Scheme == Unix || target.Origin.CAPool != "" && !InlinePEM(target.Origin.CAPool) {
				t.Fatalf("a file of the connector is named: %+v", target.Rule)
			}
			again, err := ParseService(target.Service.String())
			if err != nil || again != target.Service {
				t.Fatalf("service %q: read again as %+v, %v", target.Service, again, err)
			}
		}
		if n := c.Len(); n > 0 {
			if i, _ := c.Match("no.such.host", "/"); i < 0 {
				t.Fatal("a request finds no rule")
			}
		}
		doc, err := Canonical(b)
		if err != nil {
			t.Fatalf("good, and has no canonical form: %v", err)
		}
		again, err := Canonical(doc)
		if err != nil || !bytes.Equal(doc, again) {
			t.Fatalf("canonical form %s became %s, %v", doc, again, err)
		}
		if d, err := ParseRemote(doc); err != nil || d.Len() != c.Len() {
			t.Fatalf("canonical form has other rules: %v", err)
		}
	})
}

// FuzzMatch stands for a visitor: a host in any spelling must find the rule of the one name that it means, and no host may
// come under a pattern that it is not below.
func FuzzMatch(f *testing.F) {
	f.Add("a.Example.", "/x/../y", "*.example")
	f.Add("[::1]:80", "/", "a.b")
	f.Add("bücher.test:443", "/%2e%2e/", "bücher.test")
	f.Fuzz(func(t *testing.T, host, path, pattern string) {
		c, err := New([]Rule{{Hostname: pattern, Service: "http_status:201"}, {Path: "^/x$", Service: "http_status:202"}, {Service: "http_status:404"}}, Defaults())
		if err != nil {
			return
		}
		h, err := CanonicalHost(host)
		if err != nil {
			return
		}
		if again, err := CanonicalHost(h); err != nil && !strings.Contains(h, ":") || err == nil && again != h {
			t.Fatalf("%q is not its own form: %q, %v", h, again, err)
		}
		i, _ := c.Match(h, path)
		name, below := strings.CutPrefix(pattern, "*.")
		want, err := vnet.CanonicalHost(name)
		if err != nil {
			t.Fatalf("pattern %q was taken and is no name: %v", pattern, err)
		}
		takes := h == want && !below || below && strings.HasSuffix(h, "."+want)
		if takes != (i == 0) {
			t.Fatalf("host %q, pattern %q: rule %d", h, pattern, i)
		}
		if !takes && (i == 1) != (path == "/x") {
			t.Fatalf("path %q: rule %d", path, i)
		}
	})
}
