package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/mtls"
)

func TestCheck(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	edgeDir := t.TempDir()
	key, csr, _ := mtls.NewKeyCSR()
	chain, err := in.authority.IssueCSR(csr, mtls.Identity{TrustDomain: "test.example", Kind: mtls.KindEdge, Name: "e"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := mtls.WriteIdentity(edgeDir, key, chain, in.authority.RootPEM()); err != nil {
		t.Fatal(err)
	}
	head := "identity:\n  dir: " + dir + "\n"
	for _, tt := range []struct {
		name string
		yaml string
		code int
		says []string
	}{
		{"good", head + "allow:\n  - to: 10.0.0.0/8\n    ports: [443, 8000-8010, \"*\"]\n", 0, []string{"ok", "1 rules", in.addr}},
		{"nothing permitted", head + "allow: []\n", 0, []string{"warn", "every flow will be denied"}},
		{"own edges", head + "edges: [\"127.0.0.1:9\"]\nallow: []\n", 1, []string{"fail", "udp 127.0.0.1:9", "port 9", "remedy:"}},
		{"QUIC alone", head + "transport:\n  carrier: quic\nallow: []\n", 0, []string{"udp " + in.addr}},
		{"bad carrier", head + "transport:\n  carrier: udp\nallow: []\n", 3, []string{":4: ", "transport.carrier", "auto"}},
		{"bulk sessions", head + "transport:\n  bulk_sessions: 9\nallow: []\n", 3, []string{"transport.bulk_sessions", "0 to 8"}},
		{"a proxy", head + "transport:\n  carrier: tcp\n  proxy:\n    url: http://127.0.0.1:9\nallow: []\n", 1, []string{"TCP goes through http://127.0.0.1:9", "tcp " + in.addr}},
		{"a proxy's password in its URL", head + "transport:\n  proxy:\n    url: http://u:canary@proxy:1\nallow: []\n", 3, []string{":5: ", "transport.proxy.url", "password_file"}},
		{"a proxy that is none", head + "transport:\n  proxy:\n    url: socks5://proxy:1\nallow: []\n", 3, []string{"transport.proxy.url", "http://host:port"}},
		{"half of a proxy's login", head + "transport:\n  proxy:\n    url: http://proxy:1\n    user: u\nallow: []\n", 3, []string{"transport.proxy", "both"}},
		{"a login without a proxy", head + "transport:\n  proxy:\n    user: u\nallow: []\n", 3, []string{"transport.proxy.url", "missing"}},
		{"a proxy over QUIC", head + "transport:\n  carrier: quic\n  proxy:\n    url: http://proxy:1\nallow: []\n", 3, []string{"proxies carry TCP alone"}},
		{"a password that is not there", head + "transport:\n  carrier: tcp\n  proxy:\n    url: http://proxy:1\n    user: u\n    password_file: /nonexistent\nallow: []\n", 1, []string{"proxy", "/nonexistent"}},
		{"limits of networks", head + "allow: []\nlimits:\n  per_vnet:\n    vn_aaaa: 10\n    default: 0\n", 0, []string{"ok"}},
		{"a bad limit", head + "allow: []\nlimits:\n  per_vnet:\n    default: -1\n", 3, []string{":6: ", "limits.per_vnet.default", "-1"}},
		{"resolvers", head + "allow: []\ndns:\n  resolvers:\n    default: [10.0.0.53, \"[2001:db8::53]:5353\"]\n", 0, []string{"ok"}},
		{"a bad resolver", head + "allow: []\ndns:\n  resolvers:\n    default: [dns.example]\n", 3, []string{":6: ", "dns.resolvers.default[0]", "name server"}},
		{"no resolver", head + "allow: []\ndns:\n  resolvers:\n    default: []\n", 3, []string{"dns.resolvers.default", "empty"}},
		{"no allow", head, 3, []string{"allow: is missing", "allow: []"}},
		{"no identity", "allow: []\n", 3, []string{"identity.dir", "join"}},
		{"identity missing", "identity:\n  dir: /nonexistent\nallow: []\n", 3, []string{"/nonexistent", "keyhaven-connector join"}},
		{"identity of an edge", "identity:\n  dir: " + edgeDir + "\nallow: []\n", 3, []string{"not for a connector"}},
		{"no edges anywhere", "identity:\n  dir: " + edgeDir + "\nallow: []\n", 3, []string{"connector"}},
		{"unknown key", head + "alow: []\n", 3, []string{":3: ", "alow", "did you mean allow?"}},
		{"unknown key in a rule", head + "allow:\n  - to: 10.0.0.1\n    port: [443]\n", 3, []string{":5: ", "allow[0].port", "ports"}},
		{"wrong type", head + "allow: []\nlimits:\n  max_flows: many\n", 3, []string{":5: ", "limits.max_flows", "whole number"}},
		{"ports no list", head + "allow:\n  - to: 10.0.0.1\n    ports: 443\n", 3, []string{":5: ", "allow[0].ports", "list"}},
		{"bad port", head + "allow:\n  - to: 10.0.0.1\n    ports: [443, 70000]\n", 3, []string{":5: ", "allow[0].ports[1]", "65535"}},
		{"no ports", head + "allow:\n  - to: 10.0.0.1\n", 3, []string{":4: ", "allow[0].ports", `"*"`}},
		{"no destination", head + "allow:\n  - ports: [1]\n", 3, []string{":4: ", "allow[0].to", "missing"}},
		{"bits beyond the length", head + "allow:\n  - to: 10.0.0.1/8\n    ports: [1]\n", 3, []string{":4: ", "allow[0].to", "write 10.0.0.0/8"}},
		{"bad edge", head + "edges: [\"https://edge\"]\nallow: []\n", 3, []string{":3: ", "edges[0]", "port must be a number"}},
		{"edge twice", head + "edges: [edge, \"edge:7844\"]\nallow: []\n", 3, []string{":3: ", "edges[1]", "remove one"}},
		{"bad duration", head + "allow: []\ndrain:\n  grace: 30\n", 3, []string{":5: ", "drain.grace", "such as 5s"}},
		{"zero grace", head + "allow: []\ndrain:\n  grace: 0s\n", 3, []string{"drain.grace", "positive"}},
		{"ops for all", head + "allow: []\nops:\n  listen: 0.0.0.0:9464\n", 3, []string{":5: ", "ops.listen", "127.0.0.1", "ops.allow_non_loopback"}},
		{"two faults", head + "allow: []\ndrain:\n  grace: 0s\nlimits:\n  max_flows: 0\n", 3, []string{"drain.grace", "limits.max_flows"}},
		{"not YAML", head + "allow: [\n", 3, []string{"not valid YAML"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := write(t, filepath.Join(t.TempDir(), "connector.yaml"), tt.yaml)
			out, code := runProgram(t, "", "check", "--config", path)
			if code != tt.code {
				t.Errorf("exit code %d, want %d: %s", code, tt.code, out)
			}
			if strings.Contains(out, "canary") {
				t.Errorf("the output shows a password: %s", out)
			}
			for _, want := range tt.says {
				if !strings.Contains(out, want) {
					t.Errorf("output %q, want it to say %q", out, want)
				}
			}
		})
	}
}

func TestExamples(t *testing.T) {
	t.Parallel()
	in := install(t)
	dir := in.joined(t)
	files, err := filepath.Glob("../../examples/connector/*.yaml")
	if err != nil || len(files) < 2 {
		t.Fatalf("examples: %v, %v", files, err)
	}
	for _, f := range files {
		t.Run(filepath.Base(f), func(t *testing.T) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			text := string(b)
			const placeholder = "/var/lib/keyhaven-connector\n\n"
			if !strings.Contains(text, "  dir: "+placeholder) {
				t.Fatalf("the example's identity.dir is not %q", placeholder)
			}
			text = strings.Replace(text, "  dir: "+placeholder, "  dir: "+dir+"\n\n", 1)
			path := write(t, filepath.Join(t.TempDir(), "connector.yaml"), text)
			if out, code := runProgram(t, "", "check", "--offline", "--config", path); code != 0 {
				t.Errorf("exit code %d: %s", code, out)
			}
		})
	}
}
