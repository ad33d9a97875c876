package conf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

type listener struct {
	Addr    string        `mapstructure:"addr"`
	Timeout time.Duration `mapstructure:"timeout"`
}

type sample struct {
	Listen string       `mapstructure:"listen"`
	Port   uint16       `mapstructure:"port"`
	On     bool         `mapstructure:"on"`
	Prefix netip.Prefix `mapstructure:"prefix"`
	TLS    listener     `mapstructure:"tls"`
	Zones  []listener   `mapstructure:"zones"`
	Names  []string     `mapstructure:"names"`
	Opt    *listener    `mapstructure:"opt"`
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLoad(t *testing.T) {
	path := write(t, `
listen: "a:1"
port: 80
prefix: 10.0.0.0/8
tls: {addr: x, timeout: 5s}
zones:
  - addr: one
  - addr: two
    timeout: 1m
names: [p, q]
opt:
  addr: o
`)
	t.Setenv("T_TLS_ADDR", "fromenv")
	t.Setenv("T_ON", "true")
	t.Setenv("T_NAMES", "r, s")
	fs := pflag.NewFlagSet("t", pflag.ContinueOnError)
	fs.String("listen", "", "")
	fs.Duration("timeout", 0, "")
	if err := fs.Parse([]string{"--listen=b:2"}); err != nil {
		t.Fatal(err)
	}
	got := sample{Names: []string{"default1", "default2", "default3"}, TLS: listener{Timeout: time.Hour}}
	f, err := Load(&got, Options{Path: path, EnvPrefix: "T", Flags: fs,
		FlagKeys: map[string]string{"listen": "listen", "timeout": "tls.timeout"}})
	if err != nil {
		t.Fatal(err)
	}
	if got.Listen != "b:2" || got.Port != 80 || !got.On || got.Prefix.String() != "10.0.0.0/8" ||
		got.TLS != (listener{"fromenv", 5 * time.Second}) || strings.Join(got.Names, " ") != "r s" ||
		len(got.Zones) != 2 || got.Zones[1] != (listener{"two", time.Minute}) || got.Opt == nil || got.Opt.Addr != "o" {
		t.Errorf("got %+v", got)
	}
	if got, want := f.Errorf("zones[1].addr", "bad").Error(), path+":8: zones[1].addr: bad"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := f.Errorf("zones[1].none", "bad").Error(), path+":8: zones[1].none: bad"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDefaultsStand(t *testing.T) {
	got := sample{Listen: "d", Names: []string{"a"}, TLS: listener{Addr: "keep", Timeout: time.Second}}
	if _, err := Load(&got, Options{Path: write(t, "tls:\n  timeout: 2s\n")}); err != nil {
		t.Fatal(err)
	}
	if got.Listen != "d" || len(got.Names) != 1 || got.TLS != (listener{"keep", 2 * time.Second}) {
		t.Errorf("got %+v", got)
	}
}

func TestErrors(t *testing.T) {
	tests := []struct{ name, yaml, want string }{
		{"unknown key", "listne: x\n", `:1: listne: unknown key; did you mean listen?`},
		{"unknown nested", "tls:\n  wildly: 1\n", `:2: tls.wildly: unknown key; known here: addr, timeout`},
		{"case matters", "Listen: x\n", `:1: Listen: unknown key; did you mean listen?`},
		{"string", "listen: 12\n", `:1: listen: must be a string, not "12"`},
		{"bool", "on: \"yes\"\n", `:1: on: must be true or false, not "yes"`},
		{"integer", "port: many\n", `:1: port: must be a whole number, not "many"`},
		{"range", "port: 70000\n", `:1: port: 70000 is out of range`},
		{"duration without unit", "tls:\n  timeout: 5\n", `:2: tls.timeout: must be a duration with a unit`},
		{"duration zero", "tls:\n  timeout: 0\n", `:2: tls.timeout: write 0s`},
		{"prefix", "prefix: 10.0.0.0\n", `:1: prefix: `},
		{"list", "names: one\n", `:1: names: must be a list`},
		{"in a list", "zones:\n  - addr: x\n  - addrs: y\n", `:3: zones[1].addrs: unknown key; did you mean addr?`},
		{"twice", "listen: a\nlisten: b\n", `:2: listen: is given twice, first in line 1`},
		{"null", "listen:\n", `:1: listen: has no value`},
		{"alias", "tls: &a {addr: x}\nopt: *a\n", `anchors and aliases`},
		{"syntax", "listen: [a\nport: 1\n", `:2: not valid YAML`},
		{"open bracket", "listen: a\nnames: [a\nport: 1\n", `:2: not valid YAML: did not find expected ',' or ']'`},
		{"open brace", "listen: a\n\ntls: {addr: x\nport: 1\n", `:3: not valid YAML: did not find expected ',' or '}'`},
		{"closing bracket", "listen: ]\n", `:1: not valid YAML: did not find expected node content`},
		{"no colon", "listen: a\nport\non: true\n", `:2: not valid YAML: could not find expected ':'`},
		{"colon in a value", "port: 1\nlisten: a: b\n", `:2: not valid YAML: mapping values`},
		{"first line indented", " listen: a\nport: 1\n", `:2: not valid YAML: this line belongs to nothing before it`},
		{"second document", "listen: a\n---\nport: 1\n", `:3: a second document begins here`},
		{"text after the end", "listen: a\n...\nport: 1\n", `:3: not valid YAML: this line belongs to nothing`},
		{"third document", "listen: a\n---\n---\n- x\n", `:4: a second document begins here`},
		{"not a mapping", "- a\n", `:1: holds no keys with values; is this the right file?`},
		{"not a mapping below", "tls: a\n", `:1: tls: must be a group of keys, not "a"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Load(&sample{}, Options{Path: write(t, tt.yaml)})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to contain %q", err, tt.want)
			}
		})
	}
	t.Run("a secret in place of a configuration", func(t *testing.T) {
		for _, secret := range []string{"canary\n", "123456789", "canary one\ncanary two\n", "[canary]", "- canary", "\"canary\""} {
			_, err := Load(&sample{}, Options{Path: write(t, secret)})
			if err == nil || strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), "123456789") {
				t.Errorf("%q: got %v, want an error that does not show it", secret, err)
			}
		}
	})
	t.Run("all at once", func(t *testing.T) {
		_, err := Load(&sample{}, Options{Path: write(t, "port: x\non: 1\n")})
		if errs, ok := errors.AsType[Errors](err); !ok || len(errs) != 2 {
			t.Errorf("got %v, want two errors", err)
		}
	})
	t.Run("missing", func(t *testing.T) {
		_, err := Load(&sample{}, Options{Path: "/nonexistent/c.yaml"})
		if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "--config") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("environment", func(t *testing.T) {
		t.Setenv("T_PORT", "x")
		_, err := Load(&sample{}, Options{EnvPrefix: "T"})
		if err == nil || !strings.Contains(err.Error(), `port: environment variable T_PORT: "x" is not a whole number`) {
			t.Errorf("got %v", err)
		}
	})
}

// A file that is there and cannot be read needs another remedy than one that is not there.
func TestUnreadable(t *testing.T) {
	if got := openRemedy(fmt.Errorf("open: %w", syscall.EACCES)); !strings.Contains(got, "may not read") || strings.Contains(got, "create") {
		t.Errorf("got %q", got)
	}
	if got := openRemedy(fmt.Errorf("open: %w", syscall.ENOTDIR)); strings.Contains(got, "create") {
		t.Errorf("got %q", got)
	}
}

func TestUnknownEnvironment(t *testing.T) {
	t.Setenv("T_SOCKET", "/s")
	t.Setenv("T_LISEN", "secret")
	t.Setenv("T_TLS_NOTHING_LIKE_IT", "x")
	t.Setenv("TT_LISTEN", "x")
	if _, err := Load(&sample{}, Options{EnvPrefix: "T"}); err != nil {
		t.Errorf("without a list: %v", err)
	}
	t.Setenv("T_SERVICE_HOST", "10.0.0.1")
	t.Setenv("T_PORT_443_TCP", "tcp://10.0.0.1:443")
	_, err := Load(&sample{}, Options{EnvPrefix: "T", EnvOthers: []string{"T_SOCKET"}})
	const want = "environment variable T_LISEN: stands for no key; correct or unset it; did you mean T_LISTEN?\n" +
		"environment variable T_TLS_NOTHING_LIKE_IT: stands for no key; correct or unset it"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func FuzzLoad(f *testing.F) {
	// The attacker is whoever can write a configuration file; a fault must be an error, never a panic.
	f.Add([]byte("listen: a\nzones:\n  - addr: x\n"))
	f.Add([]byte("tls: &a {addr: x}\nopt: *a\n"))
	f.Add([]byte("? [a]\n: b\n"))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		path := filepath.Join(dir, "c.yaml")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		var s sample
		Load(&s, Options{Path: path})
	})
}

func TestDecode(t *testing.T) {
	type inner struct {
		Name string        `mapstructure:"name"`
		On   *bool         `mapstructure:"on"`
		Wait time.Duration `mapstructure:"wait"`
	}
	type doc struct {
		List []inner `mapstructure:"list"`
		Base inner   `mapstructure:"base"`
	}
	for _, tt := range []struct{ in, says string }{
		{"list:\n  - {name: a, on: false, wait: 5s}\n", ""},
		{`{"list":[{"name":"a","on":false,"wait":"5s"}],"base":{"name":"b"}}`, ""},
		{"", ""},
		{"---\nlist:\n  - {name: a, on: false, wait: 5s}\n...\n", ""},
		{"list:\n  - {name: a, on: false, wait: 5s}\n---\n", ""},
		{"base: {name: a}\n---\nbase: {name: b}\n", "line 3: a second document"},
		{"list:\n  - {nam: a}\n", `line 2: list[0].nam: unknown key; did you mean name?`},
		{"list:\n  - {on: 1}\n", "line 2: list[0].on: must be true or false"},
		{"list:\n  - {wait: 5}\n", "line 2: list[0].wait: must be a duration"},
		{"list: [", "not valid YAML"},
		{"a\nb", "holds no keys"},
	} {
		d := doc{Base: inner{Name: "default"}}
		f, err := Decode(&d, []byte(tt.in))
		if tt.says != "" {
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%q: got %v, want %q", tt.in, err, tt.says)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
			continue
		}
		if tt.in != "" && (len(d.List) != 1 || d.List[0].On == nil || *d.List[0].On || d.List[0].Wait != 5*time.Second) {
			t.Errorf("%q: got %+v", tt.in, d)
		}
		if d.Base.Name == "" {
			t.Errorf("%q: the default is gone", tt.in)
		}
		if tt.in != "" {
			if err := f.Errorf("list[0].name", "bad"); !strings.Contains(err.Error(), "list[0].name: bad") || !strings.Contains(err.Error(), "line ") {
				t.Errorf("an error about the meaning: %v", err)
			}
		}
	}
	if _, err := Decode(doc{}, nil); err == nil {
		t.Error("a value in place of a pointer was taken")
	}
}
