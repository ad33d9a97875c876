//go:build packages

package packages

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const keyringFile = "/usr/share/keyrings/keyhaven-archive-keyring.gpg"

// knows makes the machine one that has the repository in its list, and of its keys those of a ring.
func (m *machine) knows(s *site, ring string) {
	m.t.Helper()
	m.write("/etc/apt/sources.list", "", 0o644)
	if err := os.RemoveAll(m.path("/etc/apt/sources.list.d")); err != nil {
		m.t.Fatal(err)
	}
	m.write(keyringFile, read(m.t, ring), 0o644)
	list := strings.ReplaceAll(read(m.t, filepath.Join(s.dir, "keyhaven.sources")), "https://packages.example.com", s.url)
	m.write("/etc/apt/sources.list.d/keyhaven.sources", list, 0o644)
}

// update fails where apt only warns and goes on with what it had.
func (m *machine) update() (string, error) {
	return m.try("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")
}

func (m *machine) mustUpdate() {
	m.t.Helper()
	if out, err := m.update(); err != nil {
		m.t.Fatalf("apt-get update: %v\n%s", err, out)
	}
}

func (m *machine) apt(args ...string) string {
	m.t.Helper()
	return m.run("apt-get", append([]string{"-q", "-y", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"}, args...)...)
}

func (m *machine) version(name string) string {
	out, err := m.try("dpkg-query", "-W", "-f", "${db:Status-Abbrev}${Version}", name)
	if err != nil {
		return ""
	}
	return out
}

// Fixed names of what packages put where, and what an administrator and the programs add.
const (
	identity  = "/var/lib/keyhaven-connector/key.pem"
	edgeState = "/var/lib/keyhaven/edge.db"
	authority = "/etc/keyhaven/edge/ca/ca.key"
	pin       = "/etc/keyhaven/keys/pin"
	auditLog  = "/var/lib/keyhaven-keyserver/audit/1.log"
)

func (m *machine) use() {
	for _, name := range []string{identity, edgeState, authority, pin, auditLog} {
		m.write(name, "precious", 0o600)
	}
	edit(m.t, m.path("/etc/keyhaven/connector.yaml"), "allow: []", "allow: [{to: 192.0.2.1, ports: [443]}]")
}

// directories are what a package makes, with owner and mode.
var directories = map[string]string{
	"/etc/keyhaven":               "root root 755",
	"/etc/keyhaven/connector":     "kh-connector kh-connector 700",
	"/etc/keyhaven/edge":          "kh-edge kh-edge 700",
	"/etc/keyhaven/keys":          "kh-keys kh-keys 700",
	"/var/lib/keyhaven":           "kh-edge kh-edge 700",
	"/var/lib/keyhaven-connector": "kh-connector kh-connector 700",
	"/var/lib/keyhaven-keyserver": "kh-keys kh-keys 700",
}

// installed checks what a fresh installation leaves, of either kind of package.
func (m *machine) installed(version string) {
	m.t.Helper()
	for dir, want := range directories {
		if got := strings.TrimSpace(m.run("stat", "-c", "%U %G %a", dir)); got != want {
			m.t.Errorf("%s: got %s, want %s", dir, got, want)
		}
	}
	for _, user := range []string{"kh-connector", "kh-edge", "kh-keys"} {
		contains(m.t, "passwd", m.run("getent", "passwd", user), ":/nonexistent:", "nologin")
	}
	for _, name := range programs {
		contains(m.t, "version", m.run(name, "--version"), strings.Replace(version, "~", "-", 1))
		if got := strings.TrimSpace(m.run("stat", "-c", "%U %G %a", "/usr/bin/"+name)); got != "root root 755" {
			m.t.Errorf("%s: got %s", name, got)
		}
		m.run("bash", "-n", "/usr/share/bash-completion/completions/"+name)
	}
	m.configurations()
}

// configurations checks the files that packages bring: every key is one that the program knows, and nothing is served until
// somebody decided what.
func (m *machine) configurations() {
	m.t.Helper()
	for user, c := range map[string]struct {
		args []string
		want []string
	}{
		"kh-connector": {[]string{"keyhaven-connector", "check"}, []string{"identity", "join"}},
		"kh-edge":      {[]string{"keyhaven-edge", "check"}, []string{"tunnel.advertise"}},
		"kh-keys":      {[]string{"keyhaven-keyserver", "check"}, []string{"clients"}},
	} {
		out, err := m.try("runuser", append([]string{"-u", user, "--"}, c.args...)...)
		if err == nil {
			m.t.Errorf("%v accepts the configuration of the package as if it were whole:\n%s", c.args, out)
		}
		m.t.Logf("%v: %s", c.args, out)
		contains(m.t, strings.Join(c.args, " "), out, c.want...)
		if strings.Contains(out, "unknown") {
			m.t.Errorf("%v: the configuration of the package has a key that the program does not know:\n%s", c.args, out)
		}
	}
}

// upgraded checks what an upgrade told systemd of programs of which all but the key server run.
func (m *machine) upgraded() {
	m.t.Helper()
	told := m.systemctl()
	for _, name := range []string{"keyhaven-connector.service", "keyhaven-edge.service"} {
		contains(m.t, "upgrade", told, "kill --signal=SIGUSR2 --kill-who=main "+name)
	}
	if strings.Contains(told, "stop") || regexp.MustCompile(`(start|kill) .*keyhaven-keyserver`).MatchString(told) {
		m.t.Errorf("the upgrade stops what runs, or starts what does not:\n%s", told)
	}
}

func TestApt(t *testing.T) {
	keys := filepath.Join(work, "keys")
	dir := t.TempDir()
	repository(t, "old", dir, keys)
	s := serve(t, dir)
	m := newMachine(t)
	m.fakeSystemd()
	m.knows(s, filepath.Join(dir, "keyhaven-archive-keyring.gpg"))
	m.mustUpdate()

	out := m.apt(append([]string{"install", "keyhaven-archive-keyring"}, programs...)...)
	contains(t, "installation says what to do", out, "systemctl enable --now keyhaven-connector", "systemctl enable --now keyhaven-edge", "systemctl enable --now keyhaven-keyserver")
	m.installed(oldVersion)
	told := m.systemctl()
	contains(t, "systemctl", told, "daemon-reload")
	for _, word := range []string{"start", "enable"} {
		if strings.Contains(told, word) {
			t.Errorf("a fresh installation starts what nobody configured:\n%s", told)
		}
	}
	if !s.asked("/by-hash/SHA256/") {
		t.Error("apt did not ask for an index by its hash")
	}

	m.use()
	m.run("systemctl", "enable", "--now", "keyhaven-connector")
	m.run("systemctl", "start", "keyhaven-edge") // by hand, not enabled
	m.systemctl()
	repository(t, "again", dir, keys)
	m.mustUpdate()
	m.apt("-o", "Dpkg::Options::=--force-confold", "dist-upgrade")
	for _, name := range programs {
		if got, want := m.version(name), "ii "+newVersion; got != want {
			t.Errorf("%s after the upgrade: got %q, want %q", name, got, want)
		}
	}
	contains(t, "edited configuration", m.read("/etc/keyhaven/connector.yaml"), "192.0.2.1")
	m.upgraded()

	m.apt(append([]string{"remove"}, programs...)...)
	contains(t, "removal", m.systemctl(), "stop keyhaven-connector.service")
	for _, name := range []string{identity, edgeState, authority, pin, auditLog, "/etc/keyhaven/connector.yaml", "/etc/keyhaven/edge.yaml"} {
		if !m.has(name) {
			t.Errorf("removal took %s away", name)
		}
	}
	if m.has("/usr/bin/keyhaven-connector") {
		t.Error("removal left the program")
	}

	m.apt(append([]string{"install"}, programs...)...)
	contains(t, "configuration after reinstallation", m.read("/etc/keyhaven/connector.yaml"), "192.0.2.1")
	told = m.systemctl()
	contains(t, "reinstallation of an enabled service", told, "start keyhaven-connector.service")
	if strings.Contains(told, "start keyhaven-edge.service") {
		t.Errorf("reinstallation starts a service that was not enabled:\n%s", told)
	}

	out = m.apt(append([]string{"purge"}, programs...)...)
	contains(t, "purge says what it leaves", out, "/etc/keyhaven/edge was left", "/etc/keyhaven/keys was left", "/var/lib/keyhaven-keyserver was left")
	for _, name := range []string{"/var/lib/keyhaven-connector", "/etc/keyhaven/connector", "/etc/keyhaven/connector.yaml", "/var/lib/keyhaven", "/etc/keyhaven/edge.yaml",
		"/etc/keyhaven/keyserver.yaml", "/etc/systemd/system/multi-user.target.wants/keyhaven-connector.service"} {
		if m.has(name) {
			t.Errorf("purge left %s", name)
		}
	}
	for _, name := range []string{authority, pin, auditLog} {
		if !m.has(name) {
			t.Errorf("purge deleted %s", name)
		}
	}
}

// A purge of what was never used leaves nothing at all but the users.
func TestPurgeOfUnused(t *testing.T) {
	m := newMachine(t)
	for _, name := range programs {
		deb := glob(t, filepath.Join(work, "again", name+"_*_amd64.deb"))[0]
		m.write("/root/"+filepath.Base(deb), read(t, deb), 0o644)
		m.run("dpkg", "-i", "/root/"+filepath.Base(deb))
	}
	m.run("dpkg", append([]string{"-P"}, programs...)...)
	out := m.run("find", "/etc", "/usr", "/var/lib", "-path", "*keyhaven*")
	if strings.TrimSpace(out) != "" {
		t.Errorf("left:\n%s", out)
	}
}

func TestAptRefuses(t *testing.T) {
	keys := filepath.Join(work, "keys")
	base := t.TempDir()
	repository(t, "one", base, keys)
	release := func(dir string) string { return filepath.Join(dir, "deb/dists/stable") }
	for _, c := range []struct {
		name string
		harm func(t *testing.T, dir string)
		want string // of apt-get update; empty: of apt-get install
		deb  string
	}{
		{"nothing", nil, "", ""},
		{"a package that was changed", func(t *testing.T, dir string) {
			flip(t, glob(t, filepath.Join(dir, "deb/pool/stable/keyhaven-connector_*_amd64.deb"))[0])
		}, "", "Hash Sum mismatch"},
		{"a package of another size", func(t *testing.T, dir string) {
			path := glob(t, filepath.Join(dir, "deb/pool/stable/keyhaven-connector_*_amd64.deb"))[0]
			if err := os.WriteFile(path, []byte(read(t, path)+"more"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "", "unexpected size"},
		{"an index that was changed", func(t *testing.T, dir string) {
			for _, path := range append(glob(t, release(dir)+"/main/binary-amd64/Packages*"), glob(t, release(dir)+"/main/binary-amd64/by-hash/SHA256/*")...) {
				flip(t, path)
			}
		}, "Hash Sum mismatch", ""},
		{"a changed release", func(t *testing.T, dir string) {
			edit(t, release(dir)+"/InRelease", "Origin: Keyhaven", "Origin: Keyheaven")
		}, "BADSIG", ""},
		{"a changed release beside its signature", func(t *testing.T, dir string) {
			os.Remove(release(dir) + "/InRelease")
			edit(t, release(dir)+"/Release", "Origin: Keyhaven", "Origin: Keyheaven")
		}, "BADSIG", ""},
		{"no signature", func(t *testing.T, dir string) {
			os.Remove(release(dir) + "/InRelease")
			os.Remove(release(dir) + "/Release.gpg")
		}, "is not signed", ""},
		{"the signature of a stranger", func(t *testing.T, dir string) {
			repository(t, "one", dir, keySet(t, []string{"c"}, nil))
		}, "NO_PUBKEY", ""},
		{"a release of long ago", func(t *testing.T, dir string) {
			repository(t, "one", dir, keys, "REPO_DATE=1750000000")
		}, "is expired", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(base)); err != nil {
				t.Fatal(err)
			}
			if c.harm != nil {
				c.harm(t, dir)
			}
			m := newMachine(t)
			m.knows(serve(t, dir), filepath.Join(base, "keyhaven-archive-keyring.gpg"))
			out, err := m.update()
			if c.want != "" {
				if err == nil {
					t.Fatalf("apt accepts the index:\n%s", out)
				}
				contains(t, "apt-get update", out, c.want)
			} else if err != nil {
				t.Fatalf("apt-get update: %v\n%s", err, out)
			}
			out, err = m.try("apt-get", "-q", "-y", "--no-install-recommends", "install", "keyhaven-connector")
			if refused := c.want+c.deb != ""; refused != (err != nil) || refused == m.has("/usr/bin/keyhaven-connector") {
				t.Fatalf("apt-get install: %v, want refused %v\n%s", err, refused, out)
			}
			contains(t, "apt-get install", out, c.deb)
		})
	}
}

// A repository goes from key a to key b: first b travels in the package of keys, then both sign, then b alone.
func TestAptKeyRollover(t *testing.T) {
	dir := t.TempDir()
	repository(t, "old", dir, filepath.Join(work, "keys")) // a signs; the package of keys has a and b
	s := serve(t, dir)
	onlyA := filepath.Join(t.TempDir(), "ring")
	script(t, nil, "../repo/keyring", keySet(t, []string{"a"}, nil), onlyA)

	follows, sleeps := newMachine(t), newMachine(t)
	for _, m := range []*machine{follows, sleeps} {
		m.knows(s, onlyA+".gpg")
		m.mustUpdate()
	}
	follows.apt("install", "keyhaven-archive-keyring")

	repository(t, "one", dir, keySet(t, []string{"a", "b"}, nil))
	follows.mustUpdate()
	sleeps.mustUpdate()

	// b signs, c is the next.
	keys := keySet(t, []string{"b"}, []string{"c"})
	next := filepath.Join(work, "next")
	t.Cleanup(func() { os.RemoveAll(next) })
	script(t, []string{"KEYS=" + keys, "VERSION=1.1.0", "SOURCE_DATE_EPOCH=1700000000"}, "../nfpm/build", next, "keyhaven-archive-keyring")
	repository(t, "next", dir, keys)
	follows.mustUpdate()
	if out, err := sleeps.update(); err == nil {
		t.Errorf("a machine that has key a alone accepts the signature of b:\n%s", out)
	}
	follows.apt("dist-upgrade")
	if got := follows.version("keyhaven-archive-keyring"); got != "ii 1.1.0" {
		t.Errorf("package of keys: got %q", got)
	}

	repository(t, "next", dir, keySet(t, []string{"c"}, nil))
	follows.mustUpdate()
	repository(t, "next", dir, keySet(t, []string{"a"}, nil))
	if out, err := follows.update(); err == nil {
		t.Errorf("key a is still accepted:\n%s", out)
	}
}

// Debian's armhf and that of Raspberry Pi OS are in suites of their own: no machine is offered the other's.
func TestSuites(t *testing.T) {
	dir := t.TempDir()
	repository(t, "new", dir, filepath.Join(work, "keys"))
	for _, arch := range archs {
		x, suite := targets[arch], "stable"
		if arch == "armv6" {
			suite = "rpi"
		}
		index := read(t, filepath.Join(dir, "deb/dists", suite, "main/binary-"+x.deb+"/Packages"))
		var got []string
		for line := range strings.Lines(index) {
			if name, ok := strings.CutPrefix(line, "Filename: "); ok {
				got = append(got, strings.TrimSpace(name))
			}
		}
		want := []string{"pool/" + suite + "/keyhaven-archive-keyring_" + newVersion + "_all.deb"}
		for _, name := range programs {
			want = append(want, "pool/"+suite+"/"+filepath.Base(x.debFile(name)))
		}
		slices.Sort(got)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", arch, got, want)
		}
	}
}
