package doctest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/appliance"
	"github.com/keyhaven/keyhaven/ingressconf"
)

// yamlBlock is a block of YAML on a page.
var yamlBlock = regexp.MustCompile("(?s)```yaml\n(.*?)```")

// What docs/petcam.md has people write is what the programs take: each keyhaven.yaml, the connector's file, and the streamer's flags.
func TestPetCam(t *testing.T) {
	text := page(t, "docs/petcam.md")
	devices, rules := 0, 0
	for _, m := range yamlBlock.FindAllStringSubmatch(text, -1) {
		switch {
		case strings.HasPrefix(m[1], "token:"):
			devices++
			file := regexp.MustCompile(`(?m)^token: .*$`).ReplaceAllString(m[1], "")
			if _, err := appliance.Parse("keyhaven.yaml", []byte(file)); err != nil {
				t.Errorf("%v in\n%s", err, m[1])
			}
		case strings.Contains(m[1], "ingress:"):
			rules++
			if _, err := ingressconf.FromFile([]byte(m[1])); err != nil {
				t.Errorf("%v in\n%s", err, m[1])
			}
		}
	}
	if devices < 3 || rules != 1 {
		t.Errorf("%d files of devices and %d of connectors were found; adjust this test", devices, rules)
	}
	flags := regexp.MustCompile(`(?m)^ustreamer (.*)$`).FindStringSubmatch(text)
	if flags == nil {
		t.Fatal("no streamer")
	}
	help, err := exec.Command("ustreamer", "--help").Output()
	if err != nil {
		t.Fatalf("ustreamer is needed: scripts/setup installs it: %v", err)
	}
	for _, f := range strings.Fields(flags[1]) {
		name, _, _ := strings.Cut(f, "=")
		if !strings.Contains(string(help), name+" ") {
			t.Errorf("the streamer has no flag %s", name)
		}
	}
}

// The script to which docs/install-script.md leads is where it says, with the flags that it says.
func TestInstallScript(t *testing.T) {
	text := page(t, "docs/install-script.md")
	script, err := os.ReadFile(filepath.Join(root(t), "edge", "install", "install.sh.tmpl"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?:install\.sh|sh -s --|or with) .*?(--[a-z-]+)|^`+"`"+`(--[a-z-]+)`).FindAllStringSubmatch(text, -1) {
		if flag := m[1] + m[2]; flag != "" && flag != "--help" && !strings.Contains(string(script), flag) {
			t.Errorf("the script has no %s", flag)
		}
	}
	for _, want := range []string{"--token-file", "--dry-run", "--method static", "--root", "KEYHAVEN_TOKEN_FILE"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page says nothing of %s", want)
		}
	}
}
