package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

// sealedTransit is a Transit engine that logs in and shows its key, and does not sign. It returns its address and the key's public half.
func sealedTransit(t *testing.T) (address string, pub *ecdsa.PublicKey) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	answers := map[string]any{
		"/v1/auth/token/lookup-self": map[string]any{"ttl": 3600, "expire_time": "2030-01-01T00:00:00Z", "renewable": false},
		"/v1/transit/keys/remote": map[string]any{
			"type": "ecdsa-p256", "exportable": false, "allow_plaintext_backup": false, "latest_version": 1,
			"keys": map[string]any{"1": map[string]any{"public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}},
		},
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, ok := answers[r.URL.Path]
		if !ok {
			http.Error(w, `{"errors":["Vault is sealed"]}`, http.StatusServiceUnavailable)
			return
		}
		if err := json.NewEncoder(w).Encode(map[string]any{"data": data}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(srv.Close)
	return srv.URL, &k.PublicKey
}

// A series is what a scrape has of one metric: for each label the values seen.
type series map[string][]string

var (
	pairPattern     = regexp.MustCompile(`([a-z_]+)(=~|!=|!~|=)"((?:[^"\\]|\\.)*)"`)
	selectorPattern = regexp.MustCompile(`\b(keyhaven_[a-z0-9_]+)(\{[^}]*\})?`)
)

// scrape returns the series of the project's own metrics.
func (p *program) scrape() map[string]series {
	p.s.t.Helper()
	code, text := p.get("/metrics")
	if code != http.StatusOK {
		p.s.t.Fatalf("scrape: %d", code)
	}
	all := map[string]series{}
	for line := range strings.Lines(text) {
		m := selectorPattern.FindStringSubmatch(line)
		if m == nil || strings.HasPrefix(line, "#") {
			continue
		}
		if all[m[1]] == nil {
			all[m[1]] = series{}
		}
		for _, pair := range pairPattern.FindAllStringSubmatch(m[2], -1) {
			all[m[1]][pair[1]] = append(all[m[1]][pair[1]], pair[3])
		}
	}
	return all
}

// documentedPattern is a line of the key server's table in docs/metrics.md: name, type and labels.
var documentedPattern = regexp.MustCompile("(?m)^\\| `(keyhaven_(?:keyserver|signer)_[a-z0-9_]+)` \\| ([a-z]+) \\| ([^|]*) \\|")

// checkMetricsPage holds docs/metrics.md against a scrape: each name is exported, each exported name is there, with its labels.
func checkMetricsPage(t *testing.T, exported map[string]series) {
	t.Helper()
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, row := range documentedPattern.FindAllStringSubmatch(string(page), -1) {
		names := []string{row[1]}
		if row[2] == "histogram" {
			names = []string{row[1] + "_bucket", row[1] + "_count", row[1] + "_sum"}
		}
		for _, name := range names {
			documented[name] = true
			labels, ok := exported[name]
			if !ok {
				t.Errorf("docs/metrics.md has %s, which the server does not export", name)
			}
			for label := range labels {
				if label != "le" && !strings.Contains(row[3], "`"+label+"`") {
					t.Errorf("docs/metrics.md does not have the label %s of %s", label, name)
				}
			}
		}
	}
	for name := range exported {
		if !documented[name] {
			t.Errorf("the server exports %s, which docs/metrics.md does not have", name)
		}
	}
}

// TestMonitoringAsksForWhatIsExported scrapes a server that has had some of everything, and holds alerts and dashboard against what it shows: names,
// labels, and the values of labels that are asked for.
func TestMonitoringAsksForWhatIsExported(t *testing.T) {
	s := newSite(t)
	tok := s.token("ec:p256")
	ec := skiOf(t, s.must("key", "list", "--uri", tok.URI()), "ec")
	address, remote := sealedTransit(t)
	s.must("audit", "keygen", "--out", s.path("audit.key"))
	text := s.config(tokenConfigOf(tok, "") + fmt.Sprintf(`transit:
  - address: %s
    keys: [{name: remote}]
    auth: {method: token-file, token_file: %s}
audit: {mode: required, dir: %s, key_file: %s, jsonl: %s}
clients:`, address, s.write("vault-token", 0o600, "canary-token\n"), s.path("audit"), s.path("audit.key"), s.path("audit.copy")) + rule("one", "sign"))
	cfg := s.write("ks.yaml", 0o600, text)
	p := s.start(cfg)
	if l := p.wait("a token for Transit ends; put another into its file"); l["home"] != strings.TrimPrefix(address, "http://")+"/transit" {
		t.Errorf("got %v", l)
	}

	c := p.client("one")
	if _, err := do(t, c, signOp(ec)); err != nil {
		t.Fatal(err)
	}
	if _, err := do(t, c, signOp(keyless.SKI{1})); err == nil {
		t.Error("a key that is not there signed")
	}
	if _, err := do(t, c, signOp(mustSKI(t, remote))); err == nil {
		t.Error("a sealed engine signed")
	}
	if err := connect(t, p, &tls.Config{InsecureSkipVerify: true}); err == nil {
		t.Error("a client without a certificate was let in")
	}
	s.write("ks.yaml", 0o600, "listen: [")
	p.reload(refused)
	s.write("ks.yaml", 0o600, text)
	p.reload(reloaded)
	var exported map[string]series
	eventually(t, "all homes were probed, and the reload is counted", func() bool {
		exported = p.scrape()
		return slices.Contains(exported["keyhaven_keyserver_probe_success"]["key"], mustSKI(t, remote).String()) &&
			slices.Contains(exported["keyhaven_keyserver_reloads_total"]["result"], "taken")
	})

	checkMetricsPage(t, exported)
	files, err := filepath.Glob("../../docs/monitoring/keyserver-*")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		made := strings.HasSuffix(file, "-test.yaml") // whose values are made up
		for _, m := range selectorPattern.FindAllStringSubmatch(strings.ReplaceAll(string(b), `\"`, `"`), -1) {
			have, ok := exported[m[1]]
			if !ok {
				t.Errorf("%s asks for %s, which the server does not export", filepath.Base(file), m[1])
				continue
			}
			for _, pair := range pairPattern.FindAllStringSubmatch(m[2], -1) {
				label, op, value := pair[1], pair[2], pair[3]
				switch values, ok := have[label]; {
				case label == "instance" || label == "job": // Prometheus adds these
				case !ok:
					t.Errorf("%s asks for %s, and that metric has no label %s", filepath.Base(file), m[0], label)
				case op == "=" && !made && !strings.Contains(value, "$") && !slices.Contains(values, value):
					t.Errorf("%s asks for %s, and the label has only the values %q", filepath.Base(file), m[0], values)
				}
			}
		}
	}
	p.stop()
}
