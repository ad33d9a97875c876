package edge

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"

	"github.com/keyhaven/keyhaven/edge/zone"
)

// signedDir is a directory as make install-site makes it, small, and the key that it is signed with.
func signedDir(t *testing.T) (dir, key string) {
	t.Helper()
	dir = t.TempDir()
	public, secret, err := minisign.GenerateKey(rand.Reader)
	must(t, err)
	var sums bytes.Buffer
	for name, text := range map[string]string{"bin/keyhaven-connector-linux-amd64": "#!/bin/sh\n", "bin/keyhaven-connector.service": "[Service]\n", "bin/connector.yaml": "allow: []\n"} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256([]byte(text)), name)
	}
	must(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS"), sums.Bytes(), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS.minisig"), minisign.Sign(secret, sums.Bytes()), 0o644))
	return dir, public.String()
}

// The edge itself answers for an origin that is a directory, below its path, beside other origins; curl takes the script over
// TLS whose key is at the key server, and dash finds its way by it.
func TestInstallOrigin(t *testing.T) {
	dir, key := signedDir(t)
	w := newWorld(t)
	z := w.addZone("a", "p256", origin(t, func(rw http.ResponseWriter, r *http.Request) { fmt.Fprint(rw, "origin ", r.URL.Path) }), "get.test")
	z.Origins = append(z.Origins, zone.Origin{Path: "/get", Install: dir, InstallKeys: []string{key}})
	w.start()
	for _, version := range []string{"1.1", "2", "3"} {
		client := w.client(version)
		for path, want := range map[string]string{
			"/":                         "origin /",
			"/getting":                  "origin /getting",
			"/get/install.sh":           "BASE='https://get.test/get'\n",
			"/get/":                     "https://get.test/get/install.sh | sudo sh",
			"/get":                      "https://get.test/get/install.sh | sudo sh",
			"/get/bin/connector.yaml":   "allow: []\n",
			"/get/bin/../../etc/shadow": "The path is not valid",
			"/get/etc/shadow":           "There is no such file",
		} {
			res, err := client.Get("https://get.test" + path)
			must(t, err)
			b, err := io.ReadAll(res.Body)
			must(t, err)
			res.Body.Close()
			if !strings.Contains(string(b), want) {
				t.Errorf("HTTP/%s %s: got %s, %s; want %q", version, path, res.Status, b, want)
			}
		}
	}
	host, port, err := net.SplitHostPort(w.addr())
	must(t, err)
	ca := writePEM(t, filepath.Join(w.dir, "ca.pem"), w.ca.cert.Raw)
	root := filepath.Join(t.TempDir(), "root")
	sh := exec.Command("sh", "-c", `script=$(curl -fsS --cacert "$1" --resolve "get.test:$3:$2" "https://get.test:$3/get/install.sh") && printf '%s\n' "$script" | dash -s -- --root "$4" --dry-run --method static`, "sh", ca, host, port, root)
	out, err := sh.CombinedOutput()
	if want := "https://get.test:" + port + "/get/bin/keyhaven-connector-linux-"; !strings.Contains(string(out), want) && !strings.Contains(string(out), "this edge has no program for") {
		t.Errorf("got %v, %s; want %q", err, out, want)
	}

	must(t, os.WriteFile(filepath.Join(dir, "SHA256SUMS"), []byte("tampered with\n"), 0o644))
	res, err := w.client("2").Get("https://get.test/get/install.sh")
	must(t, err)
	res.Body.Close()
	if res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("after the list was tampered with: %s", res.Status)
	}
}

func TestInstallFaults(t *testing.T) {
	dir, key := signedDir(t)
	for _, tt := range []struct {
		name string
		o    zone.Origin
		want string
	}{
		{"good", zone.Origin{Install: dir, InstallKeys: []string{key}}, ""},
		{"no key", zone.Origin{Install: dir}, "origins[0].install"},
		{"half a key", zone.Origin{Install: dir, InstallKeys: []string{key, "RWQ"}}, "origins[0].install_keys[1]"},
		{"relative", zone.Origin{Install: "site", InstallKeys: []string{key}}, "origins[0].install"},
		{"two", zone.Origin{Install: dir, InstallKeys: []string{key}, Tunnel: "t"}, "exactly one of url, pool, tunnel and install"},
		{"keys alone", zone.Origin{InstallKeys: []string{key}}, "origins[0].install_keys"},
		{"host", zone.Origin{Install: dir, InstallKeys: []string{key}, Host: "a.test"}, "origins[0].install"},
		{"tls", zone.Origin{Install: dir, InstallKeys: []string{key}, TLS: zone.OriginTLS{ServerName: "x"}}, "origins[0].tls"},
	} {
		w := newWorld(t)
		w.addZone("a", "p256", "http://10.0.0.1", "get.test").Origins = []zone.Origin{tt.o}
		var faults []string
		warnings := w.cfg.Validate(func(key, format string, args ...any) { faults = append(faults, key+": "+fmt.Sprintf(format, args...)) })
		if got := strings.Join(faults, "\n"); (tt.want == "") != (got == "") || !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
		if tt.want == "" && len(warnings) > 0 {
			t.Errorf("%s: warnings %q", tt.name, warnings)
		}
	}
	w := newWorld(t)
	w.addZone("a", "p256", "http://10.0.0.1", "get.test").Origins = []zone.Origin{{Install: t.TempDir(), InstallKeys: []string{key}}}
	warnings := w.cfg.Validate(func(key, format string, args ...any) { t.Errorf(key+": "+format, args...) })
	if !strings.Contains(strings.Join(warnings, "\n"), "zones[0].origins[0].install: nothing is served") {
		t.Errorf("an empty directory: warnings %q", warnings)
	}
}
