package install

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// bed is a signed directory, served over TLS.
type bed struct {
	t      *testing.T
	dir    string
	public minisign.PublicKey
	secret minisign.PrivateKey
	*httptest.Server
	log bytes.Buffer
}

// unit and config stand for those of a release.
const (
	unitText   = "[Service]\nExecStart=/usr/bin/keyhaven-connector run\n"
	configText = "allow: []\n"
)

// release is what a directory has in the tests.
func release() map[string]string {
	files := map[string]string{unitPath: unitText, configPath: configText,
		keyringPath + ".gpg": "gpg", keyringPath + ".asc": "asc", "repo/rpm/repodata/repomd.xml": "xml",
		"repo/deb/pool/stable/keyhaven-connector_1.0+x_amd64.deb": "a package",
		"repo/rpm/Packages/keyhaven-connector-1.0-1.x86_64.rpm":   "one", "repo/rpm/Packages/keyhaven-connector-1.0-1.armv7hl.rpm": "two"}
	for _, suite := range []string{"stable/amd64", "stable/arm64", "stable/armhf", "stable/i386", "rpi/armhf"} {
		name, arch, _ := strings.Cut(suite, "/")
		files["repo/deb/dists/"+name+"/main/binary-"+arch+"/Packages"] = suite
	}
	for _, arch := range []string{"amd64", "386", "arm64", "armv5", "armv6", "armv7", "riscv64", "mipsle"} {
		files[programPrefix+arch] = "program for " + arch
	}
	return files
}

func newBed(t *testing.T, files map[string]string) *bed {
	t.Helper()
	b := &bed{t: t, dir: t.TempDir()}
	var err error
	b.public, b.secret, err = minisign.GenerateKey(rand.Reader)
	must(t, err)
	for name, text := range files {
		b.write(name, text)
	}
	b.sign()
	site, err := New(b.dir, []minisign.PublicKey{b.public})
	must(t, err)
	logger := slog.New(slog.NewTextHandler(&b.log, nil))
	b.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		site.Serve(w, r, strings.TrimPrefix(r.URL.EscapedPath(), "/get"), "https://"+r.Host+"/get", logger)
	}))
	t.Cleanup(b.Close)
	return b
}

func (b *bed) write(name, text string) {
	b.t.Helper()
	path := filepath.Join(b.dir, name)
	must(b.t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(b.t, os.WriteFile(path, []byte(text), 0o644))
}

// sign lists what is there, and signs the list.
func (b *bed) sign() {
	b.t.Helper()
	var sums bytes.Buffer
	must(b.t, filepath.WalkDir(b.dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(d.Name(), listName) {
			return err
		}
		text, err := os.ReadFile(path)
		fmt.Fprintf(&sums, "%x  %s\n", sha256.Sum256(text), strings.TrimPrefix(path, b.dir+"/"))
		return err
	}))
	b.signed(sums.Bytes(), b.secret)
}

// signed puts a list and its signature in place.
func (b *bed) signed(sums []byte, key minisign.PrivateKey) {
	b.t.Helper()
	r := minisign.NewReader(bytes.NewReader(sums))
	_, err := io.Copy(io.Discard, r)
	must(b.t, err)
	b.write(listName, string(sums))
	b.write(listSigName, string(r.Sign(key)))
}

// ask makes a request and returns status, header and body.
func (b *bed) ask(method, path string, header ...string) (int, http.Header, string) {
	b.t.Helper()
	req, err := http.NewRequest(method, b.URL+"/get"+path, nil)
	must(b.t, err)
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := b.Client().Do(req)
	must(b.t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	must(b.t, err)
	return res.StatusCode, res.Header, string(body)
}

func TestServe(t *testing.T) {
	b := newBed(t, release())
	b.write("unlisted", "not for anybody")
	must(t, os.WriteFile(filepath.Join(filepath.Dir(b.dir), "outside"), []byte("outside"), 0o644))
	for _, tt := range []struct {
		method, path string
		status       int
		body         string
	}{
		{"GET", "/" + programPrefix + "arm64", 200, "program for arm64"},
		{"HEAD", "/" + programPrefix + "arm64", 200, ""},
		{"GET", "/repo/deb/pool/stable/keyhaven-connector_1.0%2bx_amd64.deb", 200, "a package"},
		{"GET", "/repo/deb/pool/stable/keyhaven-connector_1.0+x_amd64.deb", 200, "a package"},
		{"GET", "/unlisted", 404, ""},
		{"GET", "/bin", 404, ""},
		{"GET", "/bin/", 404, ""},
		{"GET", "/nothing", 404, ""},
		{"GET", "//" + configPath, 404, ""},
		{"GET", "/bin/../" + configPath, 404, ""},
		{"GET", "/../outside", 404, ""},
		{"GET", "/%2e%2e/outside", 404, ""},
		{"GET", "/bin%2f..%2f..%2foutside", 404, ""},
		{"GET", "/" + configPath + "%00", 404, ""},
		{"POST", "/install.sh", 405, ""},
		{"PUT", "/" + configPath, 405, ""},
		{"OPTIONS", "/", 405, ""},
	} {
		status, h, body := b.ask(tt.method, tt.path)
		if status != tt.status || tt.status == 200 && body != tt.body {
			t.Errorf("%s %s: got %d, %q; want %d, %q", tt.method, tt.path, status, body, tt.status, tt.body)
		}
		if h.Get("X-Content-Type-Options") != "nosniff" || strings.Contains(body, "outside") || strings.Contains(body, "not for anybody") {
			t.Errorf("%s %s: header %v, body %q", tt.method, tt.path, h, body)
		}
		if tt.status == 405 && h.Get("Allow") != "GET, HEAD" {
			t.Errorf("%s %s: Allow %q", tt.method, tt.path, h.Get("Allow"))
		}
	}
	_, h, _ := b.ask("GET", "/"+configPath)
	etag := h.Get("ETag")
	if want := fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(configText))); etag != want {
		t.Errorf("ETag %s, want %s", etag, want)
	}
	if status, _, body := b.ask("GET", "/"+configPath, "If-None-Match", etag); status != 304 || body != "" {
		t.Errorf("If-None-Match: got %d, %q", status, body)
	}
	if status, h, body := b.ask("GET", "/"+configPath, "Range", "bytes=7-8"); status != 206 || body != "[]" || h.Get("Content-Range") != "bytes 7-8/10" {
		t.Errorf("Range: got %d, %q, %q", status, body, h.Get("Content-Range"))
	}
	if status, h, body := b.ask("GET", "/"); status != 200 || !strings.Contains(body, b.URL+"/get/install.sh | sudo sh") || !strings.HasPrefix(h.Get("Content-Security-Policy"), "default-src 'none'") {
		t.Errorf("page: got %d, %s", status, body)
	}
	status, h, body := b.ask("GET", "/install.sh")
	if status != 200 || !strings.HasPrefix(body, "#!/bin/sh\n") || h.Get("Content-Type") != "text/plain; charset=utf-8" {
		t.Errorf("script: got %d, %v", status, h)
	}
	for _, want := range []string{"BASE='" + b.URL + "/get'\n", "PROGRAMS='386 amd64 arm64 armv5 armv6 armv7 mipsle riscv64'",
		"DEB='rpi/armhf stable/amd64 stable/arm64 stable/armhf stable/i386'", "RPM='armv7hl x86_64'",
		fmt.Sprintf("%x %sarmv6\n", sha256.Sum256([]byte("program for armv6")), programPrefix)} {
		if !strings.Contains(body, want) {
			t.Errorf("the script lacks %q", want)
		}
	}
	if strings.Contains(body, "{{") || strings.Contains(body, "<no value>") {
		t.Error("the script has unfilled parts")
	}
}

// What was tampered with is not served, however well it is hidden, and all of it is again when it is mended.
func TestTampered(t *testing.T) {
	b := newBed(t, release())
	get := func(path string) int {
		status, h, body := b.ask("GET", path)
		if status == 503 && (h.Get("Retry-After") == "" || strings.Contains(body, b.dir)) {
			t.Errorf("%s: header %v, %s", path, h, body)
		}
		return status
	}
	all := []string{"/", "/install.sh", "/" + configPath, "/" + programPrefix + "amd64", "/" + listName}
	want := func(what string, statuses ...int) {
		t.Helper()
		var got []int
		for _, path := range all {
			got = append(got, get(path))
		}
		if !slices.Equal(got, statuses) {
			t.Errorf("%s: got %v, want %v", what, got, statuses)
		}
	}
	want("as it was made", 200, 200, 200, 200, 200)

	path := filepath.Join(b.dir, programPrefix+"amd64")
	info, err := os.Stat(path)
	must(t, err)
	must(t, os.WriteFile(path, []byte("program for AMD64"), 0o644))
	must(t, os.Chtimes(path, info.ModTime(), info.ModTime()))
	want("a program of the same length and time", 200, 200, 200, 503, 200)
	must(t, os.Remove(path))
	must(t, os.Symlink("/etc/hostname", path))
	want("a link to the outside", 200, 200, 200, 503, 200)
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o755))
	want("a directory", 200, 200, 200, 503, 200)
	must(t, os.Remove(path))
	want("a file is missing", 200, 200, 200, 503, 200)
	b.write(programPrefix+"amd64", "program for amd64")
	want("mended", 200, 200, 200, 200, 200)

	sums, err := os.ReadFile(filepath.Join(b.dir, listName))
	must(t, err)
	sig, err := os.ReadFile(filepath.Join(b.dir, listSigName))
	must(t, err)
	nothing := []int{503, 503, 503, 503, 503}
	b.write(listName, string(sums)+fmt.Sprintf("%x  evil\n", sha256.Sum256([]byte("evil"))))
	b.write("evil", "evil")
	want("a longer list", nothing...)
	_, other, err := minisign.GenerateKey(rand.Reader)
	must(t, err)
	b.signed(sums, other)
	want("a list signed by another key", nothing...)
	for _, bad := range []string{"", "x", fmt.Sprintf("%x  ../outside\n", sha256.Sum256(nil)), string(sums) + string(sums)} {
		b.signed([]byte(bad), b.secret)
		want("a signed list that makes no sense", nothing...)
	}
	must(t, os.Remove(filepath.Join(b.dir, listSigName)))
	want("no signature", nothing...)
	b.write(listName, string(sums))
	b.write(listSigName, string(sig))
	want("mended", 200, 200, 200, 200, 200)
	if !strings.Contains(b.log.String(), "cannot be served") {
		t.Errorf("the log says nothing: %s", b.log.String())
	}
}

func TestNew(t *testing.T) {
	public, _, err := minisign.GenerateKey(rand.Reader)
	must(t, err)
	for _, dir := range []string{"", "relative", "./x"} {
		if _, err := New(dir, []minisign.PublicKey{public}); err == nil {
			t.Errorf("%q: no error", dir)
		}
	}
	if _, err := New(t.TempDir(), nil); err == nil {
		t.Error("without a key: no error")
	}
	s, err := New(t.TempDir(), []minisign.PublicKey{public})
	must(t, err)
	if err := s.Check(); err == nil {
		t.Error("Check of an empty directory: no error")
	}
	for _, text := range []string{public.String(), "untrusted comment: x\n" + public.String() + "\n"} {
		if k, err := ParseKey(text); err != nil || !k.Equal(public) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := ParseKey("RWQ"); err == nil {
		t.Error("half a key: no error")
	}
}

// A visitor chooses the Host header: what cannot stand in a script does not.
func TestScriptBase(t *testing.T) {
	l := list{unitPath: strings.Repeat("0", 64), configPath: strings.Repeat("0", 64), programPrefix + "amd64": strings.Repeat("0", 64), programPrefix + "'; rm -rf '": strings.Repeat("0", 64)}
	for _, base := range []string{"https://edge.example.com", "https://edge.example.com:8443/get/here", "https://192.0.2.1", "https://[2001:db8::1]:8443"} {
		b, err := script(l, base)
		if err != nil || !bytes.Contains(b, []byte("BASE='"+base+"'")) {
			t.Errorf("%s: %v", base, err)
		}
		if bytes.Contains(b, []byte("rm -rf ''")) {
			t.Error("a name with a quote is in the script")
		}
	}
	for _, base := range []string{"", "http://edge.example.com", "https://a'b", "https://a b", "https://a$(id)", "https://a\nb", "https://a/;id", "https://A", "https://user@a", "https://a/`id`"} {
		if _, err := script(l, base); err == nil {
			t.Errorf("%q stands in the script", base)
		}
		if _, err := indexPage(base); err == nil {
			t.Errorf("%q stands on the page", base)
		}
	}
	if _, err := script(list{"x": "y"}, "https://a"); err == nil {
		t.Error("a script that can install nothing")
	}
	if _, err := script(list{programPrefix + "amd64": "y"}, "https://a"); err == nil {
		t.Error("a script without a unit")
	}
}

// FuzzList stands for whoever can write the directory, and has a signature: what is read names files below it alone.
func FuzzList(f *testing.F) {
	f.Add([]byte(strings.Repeat("a", 64) + "  bin/x\n"))
	f.Add([]byte(strings.Repeat("a", 64) + "  ./bin/x\n" + strings.Repeat("b", 64) + "  y"))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := parseList(b)
		if err != nil {
			return
		}
		for name, sum := range l {
			if !filepath.IsLocal(name) || filepath.Clean(name) != name || len(sum) != 64 || strings.ContainsAny(name, "\n\x00\\") {
				t.Fatalf("%q has %q", name, sum)
			}
		}
		if s, err := script(l, "https://a.test"); err == nil && !bytes.HasSuffix(s, []byte("\n{ keyhaven_install \"$@\"; }\n")) {
			t.Fatal("the script does not end as it should")
		}
	})
}

var patience = 20 * time.Second
