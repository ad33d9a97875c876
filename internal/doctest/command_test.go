package doctest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// build compiles the programs and returns where they are.
func build(t *testing.T) string {
	t.Helper()
	bin := t.TempDir()
	// Opening the sources makes the test cache depend on them, so that no stale pass is replayed.
	for _, dir := range []string{"internal/cli", "cmd/keyserver", "cmd/connector", "cmd/edge"} {
		files, err := filepath.Glob(filepath.Join(root(t), dir, "*.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("got %d files in %s, %v", len(files), dir, err)
		}
		for _, f := range files {
			if _, err := os.ReadFile(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, p := range programs {
		cmd := exec.Command("go", "build", "-o", filepath.Join(bin, p.name), "./"+p.dir)
		cmd.Dir = root(t)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build ./%s: %v\n%s", p.dir, err, out)
		}
	}
	return bin
}

// commandLines returns the words of each command line that runs one of the programs in the blocks of a page that are for
// a shell or systemd.
func commandLines(text string) (lines [][]string) {
	fenced, shell := false, false
	text = strings.ReplaceAll(text, "\\\n", " ")
	for line := range strings.Lines(text) {
		if info, ok := strings.CutPrefix(strings.TrimSpace(line), "```"); ok {
			fenced = !fenced
			shell = info == "sh" || info == "ini"
			continue
		}
		if fenced && !shell || !fenced && !strings.HasPrefix(line, "    ") {
			continue
		}
		words := split(line)
		for i, w := range words {
			if slices.ContainsFunc(programs, func(p struct{ name, dir, config, defaults string }) bool { return p.name == filepath.Base(w) }) && starts(words[:i]) {
				lines = append(lines, words[i:])
				break
			}
		}
	}
	return lines
}

// starts reports whether a command begins after these words.
func starts(before []string) bool {
	return len(before) == 0 || len(before) == 2 && before[0] == "ssh" || slices.Contains([]string{"--", "|", "&&", ";", "$", "#"}, before[len(before)-1]) ||
		strings.HasPrefix(before[len(before)-1], "ExecStart=")
}

var word = regexp.MustCompile(`'[^']*'|"[^"]*"|\S+`)

// split is as much of a shell's splitting as the pages need. What comes after a comment, pipe or redirection is left out.
func split(line string) (words []string) {
	line = strings.Replace(line, "ExecStart=", "ExecStart= ", 1)
	for _, w := range word.FindAllString(line, -1) {
		words = append(words, strings.Trim(w, `'"`))
	}
	if i := slices.IndexFunc(words, func(w string) bool { return w == ">" || w == "#" || w == "|" }); i > 0 {
		words = words[:i]
	}
	return words
}

var (
	subcommands = regexp.MustCompile(`(?s)Available Commands:\n(.*?)\n\n`)
	firstWord   = regexp.MustCompile(`(?m)^  (\S+)`)
	flagNames   = regexp.MustCompile(`(?m)^\s+(?:(-\w), )?(--[a-z0-9-]+)`)
)

// verify holds a command line against what the programs say about themselves.
func verify(bin string, words []string) error {
	path := []string{filepath.Join(bin, filepath.Base(words[0]))}
	rest := words[1:]
	for {
		var help bytes.Buffer
		cmd := exec.Command(path[0], append(path[1:len(path):len(path)], "--help")...)
		cmd.Stdout, cmd.Stderr = &help, &help
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%v --help: %w\n%s", path, err, &help)
		}
		var known []string
		if m := subcommands.FindStringSubmatch(help.String()); m != nil {
			for _, s := range firstWord.FindAllStringSubmatch(m[1], -1) {
				known = append(known, s[1])
			}
		}
		if len(known) == 0 || len(rest) == 0 || strings.HasPrefix(rest[0], "-") {
			return flags(help.String(), rest)
		}
		if !slices.Contains(known, rest[0]) {
			return fmt.Errorf("%v has no command %q", path[1:], rest[0])
		}
		path, rest = append(path, rest[0]), rest[1:]
	}
}

func flags(help string, words []string) error {
	var known []string
	for _, m := range flagNames.FindAllStringSubmatch(help, -1) {
		known = append(known, m[1], m[2])
	}
	for _, w := range words {
		name, _, _ := strings.Cut(w, "=")
		if strings.HasPrefix(w, "-") && w != "-" && !slices.Contains(known, name) {
			return fmt.Errorf("no flag %s", name)
		}
	}
	return nil
}

// Each command line of our programs in the pages names commands and flags that there are.
func TestCommandLines(t *testing.T) {
	bin := build(t)
	for _, name := range []string{"README.md", "docs/install.md", "docs/administration.md", "docs/edges.md", "docs/ingress.md", "docs/balancing.md", "docs/packets.md", "docs/updates.md", "docs/troubleshooting.md", "docs/appliance.md", "docs/petcam.md", "docs/packages.md", "docs/containers.md", imagePage} {
		t.Run(name, func(t *testing.T) {
			lines := commandLines(page(t, name))
			if len(lines) == 0 && slices.Contains([]string{"docs/install.md", "docs/appliance.md", "docs/petcam.md", imagePage}, name) {
				t.Fatal("no command line was found")
			}
			for _, words := range lines {
				if err := verify(bin, words); err != nil {
					t.Errorf("%s: %v", strings.Join(words, " "), err)
				}
			}
		})
	}
	// The check must be able to fail.
	for _, bad := range []string{"runuser -u x -- keyhaven-edge nosuch", "keyhaven-edge tunnel nosuch x", "keyhaven-edge status --nosuch", "keyhaven-connector join --token=x", "ssh root@x.local keyhaven-connector appliance nosuch"} {
		if lines := commandLines("```sh\n" + bad + "\n```\n"); len(lines) != 1 || verify(bin, lines[0]) == nil {
			t.Errorf("%q was found good", bad)
		}
	}
}

var (
	wholeName  = regexp.MustCompile(`"(keyhaven_[a-z0-9_]*[a-z0-9])"`)
	threeParts = regexp.MustCompile(`Namespace: "(\w+)", Subsystem: "(\w+)", Name: "(\w+)"`)
	connectors = regexp.MustCompile(`\bname\("(\w+)"\)`)
	signers    = regexp.MustCompile(`\b(?:counter|histogram)\("(\w+)"`)
	lanes      = regexp.MustCompile(`\blaneDesc\("(\w+)"`)
	metricRow  = regexp.MustCompile("(?m)^\\| `(keyhaven_[a-z0-9_]+)` \\|")
)

// docs/metrics.md has the metrics that the source registers, no more and no fewer.
func TestEveryMetricIsDocumented(t *testing.T) {
	want := map[string]bool{}
	for _, file := range []string{"signer/metrics.go", "edge/metrics.go", "edge/control/metrics.go", "edge/control/packet.go", "edge/control/rolloutmetrics.go", "edge/dns/server.go", "edge/balance/view.go", "edge/forward/metrics.go", "connector/metrics.go", "connector/packets.go", "connector/ingress/metrics.go", "cmd/keyserver/metrics.go", "cmd/edge/run.go"} {
		b, err := os.ReadFile(filepath.Join(root(t), file))
		if err != nil {
			t.Fatal(err)
		}
		before := len(want)
		for _, m := range wholeName.FindAllStringSubmatch(string(b), -1) {
			want[m[1]] = true
		}
		for _, m := range threeParts.FindAllStringSubmatch(string(b), -1) {
			want[strings.Join(m[1:], "_")] = true
		}
		if file == "connector/metrics.go" {
			for _, m := range connectors.FindAllStringSubmatch(string(b), -1) {
				want["keyhaven_connector_"+m[1]] = true
			}
		}
		if file == "signer/metrics.go" {
			for _, m := range signers.FindAllStringSubmatch(string(b), -1) {
				want["keyhaven_signer_"+m[1]] = true
			}
			for _, m := range lanes.FindAllStringSubmatch(string(b), -1) {
				want["keyhaven_signer_lane_"+m[1]] = true
			}
		}
		if len(want) == before {
			t.Errorf("%s: no metric was found; adjust this test", file)
		}
	}
	got := map[string]bool{}
	for _, m := range metricRow.FindAllStringSubmatch(page(t, "docs/metrics.md"), -1) {
		got[m[1]] = true
		if !want[m[1]] {
			t.Errorf("%s is documented and not registered", m[1])
		}
	}
	for name := range want {
		if !got[name] {
			t.Errorf("%s is registered and not documented", name)
		}
	}
}

var link = regexp.MustCompile(`\]\(([^)#]+)(?:#[^)]*)?\)`)

// pages are the files that people read: those of docs, those beside the README, and the page of images.
func pages(t *testing.T) []string {
	t.Helper()
	docs, err := filepath.Glob(filepath.Join(root(t), "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	tops, err := filepath.Glob(filepath.Join(root(t), "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.Concat(docs, tops, []string{filepath.Join(root(t), imagePage)})
}

// Links between the pages lead somewhere.
func TestLinks(t *testing.T) {
	found := 0
	for _, p := range pages(t) {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(b), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			found++
			if _, err := os.Stat(filepath.Join(filepath.Dir(p), m[1])); err != nil {
				t.Errorf("%s: %v", filepath.Base(p), err)
			}
		}
	}
	if found < 5 {
		t.Errorf("got %d links, which cannot be all", found)
	}
}
