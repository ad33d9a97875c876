package ingressconf

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const caPEM = `-----BEGIN CERTIFICATE-----
MIIBdDCCARmgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDEwl0ZXN0IHJv
-----END CERTIFICATE-----
`

func TestParse(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		yaml string
		says []string // empty: it is good
	}{
		{"rules", "ingress:\n  - hostname: a.example\n    path: ^/x\n    service: http://10.0.0.1\n  - service: http_status:404\n", nil},
		{"JSON", `{"ingress":[{"service":"hello_world"}],"ingress_origin":{"connect_timeout":"5s","no_tls_verify":true}}`, nil},
		{"every service", "ingress:\n  - {hostname: a.x, service: 'https://[2001:db8::1]:8443'}\n  - {hostname: b.x, service: 'tcp://db.corp:5432'}\n  - {hostname: c.x, service: 'unix:/run/a.sock'}\n  - service: hello_world\n", nil},
		{"nothing", "", nil},
		{"empty object", "{}", nil},
		{"other keys", "allow: []\n", []string{"line 1", "allow", "unknown key"}},
		{"unknown key in a rule", "ingress:\n  - service: hello_world\n    hostnme: x\n", []string{"line 3", "ingress[0].hostnme", "did you mean hostname?"}},
		{"camel case", "ingress:\n  - service: hello_world\n    origin: {connectTimeout: 5s}\n", []string{"ingress[0].origin.connectTimeout", "unknown key"}},
		{"key twice", "ingress:\n  - service: hello_world\n    service: hello_world\n", []string{"ingress[0].service", "given twice"}},
		{"wrong type", "ingress: hello_world\n", []string{"ingress", "must be a list"}},
		{"no service", "ingress:\n  - hostname: a.example\n  - service: hello_world\n", []string{"line 2", "ingress[0].service", "is missing"}},
		{"no catch-all", "ingress:\n  - hostname: a.example\n    service: hello_world\n", []string{"ingress[0]", "the last rule"}},
		{"path in the last", "ingress:\n  - path: ^/a\n    service: hello_world\n", []string{"the last rule"}},
		{"catch-all first", "ingress:\n  - service: hello_world\n  - service: hello_world\n", []string{"ingress[0]", "never reached"}},
		{"star alone is a catch-all", "ingress:\n  - {hostname: '*', service: hello_world}\n  - service: hello_world\n", []string{"ingress[0]", "never reached"}},
		{"star in the middle", "ingress:\n  - {hostname: 'a.*.example', service: hello_world}\n  - service: hello_world\n", []string{"ingress[0].hostname", "beginning"}},
		{"two stars", "ingress:\n  - {hostname: '*.*.example', service: hello_world}\n  - service: hello_world\n", []string{"ingress[0].hostname", "beginning"}},
		{"port in the hostname", "ingress:\n  - {hostname: 'a.example:80', service: hello_world}\n  - service: hello_world\n", []string{"ingress[0].hostname"}},
		{"bad expression", "ingress:\n  - {path: '(', service: hello_world}\n  - service: hello_world\n", []string{"ingress[0].path", "RE2", "missing closing"}},
		{"path for bytes", "ingress:\n  - {path: ^/a, service: 'tcp://a:1'}\n  - service: hello_world\n", []string{"ingress[0].path", "tcp://"}},
		{"service with a path", "ingress:\n  - service: http://a/b\n", []string{"ingress[0].service", "scheme, host and port alone"}},
		{"service with a query", "ingress:\n  - service: http://a?b\n", []string{"ingress[0].service", "alone"}},
		{"service with a user", "ingress:\n  - service: http://u:p@a\n", []string{"ingress[0].service", "alone"}},
		{"tcp without a port", "ingress:\n  - service: tcp://a\n", []string{"port is missing"}},
		{"port zero", "ingress:\n  - service: http://a:0\n", []string{"1 to 65535"}},
		{"relative socket", "ingress:\n  - service: unix:a.sock\n", []string{"absolute path"}},
		{"unclean socket", "ingress:\n  - service: unix:/run/../etc/a\n", []string{"absolute path"}},
		{"status 99", "ingress:\n  - service: http_status:99\n", []string{"200 to 599"}},
		{"status 0404", "ingress:\n  - service: http_status:0404\n", []string{"200 to 599"}},
		{"unknown service", "ingress:\n  - service: ftp://a\n", []string{"is no service"}},
		{"bare host", "ingress:\n  - service: localhost:80\n", []string{"is no service"}},
		{"negative", "ingress_origin: {connect_timeout: -1s}\ningress:\n  - service: hello_world\n", []string{"ingress_origin.connect_timeout", "positive"}},
		{"too many connections", "ingress:\n  - service: hello_world\n    origin: {keep_alive_connections: 1000000}\n", []string{"keep_alive_connections"}},
		{"proxy protocol", "ingress:\n  - service: hello_world\n    origin: {proxy_protocol: v3}\n", []string{"proxy_protocol", "v1, v2 or off"}},
		{"proxy protocol over HTTP/2", "ingress_origin: {proxy_protocol: v2}\ningress:\n  - service: http://a\n    origin: {http2_origin: true}\n", []string{"ingress[0].origin.proxy_protocol", "http2_origin"}},
		{"switched off", "ingress_origin: {proxy_protocol: v2}\ningress:\n  - service: http://a\n    origin: {http2_origin: true, proxy_protocol: 'off'}\n", nil},
		{"host header with a space", "ingress:\n  - service: hello_world\n    origin: {http_host_header: 'a b'}\n", []string{"http_host_header"}},
		{"bad PEM", "ingress:\n  - service: hello_world\n    origin: {ca_pool: '-----BEGIN CERTIFICATE-----'}\n", []string{"ca_pool", "no certificate"}},
		{"two faults", "ingress:\n  - service: ftp://a\n    origin: {proxy_protocol: v3}\n", []string{"ingress[0].service", "ingress[0].origin.proxy_protocol"}},
		{"anchors", "ingress:\n  - &a {service: hello_world}\n", []string{"anchors"}},
		{"not YAML", "ingress: [\n", []string{"not valid YAML"}},
		{"too large", strings.Repeat("#", MaxSize+1), []string{"bytes"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse([]byte(tt.yaml))
			if len(tt.says) == 0 {
				if err != nil {
					t.Fatalf("got %v, want none", err)
				}
				return
			}
			if err == nil {
				t.Fatal("got no error")
			}
			for _, want := range tt.says {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q, want it to say %q", err, want)
				}
			}
		})
	}
}

func TestRemoteNamesNoFiles(t *testing.T) {
	t.Parallel()
	for yaml, want := range map[string]string{
		"ingress:\n  - service: unix:/run/docker.sock\n":                               "ingress[0].service",
		"ingress:\n  - service: https://a\n    origin: {ca_pool: /etc/passwd}\n":       "ingress[0].origin.ca_pool",
		"ingress_origin: {ca_pool: /etc/passwd}\ningress:\n  - service: hello_world\n": "ingress_origin.ca_pool",
	} {
		if _, err := Parse([]byte(yaml)); err != nil {
			t.Errorf("Parse(%q): %v", yaml, err)
		}
		if _, err := ParseRemote([]byte(yaml)); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "own file") {
			t.Errorf("ParseRemote(%q): got %v, want it to refuse %s", yaml, err, want)
		}
	}
}

func TestOptionsAreCompleted(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte("ingress_origin: {connect_timeout: 5s, no_tls_verify: true}\ningress:\n  - {hostname: a.x, service: 'https://a', origin: {no_tls_verify: false, tls_timeout: 1s}}\n  - service: https://b\n"))
	if err != nil {
		t.Fatal(err)
	}
	a, b := c.Targets()[0].Origin, c.Targets()[1].Origin
	if a.ConnectTimeout != 5*time.Second || a.TLSTimeout != time.Second || True(a.NoTLSVerify) || a.KeepAliveConnections != 100 {
		t.Errorf("the first rule's options: %+v", a)
	}
	if b.TLSTimeout != 10*time.Second || !True(b.NoTLSVerify) || b.KeepAliveTimeout != 90*time.Second {
		t.Errorf("the second rule's options: %+v", b)
	}
}

func TestMatch(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte(`
ingress:
  - {hostname: shop.example, path: "^/api/", service: http_status:201}
  - {hostname: shop.example, service: http_status:202}
  - {hostname: "*.example", path: "\\.png$", service: http_status:203}
  - {hostname: "*.example", service: http_status:204}
  - {hostname: Bücher.test, service: "tcp://books:9"}
  - {path: "^/%41", service: http_status:205}
  - service: http_status:404
`))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		host, path string
		want, tcp  int
	}{
		{"shop.example", "/api/x", 0, 1},
		{"SHOP.Example.:8443", "/api/x", 0, 1},
		{"shop.example", "/API/x", 1, 1},
		{"a.example", "/x.png", 2, 3},
		{"a.b.example", "/x.png", 2, 3},
		{"a.b.example", "/x", 3, 3},
		{"example", "/", 6, 6},
		{"notexample", "/", 6, 6},
		{"bücher.test", "/", 4, 4},
		{"xn--bcher-kva.test", "/", 4, 4},
		{"other", "/%41", 5, 6},
		{"other", "/A", 6, 6}, // the bytes as they came
		{"10.0.0.1:80", "/", 6, 6},
		{"[2001:db8::1]:80", "/", 6, 6},
	} {
		host, err := CanonicalHost(tt.host)
		if err != nil {
			t.Errorf("%s: %v", tt.host, err)
			continue
		}
		if got, _ := c.Match(host, tt.path); got != tt.want {
			t.Errorf("Match(%s, %s): got %d, want %d", tt.host, tt.path, got, tt.want)
		}
		if got, _ := c.MatchFlow(host); got != tt.tcp {
			t.Errorf("MatchFlow(%s): got %d, want %d", tt.host, got, tt.tcp)
		}
	}
	for host, want := range map[string]bool{"shop.example": true, "xn--bcher-kva.test": false, "other": true} {
		if got := c.byPath(host); got != want {
			t.Errorf("byPath(%s): got %t, want %t", host, got, want)
		}
	}
	if got, _ := (*Config)(nil).Match("a", "/"); got != -1 {
		t.Errorf("no rules: got %d, want -1", got)
	}
	lines := c.Explain("a.example", "/x")
	if len(lines) != 4 || !strings.Contains(lines[2], `path "\\.png$" does not match`) || !strings.Contains(lines[3], "matches: http_status:204") {
		t.Errorf("Explain: %q", lines)
	}
	for _, bad := range []string{"", "a b", "*.example", "-a", "a/b"} {
		if got, err := CanonicalHost(bad); err == nil {
			t.Errorf("CanonicalHost(%q): got %q, want an error", bad, got)
		}
	}
}

func TestWarnings(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte("ingress:\n  - {hostname: '*.example', service: hello_world}\n  - {hostname: a.example, path: ^/x, service: hello_world}\n  - {path: ^/x, service: hello_world}\n  - {hostname: b.test, path: ^/x, service: hello_world}\n  - {hostname: b.test, path: ^/y, service: hello_world}\n  - service: hello_world\n"))
	if err != nil {
		t.Fatal(err)
	}
	w := strings.Join(c.Warnings(), "\n")
	if len(c.Warnings()) != 2 || !strings.Contains(w, "ingress[1]: is never reached, because ingress[0]") || !strings.Contains(w, "ingress[3]: is never reached, because ingress[2]") {
		t.Errorf("got %q", w)
	}
}

func TestFromFileAndInline(t *testing.T) {
	t.Parallel()
	file := "identity:\n  dir: /x\nallow: []\ningress_origin:\n  ca_pool: /ca.pem\ningress:\n  - hostname: a.x\n    service: https://a\n    origin: {connect_timeout: 1s}\n  - service: hello_world\n"
	doc, err := FromFile([]byte(file))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Canonical(doc); err == nil {
		t.Error("a document that names a file is canonical, want it refused")
	}
	asked := ""
	in, err := Inline(doc, func(p string) ([]byte, error) { asked = p; return []byte(caPEM), nil })
	if err != nil || asked != "/ca.pem" || !strings.Contains(string(in), "BEGIN CERTIFICATE") {
		t.Errorf("Inline: asked for %q, %v, %s", asked, err, in)
	}
	if _, err := Inline(doc, func(string) ([]byte, error) { return nil, os.ErrNotExist }); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "ingress_origin.ca_pool") {
		t.Errorf("a missing file: %v", err)
	}
	if _, err := Inline(doc, func(string) ([]byte, error) { return []byte("root:x:0:0"), nil }); err == nil || strings.Contains(err.Error(), "root:") {
		t.Errorf("no PEM: %v", err)
	}
	if _, err := FromFile([]byte("allow: []\n")); err == nil || !strings.Contains(err.Error(), "no ingress rules") {
		t.Errorf("a file without rules: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join("..", "examples", "connector", "ingress.yaml")); err != nil {
		t.Error(err)
	} else if _, err := FromFile(b); err != nil {
		t.Errorf("the example: %v", err)
	}
}

func TestServiceIsItsOwnForm(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"http://a:80", "https://[2001:db8::1]:8443", "tcp://10.0.0.1:1", "udp://10.0.0.1:5683", "unix:/a", "http_status:204", "hello_world"} {
		if svc, err := ParseService(s); err != nil || svc.String() != s {
			t.Errorf("%s: got %s, %v", s, svc, err)
		}
	}
}

func TestParseBandwidth(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]int64{
		"8kbit/s": 1000, "2Mbit/s": 250_000, "1.5Mbit/s": 187_500, "1Gbit/s": 125_000_000, "16000bit/s": 2000, "250kB/s": 250_000,
		"3 MB/s": 3_000_000, "1GB/s": 1_000_000_000, "4KiB/s": 4096, "1MiB/s": 1 << 20, "2000B/s": 2000, "800Gbit/s": 100_000_000_000,
	} {
		if got, err := ParseBandwidth(in); err != nil || got != want {
			t.Errorf("%s: got %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "2", "Mbit/s", "2Mbps", "2 mbit/s", "2Mb/s", "-1Mbit/s", "+1Mbit/s", "1e6B/s", "0x10MB/s", "InfB/s", "NaNB/s", "1.2.3MB/s", ".MB/s", "7kbit/s", "801Gbit/s", "0kB/s",
		strings.Repeat("9", 400) + "B/s", "2Mbit/s ", "\n2Mbit/s", "1_000kB/s"} {
		if got, err := ParseBandwidth(in); err == nil {
			t.Errorf("%q: got %d, want an error", in, got)
		}
	}
}

func TestBandwidthAndPackets(t *testing.T) {
	t.Parallel()
	c, err := Parse([]byte("ingress:\n  - {hostname: coap.x, service: 'udp://192.168.1.22:5683', bandwidth: 1Mbit/s}\n  - {hostname: a.x, service: 'http://a'}\n  - service: http_status:404\n"))
	if err != nil {
		t.Fatal(err)
	}
	i, target := c.MatchFlow("coap.x")
	if i != 0 || target.Service.Scheme != UDP || target.Bandwidth != 125_000 || c.Targets()[1].Bandwidth != 0 {
		t.Errorf("got rule %d, %+v", i, target)
	}
	for rule, want := range map[string]string{
		"{service: 'udp://a'}":                                               "ingress[0].service",
		"{hostname: h, path: /x, service: 'udp://a:1'}":                      "ingress[0].path",
		"{service: 'udp://a:1', origin: {proxy_protocol: v2}}":               "ingress[0].origin.proxy_protocol",
		"{service: 'udp://a:1', bandwidth: fast}":                            "ingress[0].bandwidth",
		"{service: 'http_status:404', bandwidth: 1Mbit/s}":                   "ingress[0].bandwidth",
		"{service: hello_world, bandwidth: 1Mbit/s}":                         "ingress[0].bandwidth",
		"{service: 'udp://a:1', bandwith: 1Mbit/s}":                          "bandwith",
		"{service: 'http://a', bandwidth: " + strings.Repeat("1", 100) + "}": "ingress[0].bandwidth",
	} {
		if _, err := Parse([]byte("ingress:\n  - " + rule + "\n")); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: got %v, want an error about %s", rule, err, want)
		}
	}
}
