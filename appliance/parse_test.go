package appliance

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf16"
)

func TestParse(t *testing.T) {
	token := testToken(t).Reveal()
	c, err := Parse("keyhaven.yaml", []byte("\ufefftoken: "+token+"\r\nhostname: PetCam\r\nwifi: {country: no, ssid: 12345, password: 00012345}\r\n"+
		"network: {address: 192.168.1.50/24, gateway: 192.168.1.1}\r\ncamera: cam.example.com\r\n"+
		"publish:\r\n  - {hostname: home.example.com, service: \"http://192.168.1.20:8123\"}\r\n  - {hostname: mqtt, service: \"tcp://192.168.1.21:1883\"}\r\n"+
		"  - {hostname: coap, service: \"udp://192.168.1.22:5683\", bandwidth: 1Mbit/s}\r\nallow: [{to: 192.168.1.0/24, ports: [1883, 554]}]\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	if c.Token.Reveal() != token || c.Hostname != "petcam" {
		t.Errorf("token %q, host name %q", c.Token.Reveal(), c.Hostname)
	}
	if w := c.WiFi; w.Country != "NO" || len(w.Networks) != 1 || w.Networks[0].SSID != "12345" || w.Networks[0].Password.Reveal() != "00012345" {
		t.Errorf("wifi %+v", w)
	}
	if !reflect.DeepEqual(c.Network.DNS, []string{"192.168.1.1"}) {
		t.Errorf("name servers %q, want the gateway", c.Network.DNS)
	}
	var hosts []string
	for _, r := range c.rules() {
		hosts = append(hosts, r.Hostname+" "+r.Service+" "+r.Bandwidth)
	}
	want := []string{"cam.example.com http://127.0.0.1:8090 ", "home.example.com http://192.168.1.20:8123 ", "mqtt tcp://192.168.1.21:1883 ",
		"coap udp://192.168.1.22:5683 1Mbit/s", " http_status:404 "}
	if !reflect.DeepEqual(hosts, want) {
		t.Errorf("rules\n%q\nwant\n%q", hosts, want)
	}
}

func TestParseSecretsDoNotPrint(t *testing.T) {
	token := testToken(t).Reveal()
	c, err := Parse("keyhaven.yaml", []byte("token: "+token+"\nwifi: {country: DE, ssid: a, password: canary123}"))
	if err != nil {
		t.Fatal(err)
	}
	s := strings.Join([]string{c.Token.String(), c.Token.GoString(), c.WiFi.Networks[0].Password.String(), c.Token.LogValue().String()}, " ")
	if strings.Contains(s, "khj1_") || strings.Contains(s, "canary") {
		t.Error(s)
	}
}

// Each mistake is told with its line, what is wrong and what to do, and no secret.
func TestParseMistakes(t *testing.T) {
	token := testToken(t).Reveal()
	tests := []struct{ name, text, want string }{
		{"tab", "wifi:\n\tcountry: DE\n", "keyhaven.yaml:2: the line starts with a tab"},
		{"no space", "hostname:petcam\nwifi: {}\n", "keyhaven.yaml:1: write hostname, a colon, a space"},
		{"equals", "hostname = petcam\ntimezone: UTC\n", "keyhaven.yaml:1: write hostname, a colon"},
		{"broken", "publish:\n  - {hostname: a.example.com\nallow: []\n", "not valid YAML near here"},
		{"first line indented", " token: khj1_...\nhostname: petcam\n", "keyhaven.yaml:2: this is not valid YAML near here (this line belongs to nothing before it"},
		{"two documents", "hostname: a\n---\nhostname: b\n", "keyhaven.yaml:3: a second document begins here"},
		{"unknown", "hostnam: petcam\n", "keyhaven.yaml:1: hostnam: unknown key; did you mean hostname?"},
		{"unknown inside", "camera:\n  hostname: a.example.com\n  resolutoin: 1x1\n", "keyhaven.yaml:3: camera.resolutoin: unknown key; did you mean resolution?"},
		{"twice", "hostname: a\nhostname: b\n", "keyhaven.yaml:2: hostname: is given twice"},
		{"token cut", "token: " + token[:40] + "\n", "copy it whole, from khj1_"},
		{"token of another kind", "token: abc\n", "does not start with khj1_"},
		{"edge", "edges: [\"edge:x\"]\n", "keyhaven.yaml:1: edges[0]"},
		{"host name", "hostname: pet_cam\n", `"pet_cam" is no name for a computer`},
		{"UK", "wifi: {country: UK, ssid: a, password: 12345678}\n", "did you mean GB?"},
		{"country", "wifi: {country: XX, ssid: a, password: 12345678}\n", `"XX" is no country code`},
		{"no country", "wifi:\n  ssid: a\n  password: 12345678\n", "keyhaven.yaml:1: wifi: has no country"},
		{"short password", "wifi:\n  country: DE\n  networks:\n    - ssid: a\n      password: canary1\n", "keyhaven.yaml:5: wifi.networks[0].password: has 7 characters; Wi-Fi passwords have 8 to 63"},
		{"curly quotes", "wifi: {country: DE, ssid: a, password: “canary99”}\n", "curly quotes"},
		{"no password", "wifi: {country: DE, ssid: a}\n", "has no password"},
		{"password list", "wifi: {country: DE, ssid: a, password: [canary99]}\n", "must be a single value"},
		{"long ssid", "wifi: {country: DE, ssid: abcdefghijklmnopqrstuvwxyzabcdefghijkl, password: canary99}\n", "wifi.ssid: is longer than 32 bytes"},
		{"address without length", "network: {address: 192.168.1.50, gateway: 192.168.1.1}\n", "write 192.168.1.50/24"},
		{"gateway outside", "network: {address: 192.168.1.50/24, gateway: 192.168.2.1}\n", "192.168.2.1 is not in the network 192.168.1.0/24"},
		{"gateway missing", "network: {address: 192.168.1.50/24}\n", "has an address but no gateway"},
		{"gateway alone", "network: {gateway: 192.168.1.1}\n", "goes with an address"},
		{"network's address", "network: {address: 192.168.1.0/24, gateway: 192.168.1.1}\n", "stands for the whole network"},
		{"broadcast", "network: {address: 192.168.1.255/24, gateway: 192.168.1.1}\n", "stands for the whole network"},
		{"own gateway", "network: {address: 192.168.1.5/24, gateway: 192.168.1.5}\n", "the device's own address"},
		{"dns", "network: {dns: [router]}\n", `network.dns[0]: "router" is no address`},
		{"proxy", "proxy: router\n", "keyhaven.yaml:1: proxy.url: is no address of a proxy; write one such as http://192.168.1.5:3128"},
		{"port of a proxy", "proxy: http://192.168.1.5:70000\n", "keyhaven.yaml:1: proxy.url: has the port 70000, and ports are from 1 to 65535"},
		{"proxy with a password in it", "proxy: \"http://me:canary99@192.168.1.5:3128\"\n", "write them beside url:, as user: and password:"},
		{"proxy without address", "proxy: {user: me, password: canary99}\n", "proxy: has no url"},
		{"half a login", "proxy: {url: \"http://192.168.1.5:3128\", user: me}\n", "needs both user and password, or neither"},
		{"colon in a proxy's user", "proxy: {url: \"http://192.168.1.5:3128\", user: \"a:b\", password: canary99}\n", "proxy.user: has a colon"},
		{"line break in a proxy's password", "proxy: {url: \"http://192.168.1.5:3128\", user: a, password: \"canary99\\nx\"}\n", "proxy.password: is longer than 255 bytes, or has a line break"},
		{"zone", "timezone: Berlin time\n", "is no time zone"},
		{"ntp", "ntp: [\"a b\"]\n", "is no time server"},
		{"private key", "ssh: {keys: [\"-----BEGIN OPENSSH PRIVATE KEY-----\"]}\n", "is a private key, which must never leave"},
		{"cut key", "ssh: {keys: [\"" + goodKey[:60] + "\"]}\n", "the ssh-ed25519 key is damaged or cut off"},
		{"no key", "ssh: {keys: [\"hello\"]}\n", "is no public SSH key"},
		{"csi", "camera: csi\n", "cameras on the ribbon cable (CSI) do not work with this image"},
		{"csi device", "camera: {hostname: a.example.com, device: libcamera}\n", "cameras on the ribbon cable (CSI) do not work with this image"},
		{"device", "camera: {hostname: a.example.com, device: /dev/sda}\n", "camera.device: \"/dev/sda\" is no camera"},
		{"resolution", "camera: {hostname: a.example.com, resolution: 720p}\n", "camera.resolution"},
		{"fps", "camera: {hostname: a.example.com, fps: 500}\n", "camera.fps: must be from 1 to 120"},
		{"no camera host", "camera: {fps: 5}\n", "camera: has no hostname"},
		{"bandwidth", "camera: {hostname: a.example.com, bandwidth: fast}\n", "camera.bandwidth: "},
		{"service", "publish:\n  - hostname: a.example.com\n    service: 192.168.1.20\n", "keyhaven.yaml:3: publish[0].service: \"192.168.1.20\" is no service"},
		{"catch-all first", "publish:\n  - service: http://a:1\n  - {hostname: b.example.com, service: \"http://b:1\"}\n", "publish[0]: takes every request"},
		{"allow", "allow: [{to: everything!, ports: [1]}]\n", "allow[0].to"},
		{"allow without ports", "allow: [{to: 10.0.0.0/8}]\n", "allow[0].ports: no port is permitted"},
		{"ports", "allow: [{to: 10.0.0.0/8, ports: [http]}]\n", "allow[0].ports[0]"},
		{"source", "update: {source: ftp://x}\n", "update.source"},
		{"schedule", "update: {schedule: night}\n", "update.schedule: \"night\" is no time of the day"},
		{"rtf", "{\\rtf1 token}", "document with formatting (RTF)"},
		{"html", "<!DOCTYPE html>", "is a web page"},
		{"binary", "a\x00b", "is not plain text"},
		{"camera's address", "camera: https://cam.example.com/\n", `"https://cam.example.com/" is no host name`},
		{"published address", "publish: [{hostname: \"https://a.example.com/\", service: \"http://192.168.1.2\"}]\n", "keyhaven.yaml:1: publish[0].hostname: invalid host name"},
		{"latin", "hostname: a\nwifi: {ssid: caf\xe9}\n", "keyhaven.yaml:2: has a letter that is not UTF-8"},
		{"large", strings.Repeat("#", MaxConfig+1), "is larger than 64 KiB"},
		{"list", "- token\n", "holds no keys with values"},
		{"token in a wrong place", "edges: " + token + "\n", "edges: must be a list"},
		{"token as a key", token + ": x\n", "khj1_…: unknown key"},
		{"wifi in one", "wifi: canary99\n", "wifi: must be a group of keys"},
		{"password as a key", "wifi:\n  ssid: a\n  canary99: x\n", "has a key here that is not known"},
		{"alias", "wifi: {ssid: a, password: *canary99}\n", "a value starts with *"},
		{"anchor", "wifi: {ssid: a, password: &canary99 x}\n", "anchors and aliases"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Parse("keyhaven.yaml", []byte(tt.text))
			if err == nil {
				t.Fatal("no error")
			}
			if got := err.Error(); !strings.Contains(got, tt.want) {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if strings.Contains(err.Error(), "canary") || strings.Contains(err.Error(), token[:20]) {
				t.Errorf("it tells a secret: %v", err)
			}
			if strings.Contains(err.Error(), "vnet: ") || strings.Contains(err.Error(), "mtls: ") || strings.Count(err.Error(), "camera.hostname: ") > 1 {
				t.Errorf("it names packages, or the same twice: %v", err)
			}
		})
	}
}

func TestParseUTF16(t *testing.T) {
	for _, big := range []bool{false, true} {
		var b []byte
		for _, u := range utf16.Encode([]rune("\ufeffhostname: petcam\r\n")) {
			if big {
				b = append(b, byte(u>>8), byte(u))
			} else {
				b = append(b, byte(u), byte(u>>8))
			}
		}
		c, err := Parse(`E:\KEYHAVEN.YAML`, b)
		if err != nil || c.Hostname != "petcam" {
			t.Errorf("big-endian %v: %+v, %v", big, c, err)
		}
	}
}

func TestParseEmpty(t *testing.T) {
	for _, text := range []string{"", "# fill me in\n", "---\n"} {
		c, err := Parse("keyhaven.yaml", []byte(text))
		if err != nil || len(c.rules()) != 0 || c.Token != "" {
			t.Errorf("%q: %+v, %v", text, c, err)
		}
	}
}

func TestZones(t *testing.T) {
	dir := t.TempDir()
	for _, z := range []string{"Europe/Berlin", "America/New_York", "UTC"} {
		if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(z)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, z), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct{ zone, want string }{
		{"Europe/Berlin", ""}, {"UTC", ""}, {"Europe/Berlinn", "did you mean Europe/Berlin?"}, {"america/new_york", "did you mean America/New_York?"},
		{"../../etc/passwd", "write one such as"}, {"Nowhere/City", "write one such as"}, {"Europe", "is no time zone"},
	} {
		err := checkZone(dir, tt.zone)
		if got := ""; err != nil {
			got = err.Error()
			if tt.want == "" || !strings.Contains(got, tt.want) {
				t.Errorf("%s: got %q, want %q", tt.zone, got, tt.want)
			}
		} else if tt.want != "" {
			t.Errorf("%s: no error, want %q", tt.zone, tt.want)
		}
	}
	if err := checkZone(t.TempDir(), "Europe/Nowhere"); err != nil {
		t.Errorf("a system without zones refuses one: %v", err)
	}
}

const imagerUserData = `#cloud-config
manage_resolv_conf: false
hostname: kitchen
manage_etc_hosts: true
packages:
- avahi-daemon
timezone: Europe/London
keyboard:
  model: pc105
  layout: "gb"
users:
- name: pi
  groups: users,adm,dialout,audio,netdev,video
  shell: /bin/bash
  lock_passwd: false
  passwd: $5$canary$1234
  ssh_authorized_keys:
    - ` + goodKey + `
  sudo: ALL=(ALL) NOPASSWD:ALL
enable_ssh: true
ssh_pwauth: false
rpi:
  interfaces:
    serial: true
runcmd:
- [ rfkill, unblock, wifi ]
`

const imagerNetwork = `network:
  version: 2
  wifis:
    renderer: networkd
    wlan0:
      dhcp4: true
      regulatory-domain: "GB"
      access-points:
        "My Home":
          password: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
          hidden: true
      optional: true
`

func TestParseImager(t *testing.T) {
	u, err := Parse("user-data", []byte(imagerUserData))
	if err != nil {
		t.Fatal(err)
	}
	if u.Hostname != "kitchen" || u.TimeZone != "Europe/London" || !reflect.DeepEqual(u.SSH.Keys, []string{goodKey}) {
		t.Errorf("user-data: %+v", u)
	}
	n, err := Parse("network-config", []byte(imagerNetwork))
	if err != nil {
		t.Fatal(err)
	}
	if w := n.WiFi; w.Country != "GB" || len(w.Networks) != 1 || w.Networks[0].SSID != "My Home" || !w.Networks[0].Hidden {
		t.Errorf("network-config: %+v", n.WiFi)
	}
	own, err := Parse("keyhaven.yaml", []byte("hostname: petcam\n"))
	if err != nil {
		t.Fatal(err)
	}
	own.complement(u)
	own.complement(n)
	if own.Hostname != "petcam" || own.TimeZone != "Europe/London" || len(own.SSH.Keys) != 1 || len(own.WiFi.Networks) != 1 {
		t.Errorf("together: %+v", own)
	}
	for _, tt := range []struct{ name, text, want string }{
		{"user-data", "a: [", "user-data: is not valid YAML; write it again with the Raspberry Pi Imager"},
		{"user-data", "hostname: a_b", "user-data:1: hostname"},
		{"network-config", strings.Replace(imagerNetwork, "regulatory-domain", "x", 1), "set the wireless LAN country"},
		{"network-config", "network: {wifis: {wlan0: {regulatory-domain: GB, access-points: {a: {password: canary1}}}}}", "has 7 characters"},
	} {
		if _, err := Parse(tt.name, []byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: got %v, want %s", tt.name, err, tt.want)
		}
	}
}

func TestParseImagerStatic(t *testing.T) {
	c, err := Parse("network-config", []byte("version: 2\nethernets:\n  eth0:\n    addresses: [10.0.0.5/24]\n    routes: [{to: default, via: 10.0.0.1}]\n    nameservers: {addresses: [10.0.0.2]}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Network{Address: "10.0.0.5/24", Gateway: "10.0.0.1", DNS: []string{"10.0.0.2"}, Interface: "eth0"}); !reflect.DeepEqual(c.Network, want) {
		t.Errorf("got %+v, want %+v", c.Network, want)
	}
}

// Whoever writes the card is trusted, but a card wears out, and editors write strange things.
func FuzzParse(f *testing.F) {
	f.Add("keyhaven.yaml", []byte("hostname: petcam\nwifi: {country: DE, ssid: a, password: 12345678}\ncamera: cam.example.com\n"))
	f.Add("keyhaven.yaml", []byte("network: {address: 192.168.1.50/24, gateway: 192.168.1.1}\npublish: [{hostname: a, service: tcp://b:1}]\n"))
	f.Add("user-data", []byte(imagerUserData))
	f.Add("network-config", []byte(imagerNetwork))
	f.Add("keyhaven.yaml", []byte("token: .removed....\n"))
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		c, err := Parse(name, b)
		if err != nil {
			if err.Error() == "" {
				t.Error("an error without words")
			}
			return
		}
		networkFiles(c)
		if _, err := connectorYAML(c); err != nil {
			t.Errorf("accepted, but: %v", err)
		}
		if wpa := string(wpaSupplicant(c)); strings.Count(wpa, "\nnetwork={\n") != len(c.WiFi.Networks) || strings.Count(wpa, "\tssid=") != len(c.WiFi.Networks) {
			t.Errorf("%d networks became\n%s", len(c.WiFi.Networks), wpa)
		}
	})
}
