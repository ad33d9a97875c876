package container

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
	"go.yaml.in/yaml/v3"
)

const examples = "../../examples/containers"

// read returns a file of this repository.
func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// containerfile returns the instructions of a program's Containerfile, by name.
func containerfile(t *testing.T, program string) map[string]string {
	t.Helper()
	text := strings.ReplaceAll(string(read(t, filepath.Join(program, "Containerfile"))), "\\\n", "")
	all := map[string]string{}
	for line := range strings.Lines(text) {
		if name, rest, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			all[name] = rest
		}
	}
	return all
}

func TestContainerfiles(t *testing.T) {
	for _, program := range []string{"connector", "edge", "keyserver"} {
		c := containerfile(t, program)
		for name, want := range map[string]string{"FROM": "scratch", "USER": "65532:65532", "ENTRYPOINT": `["/usr/bin/keyhaven-` + program + `"]`, "ADD": "root.tar /"} {
			if c[name] != want {
				t.Errorf("%s: %s is %q, want %q", program, name, c[name], want)
			}
		}
		if want := `CMD ["/usr/bin/keyhaven-` + program + `", "health"]`; !strings.HasSuffix(c["HEALTHCHECK"], want) {
			t.Errorf("%s: HEALTHCHECK is %q, want %q", program, c["HEALTHCHECK"], want)
		}
		if !strings.Contains(c["LABEL"], "org.opencontainers.image.version") {
			t.Errorf("%s: no version among the labels", program)
		}
	}
}

func TestCompose(t *testing.T) {
	var file struct {
		Services map[string]struct {
			Image       string            `yaml:"image"`
			Restart     string            `yaml:"restart"`
			Sysctls     map[string]string `yaml:"sysctls"`
			Ports       []string          `yaml:"ports"`
			Volumes     []string          `yaml:"volumes"`
			Stop        string            `yaml:"stop_grace_period"`
			ReadOnly    bool              `yaml:"read_only"`
			Tmpfs       []string          `yaml:"tmpfs"`
			CapDrop     []string          `yaml:"cap_drop"`
			SecurityOpt []string          `yaml:"security_opt"`
			Healthcheck struct {
				Test     []string `yaml:"test"`
				Interval string   `yaml:"interval"`
				Timeout  string   `yaml:"timeout"`
				Start    string   `yaml:"start_period"`
			} `yaml:"healthcheck"`
		} `yaml:"services"`
		Volumes map[string]struct{} `yaml:"volumes"`
	}
	dec := yaml.NewDecoder(bytes.NewReader(read(t, filepath.Join(examples, "compose.yaml"))))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil {
		t.Fatal(err)
	}
	edge, ok := file.Services["edge"]
	if !ok || !slices.Equal(edge.Healthcheck.Test, []string{"CMD", "/usr/bin/keyhaven-edge", "health"}) || !edge.ReadOnly || !slices.Equal(edge.CapDrop, []string{"ALL"}) {
		t.Errorf("got %+v", edge)
	}
	for _, v := range edge.Volumes {
		if name, _, _ := strings.Cut(v, ":"); !strings.HasPrefix(name, "/") {
			if _, ok := file.Volumes[name]; !ok {
				t.Errorf("volume %s is not declared", name)
			}
		}
	}
}

// Keys of Podman's units that the examples use, see podman-systemd.unit(5).
var podman = []string{"Image", "Pull", "Network", "Volume", "Environment", "Tmpfs", "ReadOnly", "DropCapability", "NoNewPrivileges", "HealthCmd",
	"HealthInterval", "HealthTimeout", "HealthStartPeriod", "HealthOnFailure"}

func TestUnits(t *testing.T) {
	for _, program := range []string{"connector", "keyserver"} {
		options, err := unit.DeserializeOptions(bytes.NewReader(read(t, filepath.Join(examples, "keyhaven-"+program+".container"))))
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for _, o := range options {
			if o.Section == "Container" && !slices.Contains(podman, o.Name) {
				t.Errorf("%s: there is no key %s", program, o.Name)
			}
			got[o.Section+"."+o.Name] += o.Value
		}
		for key, want := range map[string]string{
			"Container.Image": "localhost/keyhaven-" + program + ":latest", "Container.ReadOnly": "true", "Container.DropCapability": "all",
			"Container.HealthCmd": `["/usr/bin/keyhaven-` + program + `", "health"]`, "Service.Restart": "always",
		} {
			if got[key] != want {
				t.Errorf("%s: %s is %q, want %q", program, key, got[key], want)
			}
		}
	}
}
