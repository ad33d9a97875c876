package doctest

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func page(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root(t), name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// A row is one line of a table of keys.
type row struct{ typ, def, reload string }

var keyRow = regexp.MustCompile("(?m)^\\| `([a-z0-9_.\\[\\]]+)` \\| ([^|]+) \\| ([^|]+) \\| (yes|restart) \\| [^|]+ \\|$")

// tables returns the rows of each program's section.
func tables(t *testing.T, text string) map[string]map[string]row {
	t.Helper()
	out := map[string]map[string]row{}
	for _, section := range strings.Split(text, "\n## ")[1:] {
		heading, body, _ := strings.Cut(section, "\n")
		rows := map[string]row{}
		for _, m := range keyRow.FindAllStringSubmatch(body, -1) {
			if _, twice := rows[m[1]]; twice {
				t.Errorf("%s: %s has two rows", heading, m[1])
			}
			rows[m[1]] = row{m[2], strings.Trim(m[3], "`"), m[4]}
		}
		out[heading] = rows
	}
	return out
}

var programs = []struct{ name, dir, config, defaults string }{
	{"keyhaven-keyserver", "cmd/keyserver", "Config", "defaults"},
	{"keyhaven-connector", "cmd/connector", "config", "defaults"},
	{"keyhaven-edge", "cmd/edge", "config", "defaults"},
}

// Every key of every program has a row with its type, and no row is left over.
func TestEveryKeyIsDocumented(t *testing.T) {
	pages := tables(t, page(t, "docs/configuration.md"))
	s := &source{root(t), map[string]*sourcePackage{}}
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			keys, err := s.keys(p.dir, p.config)
			if err != nil {
				t.Fatal(err)
			}
			if len(keys) < 8 {
				t.Fatalf("got %d keys from the source, which cannot be all", len(keys))
			}
			rows := pages[p.name]
			for key, typ := range keys {
				if r, ok := rows[key]; !ok {
					t.Errorf("%s has no row", key)
				} else if r.typ != typ {
					t.Errorf("%s: the row says %q, the source %q", key, r.typ, typ)
				}
			}
			for key := range rows {
				if _, ok := keys[key]; !ok {
					t.Errorf("%s has a row, and is not a key", key)
				}
			}
		})
	}
}

// Every default in the source stands in the row, and a row that shows a value has it from the source. Zero values, and
// those that are chosen later on, are the few exceptions.
func TestDefaultsAreTrue(t *testing.T) {
	late := []string{"tokens[].deadline", "tokens[].keep_alive", "transit[].timeout", "visitors.key_servers[].connections", "visitors.key_servers[].timeout", "visitors.zones[].key_epoch",
		"visitors.pools[].monitor.interval", "visitors.pools[].monitor.timeout", "visitors.key_servers[].monitor.interval", "visitors.key_servers[].monitor.timeout",
		"visitors.pools[].affinity.ttl", "visitors.ports[].idle_timeout"}
	pages := tables(t, page(t, "docs/configuration.md"))
	s := &source{root(t), map[string]*sourcePackage{}}
	for _, p := range programs {
		t.Run(p.name, func(t *testing.T) {
			defaults, err := s.defaults(p.dir, p.defaults)
			if err != nil {
				t.Fatal(err)
			}
			rows := pages[p.name]
			for key, want := range defaults {
				if got := rows[key].def; !same(got, want, rows[key].typ) {
					t.Errorf("%s: the row says %q, the source %q", key, got, want)
				}
			}
			for key, r := range rows {
				words := []string{"required", "none", "false"}
				_, set := defaults[key]
				if !set && !slices.Contains(words, r.def) && !slices.Contains(late, key) && (r.typ == "duration" || r.typ == "bool") {
					t.Errorf("%s: the row says %q, and the source sets no default", key, r.def)
				}
			}
		})
	}
}

func same(got, want, typ string) bool {
	if typ != "duration" {
		return got == want
	}
	d, err := time.ParseDuration(got)
	return err == nil && d.String() == want
}

// The checks above must be able to fail.
func TestTablesAreRead(t *testing.T) {
	got := tables(t, "\n## prog\n| `a.b[].c` | list of strings | `5s` | yes | words |\n| `d` | bool | none | maybe | words |\n")["prog"]
	if len(got) != 1 || got["a.b[].c"] != (row{"list of strings", "5s", "yes"}) {
		t.Errorf("got %v", got)
	}
}
