package main

import (
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"
	"github.com/diskfs/go-diskfs/backend/file"
	"github.com/diskfs/go-diskfs/filesystem/fat16"
	"golang.org/x/crypto/blake2b"
	"golang.org/x/crypto/scrypt"

	updates "github.com/keyhaven/keyhaven/appliance/bundle"
)

// signingKey writes a key pair as minisign does, and returns the files. With a password the secret key is encrypted.
func signingKey(t *testing.T, password string) (key, pub string) {
	t.Helper()
	public, secret, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text, err := secret.MarshalText()
	if err == nil && password != "" {
		text, err = encrypted(string(text), password)
	}
	if err != nil {
		t.Fatal(err)
	}
	pubText, err := public.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	return write(t, filepath.Join(dir, "update.key"), string(text)), write(t, filepath.Join(dir, "update.pub"), string(pubText))
}

// encrypted encrypts a secret key by the least work that the format has. What minisign takes needs a gigabyte of memory.
func encrypted(plain, password string) ([]byte, error) {
	comment, text, _ := strings.Cut(plain, "\n")
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, err
	}
	copy(b[2:], "Sc") // by scrypt; the salt stays zero
	binary.LittleEndian.PutUint64(b[38:], 32768)
	binary.LittleEndian.PutUint64(b[46:], 1<<24)
	sum := blake2b.Sum256(append([]byte("Ed"), b[54:126]...))
	copy(b[126:], sum[:])
	stream, err := scrypt.Key([]byte(password), b[6:38], 1024, 8, 1, 104)
	if err != nil {
		return nil, err
	}
	subtle.XORBytes(b[54:], b[54:], stream)
	return []byte(comment + "\n" + base64.StdEncoding.EncodeToString(b)), nil
}

// slotImage makes the image of a slot with a version.
func slotImage(t *testing.T, version string) string {
	t.Helper()
	const size = 5 << 20
	path := filepath.Join(t.TempDir(), "slot.img")
	b, err := file.CreateFromPath(path, size)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := fat16.Create(b, size, 0, 512, "SLOT", true)
	if err != nil {
		t.Fatal(err)
	}
	f, err := fs.OpenFile("/slot.json", os.O_CREATE|os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(f, `{"version":"`+version+`","arch":"amd64","boards":["pc"],"built":"2026-01-02T03:04:05Z","format":1}`); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// applianceRoot makes a directory that looks like an appliance which runs 1.0.0 from slot A.
func applianceRoot(t *testing.T, pub string) string {
	t.Helper()
	root := t.TempDir()
	key, err := os.ReadFile(pub)
	if err != nil {
		t.Fatal(err)
	}
	slot, err := os.ReadFile(slotImage(t, "1.0.0"))
	if err != nil {
		t.Fatal(err)
	}
	mbr := make([]byte, 512)
	copy(mbr[440:], "\x31\x56\x48\x4b")
	copy(mbr[510:], "\x55\xaa")
	for name, b := range map[string][]byte{
		"run/keyhaven/boot.json":                  []byte(`{"disk":"/dev/vda","part":2,"config":"/dev/vda1","data":"/dev/vda4"}`),
		"boot/keyhaven/autoboot.txt":              []byte("[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n"),
		"boot/slot/slot.json":                     []byte(`{"version":"1.0.0","arch":"amd64","boards":["pc"],"format":1}`),
		"usr/share/keyhaven/update-keys/test.pub": key,
		"data/lost+found/x":                       nil,
		"dev/vda":                                 mbr,
		"dev/vda2":                                slot,
		"dev/vda3":                                make([]byte, len(slot)),
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// appliance runs a command about updates and wants it to end with code and say something.
func applianceSays(t *testing.T, stdin string, code int, says string, args ...string) string {
	t.Helper()
	out, got := runProgram(t, stdin, append([]string{"appliance"}, args...)...)
	if got != code || !strings.Contains(out, says) {
		t.Fatalf("appliance %v: got code %d, want %d with %q:\n%s", args, got, code, says, out)
	}
	return out
}

func TestBundleCommands(t *testing.T) {
	t.Parallel()
	key, pub := signingKey(t, "")
	_, other := signingKey(t, "")
	slot, dir := slotImage(t, "1.1.0"), t.TempDir()
	a, b := filepath.Join(dir, "a.update"), filepath.Join(dir, "b.update")

	out := applianceSays(t, "", 0, `"version": "1.1.0"`, "bundle", "make", "--key", key, "--output", a, "--notes", "Faster.", slot)
	var m updates.Manifest
	if err := json.Unmarshal([]byte(out), &m); err != nil || m.Arch != "amd64" || m.Notes != "Faster." || m.Size != 5<<20 {
		t.Errorf("got manifest %+v, %v", m, err)
	}
	applianceSays(t, "", 0, "1.1.0", "bundle", "make", "--key", key, "--output", b, "--notes", "Faster.", "--version", "1.1.0", "--arch", "amd64", "--board", "pc", "--built", "2026-01-02T03:04:05Z", slot)
	one, err1 := os.ReadFile(a)
	two, err2 := os.ReadFile(b)
	if err1 != nil || err2 != nil || !bytes.Equal(one, two) {
		t.Errorf("made twice, the bundles differ: %d and %d bytes, %v, %v", len(one), len(two), err1, err2)
	}
	applianceSays(t, "", 0, "1.1.0", "bundle", "verify", "--keys", pub, a)
	applianceSays(t, "", 3, "not signed by a key", "bundle", "verify", "--keys", other, a)
	applianceSays(t, "", 3, "slot.json in the image has 1.1.0", "bundle", "make", "--key", key, "--output", b, "--version", "1.2.0", slot)
	applianceSays(t, "", 1, "version", "bundle", "make", "--key", key, "--output", filepath.Join(dir, "c"), write(t, filepath.Join(dir, "raw"), strings.Repeat("x", 512)))
	applianceSays(t, "", 2, "--output is missing", "bundle", "make", "--key", key, slot)
	applianceSays(t, "", 3, "minisign -G", "bundle", "make", "--key", pub, "--output", b, slot)

	applianceSays(t, "", 0, "newest 1.1.0", "bundle", "index", "--key", key, "--percent", "10", "--published", "2026-01-02T03:04:05Z", "--output", filepath.Join(dir, "amd64.json"), a)
	applianceSays(t, "", 0, "newest 1.1.0", "bundle", "index", "--key", key, "--valid", "720h", "--published", "2026-01-02T03:04:05Z", "--output", filepath.Join(dir, "valid.json"), a)
	if b, err := os.ReadFile(filepath.Join(dir, "valid.json")); err != nil || !strings.Contains(string(b), `2026-02-01T03:04:05Z`) {
		t.Errorf("an index that expires: %s, %v", b, err)
	}
	applianceSays(t, "", 2, "such as 720h", "bundle", "index", "--key", key, "--valid", "-1h", "--output", filepath.Join(dir, "x.json"), a)
	applianceSays(t, "", 1, "not in order, or the same", "bundle", "index", "--key", key, "--output", filepath.Join(dir, "x.json"), a, a)
	if left, err := filepath.Glob(filepath.Join(dir, ".new-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
}

func TestBundleKeyWithPassword(t *testing.T) {
	t.Parallel()
	const canary = "c4n4ry"
	key, pub := signingKey(t, canary)
	slot, out := slotImage(t, "1.1.0"), filepath.Join(t.TempDir(), "a.update")
	applianceSays(t, "", 3, "--password-file", "bundle", "make", "--key", key, "--output", out, slot)
	if said := applianceSays(t, canary+"x\n", 3, "is the password right?", "bundle", "make", "--key", key, "--password-file", "-", "--output", out, slot); strings.Contains(said, canary) {
		t.Errorf("the password is in %s", said)
	}
	applianceSays(t, canary+"\n", 0, "1.1.0", "bundle", "make", "--key", key, "--password-file", "-", "--output", out, slot)
	applianceSays(t, "", 0, "1.1.0", "bundle", "verify", "--keys", filepath.Dir(pub), out)
}

func TestApplianceUpdateAndRollback(t *testing.T) {
	t.Parallel()
	key, pub := signingKey(t, "")
	foreign, _ := signingKey(t, "")
	root, dir := applianceRoot(t, pub), t.TempDir()
	next := filepath.Join(dir, "next.update")
	image := slotImage(t, "1.1.0")
	applianceSays(t, "", 0, "", "bundle", "make", "--key", key, "--output", next, image)
	b, err := os.ReadFile(next)
	if err != nil {
		t.Fatal(err)
	}

	applianceSays(t, "", 1, "start this machine from a card", "update", "--root", t.TempDir())
	applianceSays(t, "", 1, "no update source is set", "update", "--root", root)
	applianceSays(t, "", 1, "holds no whole system", "rollback", "--root", root)
	applianceSays(t, "", 2, "leave one out", "update", "--bundle", "x", "--source", "y")
	bad := filepath.Join(dir, "bad.update")
	applianceSays(t, "", 0, "", "bundle", "make", "--key", foreign, "--output", bad, image)
	applianceSays(t, "", 1, "not signed by a key of this device", "update", "--root", root, "--bundle", bad)
	if out := applianceSays(t, string(b), 0, "the device restarts", "update", "--root", root, "--bundle", "-"); !strings.Contains(out, "1.1.0") {
		t.Errorf("got %s", out)
	}
	want, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(root, "dev/vda3")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("slot B is not the image: %v", err)
	}
	state, err := os.ReadFile(filepath.Join(root, "data/update/state.json"))
	if err != nil || !strings.Contains(string(state), `"state": "trial"`) {
		t.Errorf("got %s, %v", state, err)
	}
	applianceSays(t, "", 1, "never kept on this device", "rollback", "--root", root)
	applianceSays(t, "", 0, "the device restarts", "rollback", "--root", root, "--force")
	if got, err := os.ReadFile(filepath.Join(root, "boot/keyhaven/autoboot.txt")); err != nil || !strings.HasPrefix(string(got), "[all]\ntryboot_a_b=1\nboot_partition=3\n") {
		t.Errorf("autoboot.txt is %q, %v", got, err)
	}
}

func TestApplianceUpdateFromSource(t *testing.T) {
	t.Parallel()
	key, pub := signingKey(t, "")
	root, dir := applianceRoot(t, pub), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "stable"), 0o700); err != nil {
		t.Fatal(err)
	}
	next := filepath.Join(dir, "stable", "keyhaven-1.1.0+g1-amd64.update")
	applianceSays(t, "", 0, "", "bundle", "make", "--key", key, "--output", next, slotImage(t, "1.1.0+g1"))
	applianceSays(t, "", 0, "newest 1.1.0+g1", "bundle", "index", "--key", key, "--percent", "0", "--output", filepath.Join(dir, "stable/amd64.json"), next)
	s := httptest.NewServer(http.FileServer(http.Dir(dir)))
	defer s.Close()
	applianceSays(t, "", 1, "is this channel published", "update", "--root", root, "--source", s.URL, "--channel", "beta")
	applianceSays(t, "", 0, "the device restarts", "update", "--root", root, "--source", s.URL)
}
