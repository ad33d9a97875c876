package doctest

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"

	"go.yaml.in/yaml/v3"
)

const monitoring = "../../docs/monitoring"

// promtool finds the tool where scripts/setup leaves it.
func promtool(t *testing.T) string {
	t.Helper()
	if path, err := exec.LookPath("promtool"); err == nil {
		return path
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "keyhaven", "promtool")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: run make setup", err)
	}
	return path
}

// watched are the programs with alerts and a dashboard.
var watched = []string{"keyserver", "edge", "connector"}

func TestAlertsFireWhereTheyShould(t *testing.T) {
	for _, p := range watched {
		for _, args := range [][]string{{"check", "rules", p + "-alerts.yaml"}, {"test", "rules", p + "-alerts-test.yaml"}} {
			cmd := exec.CommandContext(t.Context(), promtool(t), args...)
			cmd.Dir = monitoring
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("promtool %v: %v\n%s", args, err, out)
			}
		}
		if _, err := os.Stat(filepath.Join(monitoring, p+"-dashboard.json")); err != nil {
			t.Error(err)
		}
	}
}

// An alert that no test raises may never fire.
func TestEveryAlertIsRaisedByATest(t *testing.T) {
	for _, p := range watched {
		var rules struct {
			Groups []struct{ Rules []struct{ Alert string } }
		}
		var tests struct {
			Tests []struct {
				Alerts []struct {
					Name     string `yaml:"alertname"`
					Expected []any  `yaml:"exp_alerts"`
				} `yaml:"alert_rule_test"`
			}
		}
		for file, dst := range map[string]any{p + "-alerts.yaml": &rules, p + "-alerts-test.yaml": &tests} {
			b, err := os.ReadFile(filepath.Join(monitoring, file))
			if err != nil {
				t.Fatal(err)
			}
			if err := yaml.Unmarshal(b, dst); err != nil {
				t.Fatalf("%s: %v", file, err)
			}
		}
		var raised []string
		for _, x := range tests.Tests {
			for _, a := range x.Alerts {
				if len(a.Expected) > 0 {
					raised = append(raised, a.Name)
				}
			}
		}
		n := 0
		for _, g := range rules.Groups {
			for _, r := range g.Rules {
				n++
				if !slices.Contains(raised, r.Alert) {
					t.Errorf("no test raises %s", r.Alert)
				}
			}
		}
		if n == 0 {
			t.Errorf("%s: there are no alerts", p)
		}
	}
}

// What a chart asks for must be promised by docs/metrics.md, which is held against the programs.
func TestDashboardsAskForWhatIsThere(t *testing.T) {
	metrics, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(monitoring, "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	name := regexp.MustCompile(`\bkeyhaven_[a-z0-9_]+`)
	suffix := regexp.MustCompile(`_(bucket|count|sum)$`)
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if filepath.Ext(file) == ".json" && !json.Valid(b) {
			t.Errorf("%s is no JSON", file)
		}
		found := name.FindAll(b, -1)
		if len(found) == 0 {
			t.Errorf("%s asks for nothing", file)
		}
		for _, m := range found {
			whole := []byte("`" + string(m) + "`")
			if base := []byte("`" + string(suffix.ReplaceAll(m, nil)) + "`"); !bytes.Contains(metrics, whole) && !bytes.Contains(metrics, base) {
				t.Errorf("%s asks for %s, which docs/metrics.md does not have", filepath.Base(file), m)
			}
		}
	}
}
