package appliance

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
)

// shapes are the only lines that the files of other programs may have, whatever stands in keyhaven.yaml.
var shapes = map[string]*regexp.Regexp{
	"network": regexp.MustCompile(`^(|# Made from .*|\[(Match|Network|Route|DHCPv4|DHCPv6|IPv6AcceptRA)\]|Type=(ether|wlan)|Kind=!\*|WLANInterfaceType=station|Name=[A-Za-z0-9_.-]+` +
		`|(DNS|Address|Gateway)=[0-9a-fA-F:./]+|(MulticastDNS|LLMNR|IPv6PrivacyExtensions|GatewayOnLink|DHCP|UseDNS|UseDomains)=(yes|no)|(Route)?Metric=[0-9]+)$`),
	"wpa": regexp.MustCompile(`^(|# Made from .*|ctrl_interface=DIR=/run/keyhaven/wpa|update_config=0|country=[A-Z]{2}|network=\{|\}|\tssid=([0-9a-f]{2})+|\tpriority=[0-9]+` +
		`|\tscan_ssid=1|\tkey_mgmt=(NONE|WPA-PSK WPA-PSK-SHA256( SAE)?)|\tieee80211w=1|\tpsk=[0-9a-fA-F]{64}|\tpsk="[ -~]{8,63}")$`),
	"hosts":  regexp.MustCompile(`^(|127\.0\.0\.1\tlocalhost|::1\tlocalhost|127\.0\.1\.1\t[a-z0-9-]{1,63})$`),
	"time":   regexp.MustCompile(`^(|# Made from .*|\[Time\]|NTP=[a-z0-9.:-]*( [a-z0-9.:-]+)*)$`),
	"keys":   regexp.MustCompile(`^(|(ssh|ecdsa|sk)-[a-z0-9@.-]+ +[A-Za-z0-9+/=]+( [^\n\r]*)?)$`),
	"camera": regexp.MustCompile(`^(|STREAMER_ARGS=--host=127\.0\.0\.1 --port=8090( --[a-z-]+(=[A-Za-z0-9_.:+,@/-]+)?)+)$`),
}

// closed checks what is rendered for a configuration.
func closed(t *testing.T, c *Config) {
	t.Helper()
	files := map[string]string{"wpa": string(wpaSupplicant(c)), "hosts": string(hosts(c)), "time": string(timeServers(c)), "keys": string(authorizedKeys(c))}
	for _, b := range networkFiles(c) {
		files["network"] += string(b)
	}
	if c.Camera != nil {
		env, err := c.Camera.settings().Environment("/dev/video0")
		if err != nil {
			t.Errorf("the camera's settings were good: %v", err)
		}
		files["camera"] = string(env)
	}
	for name, text := range files {
		for line := range strings.SplitSeq(text, "\n") {
			if !shapes[name].MatchString(line) {
				t.Errorf("%s: %q", name, line)
			}
		}
	}
}

// A value of keyhaven.yaml, from whoever may write that, or from a web page that it was copied from, is a value in the files that
// are made from it, and never a line of its own.
func TestValuesStayValues(t *testing.T) {
	t.Parallel()
	keys := []string{"hostname: %s", "timezone: %s", "ntp: [%s]", "ssh: {keys: [%s]}", "network: {dns: [%s]}", "network: {interface: %s, address: 192.0.2.2/24, gateway: 192.0.2.1}",
		"network: {address: %s, gateway: 192.0.2.1}", "network: {address: 192.0.2.2/24, gateway: %s}", "wifi: {country: %s, ssid: a, password: \"12345678\"}",
		"wifi: {country: DE, ssid: %s, password: \"12345678\"}", "wifi: {country: DE, ssid: a, password: %s}", "camera: {hostname: a.example.com, device: %s}",
		"camera: {hostname: a.example.com, resolution: %s}", "camera: %s"}
	values := []string{"a", "192.0.2.1", "eth0", "/dev/video0", "12345678", goodKey, `abc"def#g}`, `12345678"`, "640x480", "DE", "Europe/Berlin"}
	ends := []string{"", `\n`, `\r`, `\nExecStart=/bin/sh`, `\n}\nnetwork={`, `\0`, ` --host=0.0.0.0`, `\u2028x`, `\u0085x`, ` command=\"x\"`, `%%n`, `\t`, "\\\\", `\u00adx`, `/../../x`, `;x`, `$(x)`, `\u200bx`, `\u3000x`}
	taken := 0
	for _, key := range keys {
		for _, value := range values {
			for _, end := range ends {
				for _, text := range []string{value + end, end + value} {
					file := fmt.Sprintf(key, `"`+strings.ReplaceAll(strings.ReplaceAll(text, `\"`, `"`), `"`, `\"`)+`"`)
					if c, err := Parse("keyhaven.yaml", []byte(file)); err == nil {
						taken++
						closed(t, c)
					}
				}
			}
		}
	}
	if taken < 50 {
		t.Errorf("only %d files were good: nothing is shown", taken)
	}
}

// Whoever may write the card, or makes somebody copy a file onto it.
func FuzzRender(f *testing.F) {
	f.Add("keyhaven.yaml", []byte(goodFile+"ssh: {keys: [\""+goodKey+"\"]}\ncamera: a.example.com\nntp: [a.example.com]\nnetwork: {address: 192.0.2.2/24, gateway: 192.0.2.1, dns: [::1]}\n"))
	f.Add(UserData, []byte(imagerUserData))
	f.Add(NetworkConfig, []byte(imagerNetwork))
	f.Fuzz(func(t *testing.T, name string, b []byte) {
		if c, err := Parse(name, b); err == nil {
			closed(t, c)
		}
	})
}
