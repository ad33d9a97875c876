//go:build packages

package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const rpmKey = "/etc/pki/rpm-gpg/RPM-GPG-KEY-keyhaven"

// newRPMMachine makes a machine whose packages dnf and rpm look after. Its tree is Debian's; a package that has no files
// stands for what of it the programs depend on.
func newRPMMachine(t *testing.T) *machine {
	t.Helper()
	m := newMachine(t)
	standIn := filepath.Join(t.TempDir(), "stand-in.rpm")
	config := standIn + ".yaml"
	text := "name: stand-in\narch: noarch\nversion: 1.0.0\nprovides:\n  - shadow-utils\n"
	for needed := range strings.Lines(output(t, "rpm", "-qp", "--requires", targets["amd64"].rpmFile("keyhaven-keyserver"))) {
		if strings.HasPrefix(needed, "libc.so.6") {
			text += "  - " + needed
		}
	}
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	script(t, nil, glob(t, "../../.tools/nfpm-*/nfpm")[0], "package", "--config", config, "--packager", "rpm", "--target", standIn)
	script(t, nil, "rpm", "--root", m.root, "-i", standIn)
	return m
}

// trusts gives the machine the repository and its keys, as its instructions say.
func (m *machine) trusts(s *site, ring string) {
	m.t.Helper()
	m.write(rpmKey, read(m.t, ring), 0o644)
	m.write("/etc/dnf/dnf.conf", "[main]\n", 0o644)
	list := read(m.t, filepath.Join(s.dir, "keyhaven.repo"))
	list = strings.ReplaceAll(list, "https://packages.example.com", s.url)
	// dnf runs outside of the machine's tree.
	m.write("/etc/yum.repos.d/keyhaven.repo", strings.ReplaceAll(list, "file:///etc", "file://"+m.root+"/etc"), 0o644)
}

func (m *machine) tryDNF(args ...string) (string, error) {
	m.t.Helper()
	// What was fetched within the same second is not old enough for metadata_expire=0.
	all := []string{"--refresh", "--installroot", m.root, "--config", m.path("/etc/dnf/dnf.conf"), "--setopt=reposdir=" + m.path("/etc/yum.repos.d"), "--setopt=install_weak_deps=false",
		"--setopt=metadata_expire=0", "--setopt=cachedir=" + m.path("/var/cache/dnf"), "--setopt=persistdir=" + m.path("/var/lib/dnf"), "--setopt=logdir=/var/log", "--releasever=1", "-y"}
	cmd := exec.CommandContext(m.t.Context(), "dnf", append(all, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root"}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *machine) dnf(args ...string) string {
	m.t.Helper()
	out, err := m.tryDNF(args...)
	if err != nil {
		m.t.Fatalf("dnf %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (m *machine) rpmVersion(name string) string {
	out, err := exec.Command("rpm", "--root", m.root, "-q", "--qf", "%{VERSION}", name).Output()
	if err != nil {
		return ""
	}
	return string(out)
}

func TestRPM(t *testing.T) {
	keys := filepath.Join(work, "keys")
	dir := t.TempDir()
	repository(t, "old", dir, keys)
	s := serve(t, dir)
	m := newRPMMachine(t)
	m.fakeSystemd()
	os.Remove(m.path("/usr/bin/deb-systemd-invoke"))
	m.trusts(s, filepath.Join(dir, "keyhaven-archive-keyring.asc"))

	m.dnf(append([]string{"install", "keyhaven-archive-keyring"}, programs...)...)
	m.installed(oldVersion)
	for _, word := range []string{"start", "enable"} {
		if told := m.systemctl(); strings.Contains(told, word) {
			t.Errorf("a fresh installation starts what nobody configured:\n%s", told)
		}
	}

	m.use()
	m.run("systemctl", "enable", "--now", "keyhaven-connector")
	m.run("systemctl", "start", "keyhaven-edge")
	m.systemctl()
	repository(t, "again", dir, keys)
	m.dnf("upgrade")
	for _, name := range programs {
		if got := m.rpmVersion(name); got != newVersion {
			t.Errorf("%s after the upgrade: got %q, want %q", name, got, newVersion)
		}
	}
	contains(t, "edited configuration", m.read("/etc/keyhaven/connector.yaml"), "192.0.2.1")
	m.upgraded()

	m.dnf(append([]string{"remove"}, programs...)...)
	contains(t, "removal", m.systemctl(), "disable --now keyhaven-connector.service")
	contains(t, "edited configuration after removal", m.read("/etc/keyhaven/connector.yaml.rpmsave"), "192.0.2.1")
	for _, name := range []string{identity, edgeState, authority, pin, auditLog} {
		if !m.has(name) {
			t.Errorf("removal took %s away", name)
		}
	}
	if m.has("/usr/bin/keyhaven-connector") || m.has("/etc/keyhaven/edge.yaml") {
		t.Error("removal left the program, or a configuration that nobody edited")
	}
}

func TestRPMRefuses(t *testing.T) {
	keys := filepath.Join(work, "keys")
	base := t.TempDir()
	repository(t, "one", base, keys)
	const connector = "rpm/Packages/keyhaven-connector-*.x86_64.rpm"
	for _, c := range []struct {
		name string
		harm func(t *testing.T, dir string)
		want string // empty: it is installed
	}{
		{"nothing", nil, ""},
		{"a package that was changed", func(t *testing.T, dir string) { flip(t, glob(t, filepath.Join(dir, connector))[0]) }, "checksum"},
		{"a package without a signature under indexes that are signed", func(t *testing.T, dir string) {
			path := glob(t, filepath.Join(dir, connector))[0]
			script(t, nil, "rpmsign", "--delsign", path)
			reindex(t, dir, keys)
		}, "is not signed"},
		{"a package with the signature of a stranger under indexes that are signed", func(t *testing.T, dir string) {
			other := t.TempDir()
			repository(t, "one", other, keySet(t, []string{"c"}, nil))
			path := glob(t, filepath.Join(dir, connector))[0]
			if err := os.WriteFile(path, []byte(read(t, glob(t, filepath.Join(other, connector))[0])), 0o644); err != nil {
				t.Fatal(err)
			}
			reindex(t, dir, keys)
		}, "GPG"},
		{"an index that was changed", func(t *testing.T, dir string) {
			flip(t, glob(t, filepath.Join(dir, "rpm/repodata/*primary.xml.gz"))[0])
		}, "checksum"},
		{"a list of indexes that was changed", func(t *testing.T, dir string) {
			edit(t, filepath.Join(dir, "rpm/repodata/repomd.xml"), "<revision>", "<revision>1")
		}, "signature"},
		{"no signature", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, "rpm/repodata/repomd.xml.asc")) }, "repomd.xml"},
		{"the signature of a stranger", func(t *testing.T, dir string) {
			repository(t, "one", dir, keySet(t, []string{"c"}, nil))
		}, "signature"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(base)); err != nil {
				t.Fatal(err)
			}
			if c.harm != nil {
				c.harm(t, dir)
			}
			m := newRPMMachine(t)
			m.trusts(serve(t, dir), filepath.Join(base, "keyhaven-archive-keyring.asc"))
			out, err := m.tryDNF("install", "keyhaven-connector")
			if refused := c.want != ""; refused != (err != nil) || refused == m.has("/usr/bin/keyhaven-connector") {
				t.Fatalf("dnf install: %v, want refused %v\n%s", err, refused, out)
			}
			contains(t, "dnf", out, c.want)
		})
	}
}

// reindex makes the indexes of the yum repository anew, of what is there, and signs them.
func reindex(t *testing.T, dir, keys string) {
	t.Helper()
	script(t, nil, "createrepo_c", "--quiet", "--no-database", filepath.Join(dir, "rpm"))
	repomd := filepath.Join(dir, "rpm/repodata/repomd.xml")
	script(t, []string{"SOURCE_DATE_EPOCH=1800000000"}, filepath.Join(work, "release"), "openpgp", "--keys", keys, repomd)
}

// A machine that has the package of keys follows from key a to key b; one that has key a alone does not.
func TestRPMKeyRollover(t *testing.T) {
	dir := t.TempDir()
	repository(t, "old", dir, filepath.Join(work, "keys"))
	s := serve(t, dir)
	onlyA := filepath.Join(t.TempDir(), "ring")
	script(t, nil, "../repo/keyring", keySet(t, []string{"a"}, nil), onlyA)
	follows, sleeps := newRPMMachine(t), newRPMMachine(t)
	for _, m := range []*machine{follows, sleeps} {
		m.trusts(s, onlyA+".asc")
		m.dnf("makecache")
	}
	follows.dnf("install", "keyhaven-archive-keyring", "keyhaven-connector")

	repository(t, "one", dir, keySet(t, []string{"b"}, []string{"c"}))
	follows.dnf("upgrade")
	if got := follows.rpmVersion("keyhaven-connector"); got != newVersion {
		t.Errorf("after the change of keys: got version %q, want %q", got, newVersion)
	}
	if out, err := sleeps.tryDNF("install", "keyhaven-connector"); err == nil {
		t.Errorf("a machine that has key a alone accepts the signature of b:\n%s", out)
	}
}
