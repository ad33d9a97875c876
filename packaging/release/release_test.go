package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"aead.dev/minisign"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdxlib"

	"github.com/keyhaven/keyhaven/internal/cli"
)

// release runs the command and returns what it printed.
func release(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	cmd := root()
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(&errs)
	if code := cli.Execute(context.Background(), cmd, &errs); code != cli.ExitOK {
		t.Fatalf("%v ended with %d: %s", args, code, errs.String())
	}
	return out.String()
}

// refused runs the command, which must fail and say why.
func refused(t *testing.T, want string, args ...string) {
	t.Helper()
	var errs bytes.Buffer
	cmd := root()
	cmd.SetArgs(args)
	cmd.SetOut(&errs)
	cmd.SetErr(&errs)
	if code := cli.Execute(context.Background(), cmd, &errs); code == cli.ExitOK || !strings.Contains(errs.String(), want) {
		t.Errorf("%v ended with %d: %q, want %q", args, code, errs.String(), want)
	}
}

// pinned sets what a build pins.
func pinned(t *testing.T) {
	t.Helper()
	t.Setenv("VERSION", "1.2.3-dev.4+gabc")
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	t.Setenv("RELEASE_KEYS", "")
}

// repository is a git repository in which each word is a commit, or with a leading v a tag of the last one.
func repository(t *testing.T, words ...string) string {
	t.Helper()
	dir := t.TempDir()
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=n", "-c", "user.email=e@example.com", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false"}, args...)...)
		cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_SYSTEM=/dev/null", "GIT_COMMITTER_DATE=1700000000 +0000")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %v: %v: %s", args, err, out)
		}
	}
	run("init", "-q")
	for _, w := range words {
		if strings.HasPrefix(w, "v") {
			run("tag", w)
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte(w), 0o600); err != nil {
			t.Fatal(err)
		}
		run("add", "file")
		run("commit", "-q", "-m", w)
	}
	return dir
}

func TestVersions(t *testing.T) {
	const g = "+g000000000000"
	tests := []struct {
		words []string
		want  string
	}{
		{[]string{"a", "b"}, "0.5.0-dev.2" + g},
		{[]string{"a", "v0.5.0-rc.1"}, "0.5.0-rc.1"},
		{[]string{"a", "v0.5.0-rc.1", "b"}, "0.5.0-rc.1.dev.1" + g},
		{[]string{"a", "v0.5.0"}, "0.5.0"},
		{[]string{"a", "v0.5.0", "b", "c"}, "0.5.1-dev.2" + g},
	}
	var debs []string
	for _, tt := range tests {
		dir := repository(t, tt.words...)
		got, err := gitVersion(t.Context(), dir)
		if i := strings.Index(got, "+g"); i >= 0 && len(got) == i+len(g) {
			got = got[:i] + g
		}
		if err != nil || got != tt.want {
			t.Errorf("%v: got %q, %v, want %q", tt.words, got, err, tt.want)
		}
		deb, err := render(got, "deb")
		if err != nil {
			t.Error(err)
		}
		debs = append(debs, deb)
		if at, err := gitEpoch(t.Context(), dir); err != nil || at.Unix() != 1700000000 {
			t.Errorf("epoch: got %v, %v", at, err)
		}
	}
	// Each of them comes after the one before, as dpkg sees it.
	for i := range debs[1:] {
		if out, err := exec.Command("dpkg", "--compare-versions", debs[i], "lt", debs[i+1]).CombinedOutput(); err != nil {
			t.Errorf("%s is not below %s: %v %s", debs[i], debs[i+1], err, out)
		}
	}
}

func TestChangedTree(t *testing.T) {
	dir := repository(t, "a", "v1.0.0")
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := gitVersion(t.Context(), dir); err != nil || !strings.HasPrefix(got, "1.0.1-dev.0+g") || !strings.HasSuffix(got, ".dirty") {
		t.Errorf("got %q, %v: want none that is the tag's", got, err)
	}
	dir = repository(t, "a", "v1.0")
	if got, err := gitVersion(t.Context(), dir); err == nil {
		t.Errorf("the tag v1.0 gave version %q", got)
	}
	if _, err := gitVersion(t.Context(), t.TempDir()); err == nil || !strings.Contains(err.Error(), "set VERSION") {
		t.Errorf("outside a repository: %v", err)
	}
}

func TestSetVersion(t *testing.T) {
	pinned(t)
	for format, want := range map[string]string{"semver": "1.2.3-dev.4+gabc\n", "deb": "1.2.3~dev.4+gabc\n", "rpm": "1.2.3~dev.4+gabc\n"} {
		if got := release(t, "version", "--format", format); got != want {
			t.Errorf("%s: got %q, want %q", format, got, want)
		}
	}
	if got := release(t, "epoch"); got != "1700000000\n" {
		t.Errorf("epoch: got %q", got)
	}
	for _, bad := range []string{"1.2", "v1.2.3", "1.2.3-a-b", "1.2.3 ", "01.2.3", "1.2.3;rm"} {
		t.Setenv("VERSION", bad)
		refused(t, "MAJOR.MINOR.PATCH", "version")
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	refused(t, "seconds since 1970", "epoch")
}

func TestKeysAndSignatures(t *testing.T) {
	pinned(t)
	dir := t.TempDir()
	keys := filepath.Join(dir, "keys")
	release(t, "key", "--dir", keys)
	first, err := os.ReadFile(filepath.Join(keys, minisignPublic))
	if err != nil {
		t.Fatal(err)
	}
	release(t, "key", "--dir", keys)
	if again, err := os.ReadFile(filepath.Join(keys, minisignPublic)); err != nil || !bytes.Equal(first, again) {
		t.Errorf("the keys were made anew: %v", err)
	}
	for name, want := range map[string]os.FileMode{minisignSecret: 0o600, openPGPSecret: 0o600, throwaway: 0o644} {
		if info, err := os.Stat(filepath.Join(keys, name)); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: got %v, %v, want mode %o", name, info, err, want)
		}
	}
	out := filepath.Join(dir, "out")
	if err := os.MkdirAll(filepath.Join(out, "below"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"b": "two", "a": "one", "below/c": "three"} {
		if err := os.WriteFile(filepath.Join(out, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	release(t, "sums", "--keys", keys, out)
	release(t, "sums", "--keys", keys, out) // does not list itself
	cmd := exec.Command("sha256sum", "--check", "--strict", sumsName)
	cmd.Dir = out
	if said, err := cmd.CombinedOutput(); err != nil || string(said) != "a: OK\nb: OK\n" {
		t.Errorf("sha256sum: %v: %s", err, said)
	}
	message, signature := read(t, filepath.Join(out, sumsName)), read(t, filepath.Join(out, sumsName+".minisig"))
	public, err := minisign.PublicKeyFromFile(filepath.Join(keys, minisignPublic))
	if err != nil || !minisign.Verify(public, message, signature) {
		t.Errorf("the signature is not good: %v", err)
	}
	if minisign.Verify(public, append(message, 'x'), signature) {
		t.Error("the signature is good for something else")
	}
	if !strings.Contains(string(signature), "timestamp:1700000000\tfile:SHA256SUMS\thashed") {
		t.Errorf("the trusted comment does not name the file: %s", signature)
	}
	for _, kind := range [][]string{{}, {"--clear"}, {"--binary"}} {
		var signed [2][]byte
		for i := range signed {
			release(t, append([]string{"openpgp", "--keys", keys, "--output", filepath.Join(dir, "signed"), filepath.Join(out, "a")}, kind...)...)
			signed[i] = read(t, filepath.Join(dir, "signed"))
		}
		if !bytes.Equal(signed[0], signed[1]) {
			t.Errorf("two signatures %v differ", kind)
		}
		verify(t, keys, dir, out, slices.Contains(kind, "--clear"))
	}
	publishes(t, keys, dir)
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// verify has gpgv judge a signature, as apt does.
func verify(t *testing.T, keys, dir, out string, clear bool) {
	t.Helper()
	ring := filepath.Join(dir, "ring.gpg")
	dearmor := exec.Command("gpg", "--batch", "--yes", "--homedir", dir, "--dearmor", "--output", ring, filepath.Join(keys, openPGPPublic))
	if said, err := dearmor.CombinedOutput(); err != nil {
		t.Fatalf("gpg: %v: %s", err, said)
	}
	args := []string{"--homedir", dir, "--keyring", ring, filepath.Join(dir, "signed")}
	if !clear {
		args = append(args, filepath.Join(out, "a"))
	}
	if said, err := exec.Command("gpgv", args...).CombinedOutput(); err != nil {
		t.Errorf("gpgv: %v: %s", err, said)
	}
}

// publishes uses keys as those of a release: their public halves alone are copied.
func publishes(t *testing.T, keys, dir string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(keys, "minisign-old.pub"), []byte("an older key\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RELEASE_KEYS", keys)
	to := filepath.Join(dir, "public")
	release(t, "key", "--dir", to)
	entries, err := os.ReadDir(to)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"minisign-old.pub", minisignPublic, openPGPPublic}; !slices.Equal(names, want) {
		t.Errorf("published %v, want %v", names, want)
	}
	other := t.TempDir()
	t.Setenv("RELEASE_KEYS", "")
	release(t, "key", "--dir", other)
	if err := os.WriteFile(filepath.Join(keys, minisignPublic), read(t, filepath.Join(other, minisignPublic)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RELEASE_KEYS", keys)
	refused(t, "is not the public key", "key", "--dir", to)
	t.Setenv("RELEASE_KEYS", t.TempDir())
	refused(t, "the key that signs", "key", "--dir", to)
}

const status = `Package: libc6
Status: install ok installed
Source: glibc
Architecture: amd64
Version: 2.36-9+deb12u10
Homepage: https://www.gnu.org/software/libc/libc.html
Description: GNU C Library
 more of it

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: adduser
Status: install ok installed
Architecture: all
Version: 3:134
`

// TestBill makes a bill of materials of this test's own program and of packages, twice, and has the reference library judge it.
func TestBill(t *testing.T) {
	pinned(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "status"), []byte(status), 0o600); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var texts [2][]byte
	for i := range texts {
		release(t, "sbom", "--output", filepath.Join(dir, "x.spdx.json"), "--name", "keyhaven-x", "--dpkg", filepath.Join(dir, "status"), self)
		texts[i] = read(t, filepath.Join(dir, "x.spdx.json"))
	}
	if !bytes.Equal(texts[0], texts[1]) {
		t.Error("two bills of the same differ")
	}
	doc, err := spdxjson.Read(bytes.NewReader(texts[0]))
	if err != nil {
		t.Fatal(err)
	}
	if err := spdxlib.ValidateDocument(doc); err != nil {
		t.Error(err)
	}
	if doc.SPDXVersion != "SPDX-2.3" || doc.CreationInfo.Created != "2023-11-14T22:13:20Z" {
		t.Errorf("got %s of %s", doc.SPDXVersion, doc.CreationInfo.Created)
	}
	purls := map[string]bool{}
	for _, p := range doc.Packages {
		for _, r := range p.PackageExternalReferences {
			purls[r.Locator] = true
		}
		for _, c := range p.PackageChecksums {
			if p.PrimaryPackagePurpose != "APPLICATION" || c.Algorithm != common.SHA256 {
				t.Errorf("%s has a checksum that nobody has computed: %v", p.PackageName, c)
			}
		}
	}
	for _, want := range []string{"pkg:golang/aead.dev/minisign@v0.3.0", "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64", "pkg:deb/debian/adduser@3:134?arch=all"} {
		if !purls[want] {
			t.Errorf("%s is missing in %v", want, purls)
		}
	}
	if strings.Contains(string(texts[0]), "gone") {
		t.Error("a package that is removed is listed")
	}
	refused(t, "neither programs nor --dpkg", "sbom", "--output", filepath.Join(dir, "y"))
	refused(t, "status", "sbom", "--output", filepath.Join(dir, "y"), filepath.Join(dir, "status"))
}

// FuzzStatus reads what a file system that somebody else made says of its packages.
func FuzzStatus(f *testing.F) {
	f.Add(status)
	f.Add("Package: a\nStatus: install ok installed\n\n")
	f.Add("no field\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := readStatus(strings.NewReader(text))
		if err != nil && list != nil {
			t.Error("packages beside an error")
		}
		for _, p := range list {
			if p.name == "" || p.version == "" || p.arch == "" {
				t.Errorf("got %+v of %q", p, text)
			}
		}
	})
}
