package edge

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

// faults are the keys that a configuration is refused for, each with its message.
func faults(c *Config) (keys []string, text string, warnings []string) {
	var b strings.Builder
	warnings = c.Validate(func(key, format string, args ...any) {
		keys = append(keys, key)
		fmt.Fprintf(&b, key+": "+format+"\n", args...)
	})
	return keys, b.String(), warnings
}

func TestBadConfigurations(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", "http://10.0.0.1:80", "a.test", "*.w.test")
	w.addZone("b", "rsa2048", "https://10.0.0.2", "b.test")
	if keys, text, warnings := faults(&w.cfg); len(keys) > 0 || len(warnings) > 0 {
		t.Fatalf("the good configuration is refused:\n%s%v", text, warnings)
	}
	file := func(name string, ders ...[]byte) string { return writePEM(t, filepath.Join(w.dir, name), ders...) }
	key := newKey(t, "p256")
	leaf := w.ca.issue(t, key.Public(), 48*time.Hour, "a.test", "*.w.test")
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	must(t, err)
	private := filepath.Join(w.dir, "private.pem")
	must(t, os.WriteFile(private, append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...), 0o600))
	empty := filepath.Join(w.dir, "empty.pem")
	must(t, os.WriteFile(empty, []byte("no pem\n"), 0o600))
	stranger := newAuthority(t)
	store := newMemory(t)

	for _, tt := range []struct {
		name   string
		change func(c *Config)
		key    string
		text   string
	}{
		{"no listener", func(c *Config) { c.Listen.TLS = nil }, "listen.tls", "at least one"},
		{"listener without port", func(c *Config) { c.Listen.TLS = []string{"127.0.0.1"} }, "listen.tls[0]", "host:port"},
		{"redirect on the TLS port", func(c *Config) { c.Listen.TLS = []string{":443"}; c.Listen.Redirect = []string{":443"} }, "listen.redirect[0]", "TLS listener already"},
		{"public port", func(c *Config) { c.Listen.PublicPort = 70000 }, "listen.public_port", "not a port"},
		{"limit", func(c *Config) { c.Limits.Streams = 0 }, "limits.streams", "positive"},
		{"time limit", func(c *Config) { c.Limits.HandshakeTimeout = 0 }, "limits.handshake_timeout", "positive"},
		{"rotation", func(c *Config) { c.Tickets.Rotate = time.Second }, "tickets.rotate", "between"},
		{"generations", func(c *Config) { c.Tickets.Generations = 0 }, "tickets.generations", "between"},
		{"unnamed group", func(c *Config) { c.KeyServers[0].Name = "" }, "key_servers[0].name", "no name"},
		{"group twice", func(c *Config) { c.KeyServers = append(c.KeyServers, c.KeyServers[0]) }, "key_servers[1].name", "two groups"},
		{"group without servers", func(c *Config) { c.KeyServers[0].Servers = nil }, "key_servers[0].servers", "no server"},
		{"server without port", func(c *Config) { c.KeyServers[0].Servers = []string{"10.0.0.1"} }, "key_servers[0].servers[0]", "host:port"},
		{"nobody expected", func(c *Config) { c.KeyServers[0].Expect = nil }, "key_servers[0].expect", "no identity"},
		{"no identity", func(c *Config) { c.KeyServers[0].Expect = []string{"hsm1"} }, "key_servers[0].expect[0]", ""},
		{"identity of a connector", func(c *Config) { c.KeyServers[0].Expect = []string{"spiffe://owner.test/connector/x"} }, "key_servers[0].expect[0]", "keyserver"},
		{"slow signer", func(c *Config) { c.KeyServers[0].Timeout = 3 * time.Second }, "key_servers[0].timeout", "below 3s"},
		{"unnamed zone", func(c *Config) { c.Zones[0].Name = "" }, "zones[0].name", "no name"},
		{"zone twice", func(c *Config) { c.Zones[1].Name = "a" }, "zones[1].name", "two zones"},
		{"no hosts", func(c *Config) { c.Zones[0].Hosts = nil }, "zones[0].hosts", "no host"},
		{"host twice in a zone", func(c *Config) { c.Zones[0].Hosts = []string{"a.test", "A.test."} }, "zones[0].hosts[1]", "already"},
		{"host in two zones", func(c *Config) { c.Zones[1].Hosts = []string{"b.test", "*.W.test"} }, "zones[1].hosts[1]", `zone "a" already`},
		{"wide wildcard", func(c *Config) { c.Zones[0].Hosts = []string{"*.test"} }, "zones[0].hosts[0]", "two labels"},
		{"host is an address", func(c *Config) { c.Zones[0].Hosts = []string{"192.0.2.1"} }, "zones[0].hosts[0]", "IP address"},
		{"no certificate", func(c *Config) { c.Zones[0].Certificate = "" }, "zones[0].certificate", "no file"},
		{"missing file", func(c *Config) { c.Zones[0].Certificate = "/nowhere.pem" }, "zones[0].certificate", "no such file"},
		{"no PEM", func(c *Config) { c.Zones[0].Certificate = empty }, "zones[0].certificate", "no certificate"},
		{"private key", func(c *Config) { c.Zones[0].Certificate = private }, "zones[0].certificate", "holds a private key"},
		{"certificate of others", func(c *Config) { c.Zones[0].Certificate = c.Zones[1].Certificate }, "zones[0].certificate", "does not cover host a.test"},
		{"certificate without the wildcard", func(c *Config) {
			c.Zones[0].Certificate = file("nowild.pem", w.ca.issue(t, key.Public(), 48*time.Hour, "a.test", "x.w.test"))
		}, "zones[0].certificate", "does not cover host *.w.test"},
		{"order", func(c *Config) { c.Zones[0].Certificate = file("order.pem", w.ca.cert.Raw, leaf) }, "zones[0].certificate", "leaf first"},
		{"stranger in the chain", func(c *Config) { c.Zones[0].Certificate = file("stranger.pem", leaf, stranger.cert.Raw) }, "zones[0].certificate", "is not issued by"},
		{"authority as the leaf", func(c *Config) { c.Zones[0].Certificate = file("ca.pem", w.ca.cert.Raw) }, "zones[0].certificate", "that of an authority"},
		{"unknown group", func(c *Config) { c.Zones[0].KeyServer = "nobody" }, "zones[0].key_server", `"nobody"`},
		{"no group", func(c *Config) { c.Zones[0].KeyServer = "" }, "zones[0].key_server", "no key server group"},
		{"decryption by an EC key", func(c *Config) { c.Zones[0].AllowRSADecrypt = true }, "zones[0].allow_rsa_decrypt", "needs RSA"},
		{"HTTP version", func(c *Config) { c.Zones[0].HTTP = []string{"2", "4"} }, "zones[0].http[1]", "not an HTTP version"},
		{"no origin", func(c *Config) { c.Zones[0].Origins = nil }, "zones[0].origins", "no origin"},
		{"origin URL", func(c *Config) { c.Zones[0].Origins[0].URL = "10.0.0.1:80" }, "zones[0].origins[0].url", "http://host:port"},
		{"origin with a path", func(c *Config) { c.Zones[0].Origins[0].URL = "http://10.0.0.1/x" }, "zones[0].origins[0].url", "http://host:port"},
		{"origin with a password", func(c *Config) { c.Zones[0].Origins[0].URL = "http://u:p@10.0.0.1" }, "zones[0].origins[0].url", "http://host:port"},
		{"origin port", func(c *Config) { c.Zones[0].Origins[0].URL = "http://10.0.0.1:0" }, "zones[0].origins[0].url", "1 to 65535"},
		{"path twice", func(c *Config) {
			c.Zones[0].Origins = append(c.Zones[0].Origins, zone.Origin{Path: "/", URL: "http://10.0.0.3"})
		}, "zones[0].origins[1].path", "an origin already"},
		{"path with dots", func(c *Config) { c.Zones[0].Origins[0].Path = "/a/../b" }, "zones[0].origins[0].path", "plain path"},
		{"path without slash", func(c *Config) { c.Zones[0].Origins[0].Path = "a" }, "zones[0].origins[0].path", "plain path"},
		{"TLS of a plain origin", func(c *Config) { c.Zones[0].Origins[0].TLS.ServerName = "x" }, "zones[0].origins[0].tls", "url is http"},
		{"h2c with https", func(c *Config) { c.Zones[1].Origins[0].H2C = true }, "zones[1].origins[0].h2c", "negotiates"},
		{"origin CA", func(c *Config) { c.Zones[1].Origins[0].TLS.CA = "/nowhere.pem" }, "zones[1].origins[0].tls.ca", "no such file"},
		{"origin host header", func(c *Config) { c.Zones[1].Origins[0].Host = "a b" }, "zones[1].origins[0].host", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := w.cfg
			c.KeyServers = slices.Clone(c.KeyServers)
			c.Zones = slices.Clone(c.Zones)
			for i := range c.Zones {
				c.Zones[i].Origins = slices.Clone(c.Zones[i].Origins)
			}
			tt.change(&c)
			keys, text, _ := faults(&c)
			if !slices.Contains(keys, tt.key) || !strings.Contains(text, tt.text) {
				t.Errorf("want a fault at %s with %q, got:\n%s", tt.key, tt.text, text)
			}
			if _, err := New(c, w.deps(store)); err == nil || !strings.Contains(err.Error(), tt.key) {
				t.Errorf("New: %v", err)
			}
		})
	}
}

func TestExpiryIsRemarkedUpon(t *testing.T) {
	w := newWorld(t)
	z := w.addZone("a", "p256", "http://10.0.0.1:80", "a.test")
	key := newKey(t, "p256")
	for lifetime, want := range map[time.Duration]string{30 * time.Minute: "expired on", 48 * time.Hour: "expires on", 90 * 24 * time.Hour: ""} {
		z.Certificate = writePEM(t, filepath.Join(w.dir, "x.pem"), w.ca.issue(t, key.Public(), lifetime, "a.test"))
		keys, text, warnings := faults(&w.cfg)
		if len(keys) > 0 {
			t.Errorf("%v: refused:\n%s", lifetime, text)
		}
		if got := strings.Join(warnings, "\n"); (want == "") != (got == "") || !strings.Contains(got, want) {
			t.Errorf("%v: remarks %q, want %q", lifetime, got, want)
		}
	}
}

func TestBindFailureReleasesEverything(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	c := w.cfg
	c.Listen.TLS = []string{"127.0.0.1:0", w.addr()}
	if _, err := New(c, Deps{Dialer: w.loop, Store: newMemory(t), KeyIdentity: w.identity}); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("New: %v", err)
	}
}

// newMemory returns a store of its own.
func newMemory(t *testing.T) state.Store {
	t.Helper()
	s, err := state.OpenBolt(filepath.Join(t.TempDir(), "state.db"))
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}
