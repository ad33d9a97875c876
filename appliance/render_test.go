package appliance

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/ingressconf"
)

var renew = flag.Bool("update", false, "write what is rendered to testdata")

// What is rendered for each example is what testdata holds.
func TestGolden(t *testing.T) {
	examples, err := filepath.Glob("../examples/appliance/*.yaml")
	if err != nil || len(examples) < 4 {
		t.Fatalf("%d examples, %v", len(examples), err)
	}
	for _, path := range examples {
		t.Run(strings.TrimSuffix(filepath.Base(path), ".yaml"), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			c, err := Parse(path, b)
			if err != nil {
				t.Fatal(err)
			}
			var all strings.Builder
			add := func(name string, b []byte) { all.WriteString("== " + name + "\n" + string(b) + "\n") }
			files := networkFiles(c)
			for _, name := range []string{"10-keyhaven-static.network", "20-keyhaven-wifi.network", "20-keyhaven-wired.network"} {
				if b, ok := files[name]; ok {
					add(name, b)
					delete(files, name)
				}
			}
			if len(files) > 0 {
				t.Errorf("files that the test does not know: %v", files)
			}
			y, err := connectorYAML(c)
			if err != nil {
				t.Fatal(err)
			}
			add("wpa_supplicant.conf", wpaSupplicant(c))
			add("hosts", hosts(c))
			add("timesyncd.conf", timeServers(c))
			add("authorized_keys", authorizedKeys(c))
			add("connector.yaml", y)
			golden := filepath.Join("testdata/golden", filepath.Base(path)+".txt")
			if *renew {
				if err := os.WriteFile(golden, []byte(all.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if all.String() != string(want) {
				t.Errorf("got\n%s\nwant\n%s", all.String(), want)
			}
			if c.Camera != nil || len(c.Publish) > 0 {
				if _, err := ingressconf.FromFile(y); err != nil {
					t.Errorf("the connector would not take it: %v", err)
				}
			}
		})
	}
}

// A radio that is switched off is switched on, and no other switch is touched.
func TestRadio(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": goodFile})
	for name, kind := range map[string]string{"rfkill0": "wlan", "rfkill1": "bluetooth"} {
		if err := os.MkdirAll(m.path("/sys/class/rfkill", name), 0o755); err != nil {
			t.Fatal(err)
		}
		m.write(t, "/sys/class/rfkill/"+name+"/type", kind+"\n")
		m.write(t, "/sys/class/rfkill/"+name+"/soft", "1\n")
	}
	st := m.says(t, m.agent(nil), string(StateNoToken))
	if wlan, bt := m.read(t, "/sys/class/rfkill/rfkill0/soft"), m.read(t, "/sys/class/rfkill/rfkill1/soft"); wlan[0] != '0' || bt[0] != '1' || len(st.Notes) > 0 {
		t.Errorf("Wi-Fi %q, Bluetooth %q; %q", wlan, bt, st.Notes)
	}
}
