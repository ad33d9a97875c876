package main

import (
	"path/filepath"
	"strings"
	"testing"
)

const ingressRules = `
ingress:
  - hostname: shop.example
    path: ^/api/
    service: https://10.0.0.1:8443
  - hostname: "*.example"
    service: http://10.0.0.2
  - hostname: a.example
    service: hello_world
  - hostname: db.test
    service: tcp://10.0.0.3:5432
  - service: http_status:404
`

func TestIngressCommands(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	head := "identity:\n  dir: " + dir + "\nallow: []\n"
	path := write(t, filepath.Join(t.TempDir(), "c.yaml"), head+ingressRules)
	off := write(t, filepath.Join(t.TempDir(), "off.yaml"), head+"remote_config: false\n"+ingressRules)
	none := write(t, filepath.Join(t.TempDir(), "none.yaml"), head)
	bad := write(t, filepath.Join(t.TempDir(), "bad.yaml"), head+"ingress:\n  - hostname: a.example\n    service: ftp://x\n")
	missing := write(t, filepath.Join(t.TempDir(), "missing.yaml"), head+"ingress:\n  - service: https://a\n    origin:\n      ca_pool: /nonexistent.pem\n")
	for _, tt := range []struct {
		args []string
		code int
		says []string
	}{
		{[]string{"validate", "--config", path}, 0, []string{"ingress[0]  shop.example ^/api/  https://10.0.0.1:8443", "ingress[4]  *  http_status:404", "warning   ingress[2]: is never reached", "ok"}},
		{[]string{"validate", "--config", none}, 0, []string{"there are no ingress rules"}},
		{[]string{"validate", "--config", bad}, 3, []string{":6: ingress[0].service", `"ftp://x" is no service`}},
		{[]string{"validate", "--config", missing}, 3, []string{"ingress[0].origin.ca_pool", "/nonexistent.pem"}},
		{[]string{"rule", "https://shop.example/api/x?y", "--config", path}, 0, []string{"the configuration file", `ingress[0]: hostname "shop.example" matches, path "^/api/" matches: https://10.0.0.1:8443`}},
		{[]string{"rule", "https://shop.example", "--config", path}, 0, []string{`ingress[0]: path "^/api/" does not match`, `ingress[1]: hostname "*.example" matches: http://10.0.0.2:80`}},
		{[]string{"rule", "https://shop.example/api/../x", "--config", path}, 1, []string{"status 400", "more than one way"}},
		{[]string{"rule", "http://other/", "--config", path}, 0, []string{`ingress[3]: hostname "db.test" does not match`, "takes every request: http_status:404"}},
		{[]string{"rule", "tcp://db.test", "--config", path}, 0, []string{"tcp://10.0.0.3:5432"}},
		{[]string{"rule", "tcp://other", "--config", path}, 1, []string{"ingress[4]", "refused"}},
		{[]string{"rule", "http://other", "--config", none}, 1, []string{"no rule takes it"}},
		{[]string{"rule", "other", "--config", path}, 2, []string{"write http://host/path"}},
		{[]string{"rule", "--config", path}, 2, nil},
		{[]string{"rule", "http://a b/", "--config", path}, 2, nil},
	} {
		t.Run(strings.Join(tt.args[:2], " "), func(t *testing.T) {
			out, code := runProgram(t, "", append([]string{"ingress"}, tt.args...)...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d: %s", code, tt.code, out)
			}
			for _, want := range tt.says {
				if !strings.Contains(out, want) {
					t.Errorf("output %q, want it to say %q", out, want)
				}
			}
		})
	}

	// What the edge configured before comes first, if it may.
	write(t, filepath.Join(dir, remoteFile), `{"version":7,"body":{"ingress":[{"service":"hello_world"}]}}`)
	for file, want := range map[string]string{path: "the edge's configuration, version 7\ningress[0]: takes every request: hello_world", off: "the configuration file"} {
		if out, code := runProgram(t, "", "ingress", "rule", "http://shop.example/", "--config", file); code != 0 || !strings.Contains(out, want) {
			t.Errorf("with a kept configuration: exit code %d, %q, want %q", code, out, want)
		}
	}
	if out, _ := runProgram(t, "", "ingress", "validate", "--config", path); !strings.Contains(out, "version 7, stands in place") {
		t.Errorf("validate does not say that the edge's rules count: %q", out)
	}
}
