package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/mtls"
)

// The edge must stay unable to hold a private key of a site. Run with -count=1: the test cache does not see go list.
func TestDeps(t *testing.T) {
	cmd := exec.Command("go", "list", "-deps", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := 0
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		deps++
		if slices.Contains([]string{"signer", "pkcs11", "transit"}, path.Base(dep)) {
			t.Errorf("the edge depends on %s", dep)
		}
	}
	if deps < 100 {
		t.Errorf("only %d packages listed; is this the edge?", deps)
	}
}

// plant makes what an example's paths name, below dir.
func plant(dir string) error {
	issue := func(ca, out, domain string) error {
		a, err := mtls.InitAuthority(filepath.Join(dir, ca), domain)
		if err != nil {
			return err
		}
		return issueIdentity(a, mtls.Identity{TrustDomain: domain, Kind: mtls.KindEdge, Name: "edge1"}, 0, filepath.Join(dir, out), false)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	cert := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour),
		DNSNames: []string{"www.example.com", "*.apps.example.com"}, KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	return errors.Join(err,
		issue("edge-ca", "edge-identity", "edge.example.com"),
		issue("key-ca", "key-identity", "keys.example.com"),
		os.MkdirAll(filepath.Join(dir, "zones"), 0o700),
		os.WriteFile(filepath.Join(dir, "zones", "www.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
}

// planted returns the example's text and the path of a copy whose paths lie below a directory that has what they name.
func planted(t *testing.T, example string, edits ...string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "examples", "edge", example))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := plant(dir); err != nil {
		t.Fatal(err)
	}
	s := string(text)
	if example == "minimal.yaml" { // its paths are defaults
		s += "identity: {ca_dir: /etc/keyhaven/edge-ca, dir: /etc/keyhaven/edge-identity}\n"
	}
	for i := 0; i < len(edits); i += 2 {
		if !strings.Contains(s, edits[i]) {
			t.Fatalf("%s does not hold %q", example, edits[i])
		}
		s = strings.Replace(s, edits[i], edits[i+1], 1)
	}
	file := filepath.Join(dir, example)
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(s, "/etc/keyhaven", dir)), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func TestExamples(t *testing.T) {
	files, err := os.ReadDir("../../examples/edge")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, f := range files {
		t.Run(f.Name(), func(t *testing.T) {
			cfg, _, err := load(planted(t, f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			// What an example leaves out has its default, also where it gives something of the same group.
			d := defaults()
			if cfg.Tunnel.ConnectorLifetime != d.Tunnel.ConnectorLifetime || cfg.Visitors.Limits != d.Visitors.Limits || !reflect.DeepEqual(cfg.Admin, d.Admin) {
				t.Errorf("defaults are lost: %+v", cfg)
			}
		})
	}
}

func TestConfigErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit []string
		says []string
	}{
		{"unknown key", []string{"drain_timeout: 30s\n\nops", "drain_timeuot: 30s\n\nops"}, []string{"edge.yaml:44", "tunnel.drain_timeuot", "did you mean drain_timeout"}},
		{"wrong type", []string{"connector_lifetime: 24h", "connector_lifetime: 24"}, []string{"tunnel.connector_lifetime", "unit"}},
		{"lifetime", []string{"connector_lifetime: 24h", "connector_lifetime: 1s"}, []string{"edge.yaml:42", "tunnel.connector_lifetime", "1m"}},
		{"no address", []string{`["edge1.example.com:7844"]`, `[]`}, []string{"tunnel.advertise", "host:port"}},
		{"bad address", []string{`["edge1.example.com:7844"]`, `["edge1.example.com"]`}, []string{"tunnel.advertise[0]", "host:port"}},
		{"port 0", []string{`["edge1.example.com:7844"]`, `["edge1.example.com:0"]`}, []string{"tunnel.advertise[0]", "65535"}},
		{"ops for all", []string{`"127.0.0.1:9464"`, `"0.0.0.0:9464"`}, []string{"ops.listen", "loopback"}},
		{"authority is missing", []string{"ca_dir: /etc/keyhaven/edge-ca", "ca_dir: /nowhere"}, []string{"identity.ca_dir", "/nowhere", "ca init"}},
		{"identity is missing", []string{"dir: /etc/keyhaven/edge-identity", "dir: /nowhere"}, []string{"identity.dir", "ca issue edge"}},
		{"identity of the other owner", []string{"dir: /etc/keyhaven/edge-identity", "dir: /etc/keyhaven/key-identity"}, []string{"identity.dir", "keys.example.com", "edge.example.com"}},
		{"key identity is missing", []string{"dir: /etc/keyhaven/key-identity", "dir: /nowhere"}, []string{"key_identity.dir", "client add"}},
		{"no key identity", []string{"key_identity:\n", "key_identity: {}\nx:\n"}, []string{"unknown key"}},
		{"no key identity at all", []string{"dir: /etc/keyhaven/key-identity", `dir: ""`}, []string{"visitors.key_servers[0]", "key_identity.dir"}},
		{"zone's fault", []string{"key_server: hsm", "key_server: hms"}, []string{"visitors.zones[0].key_server", "hms"}},
		{"certificate", []string{"zones/www.pem", "zones/nope.pem"}, []string{"visitors.zones[0].certificate", "nope.pem"}},
		{"state twice", []string{"file: /var/lib/keyhaven/edge/state.db\n", "file: /srv/state.db\n  etcd: {endpoints: [\"https://etcd1.example.com:2379\"]}\n"}, []string{"state.file", "state.etcd"}},
		{"cluster in clear", []string{"file: /var/lib/keyhaven/edge/state.db\n", "etcd: {endpoints: [\"http://192.0.2.1:2379\"]}\n"}, []string{"state.etcd", "https"}},
		{"cluster without members", []string{"file: /var/lib/keyhaven/edge/state.db\n", "etcd: {ca: /x}\n"}, []string{"state.etcd", "endpoints"}},
		{"bulk carrier", []string{"connector_lifetime: 24h", "bulk_carrier: udp"}, []string{"tunnel.bulk_carrier", "quic"}},
		{"tcp address", []string{"connector_lifetime: 24h", "listen_tcp: none"}, []string{"tunnel.listen_tcp", "off"}},
		{"socket", []string{"socket: /run/keyhaven/edge.sock", `socket: ""`}, []string{"admin.socket"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := load(planted(t, "edge.yaml", tt.edit...))
			if err == nil {
				t.Fatal("the configuration was taken")
			}
			for _, s := range tt.says {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("error %q does not say %q", err, s)
				}
			}
		})
	}
}

func TestFixedSections(t *testing.T) {
	file := planted(t, "edge.yaml")
	a, _, err := load(file)
	if err != nil {
		t.Fatal(err)
	}
	b, _, err := load(file)
	if err != nil {
		t.Fatal(err)
	}
	if got := fixed(a, b); len(got) != 0 {
		t.Errorf("the same file twice: %v changed", got)
	}
	b.Visitors.Zones = nil
	b.Visitors.KeyServers = nil
	b.Visitors.Limits.OriginResponseTimeout = time.Hour
	if got := fixed(a, b); len(got) != 0 {
		t.Errorf("other zones: %v, want them to be reloadable", got)
	}
	b.Tunnel.Advertise = []string{"x:1"}
	b.Visitors.Listen.TLS = []string{":444"}
	b.Visitors.Limits.Streams++
	if got := strings.Join(fixed(a, b), " "); got != "tunnel visitors.listen visitors.limits (but those of origins)" {
		t.Errorf("changed %q, want tunnel, visitors.listen and visitors.limits", got)
	}
}

func TestVNetUsers(t *testing.T) {
	cfg, _, err := load(planted(t, "edge.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const file = " of the configuration file"
	if got := strings.Join(cfg.users(control.ThingVNet, "default", "vn_x"), ", "); got != `key server group "hsm"`+file+`, zone "www"`+file {
		t.Errorf("users of the default network: %s", got)
	}
	for _, thing := range []control.Thing{control.ThingVNet, control.ThingTunnel, control.ThingPool} {
		if got := cfg.users(thing, "red", ""); len(got) != 0 {
			t.Errorf("users of the %s red: %v", thing, got)
		}
	}
	if got := cfg.users(control.ThingTunnel, "default", ""); len(got) != 0 {
		t.Errorf("users of a tunnel with a network's name: %v", got)
	}
	if got := cfg.vnetRefs(); len(got) != 1 || got[0] != "default" {
		t.Errorf("networks named: %v", got)
	}
}
