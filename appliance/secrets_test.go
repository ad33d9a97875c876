package appliance

import (
	"strings"
	"testing"
)

// A mistake is shown on a screen and kept in a log: wherever the password or the token stands by mistake, it is not quoted.
func TestMistakesTellNoSecret(t *testing.T) {
	t.Parallel()
	const canary = "CANARYpw12"
	in := func(rest string) string { return "wifi:\n  country: DE\n  ssid: H\n  " + rest + "\n" }
	for _, file := range []string{
		"wifi: " + canary, "wifi: [" + canary + "]", "wifi: {country: DE, networks: " + canary + "}", "wifi: {country: DE, networks: [" + canary + "]}",
		"wifi: {country: DE, networks: [{H: " + canary + "}]}", "wifi: {country: DE, networks: [{ssid: H, passwort: " + canary + "}]}",
		"wifi: {country: DE, networks: {Home: " + canary + "}}", "wifi: {country: " + canary + ", ssid: H, passwort: x}",
		in("password: [" + canary + "]"), in("password: {" + canary + ": 1}"), in("hidden: " + canary), in("hidden: {a: " + canary + "}"),
		in("password: " + canary + "\n  password: " + canary), in("password: *" + canary), in("password: !" + canary + " x"), in("password: @" + canary),
		in("password: %" + canary), in("password: \"" + canary), in("password: \"\\q" + canary + "\""), in("password:" + canary), in("password = " + canary),
		in("password: &" + canary), in("password: {{" + canary + "}}"), in("<<: " + canary), in("? " + canary + "\n  : x"), in("password: a\n  " + canary + ": x"),
		in("password: short\npassword: " + canary), "password: " + canary, "wifi_password: " + canary, canary,
		"token: " + canary, "token: khj1_" + canary, "khj1_" + canary + ": x", "hostname: khj1_" + canary, "token: [khj1_" + canary + "]",
		"proxy: " + canary, "proxy: \"http://me:" + canary + "@p:3128\"", "proxy: {url: \"http://me:" + canary + "@p:3128\"}", "proxy: {url: \"http://p:3128\", password: " + canary + "}",
		"proxy: {url: \"http://p:3128\", user: me, passwort: " + canary + "}", "proxy: {password: " + canary + "}", "proxy: [" + canary + "]",
		"proxy: {url: \"http://p:3128\", user: me, password: \"" + canary + "\\n\"}", "proxy: {url: \"http://p:3128\", user: me, password: [" + canary + "]}",
		"proxy: {url: \"me:" + canary + "@p:3128\", user: me, password: x}", "proxy = " + canary, "proxy: \"http://me:" + canary + "@p:port\"",
		"update: {source: \"https://me:" + canary + "@example.com/\"}", "publish: [{hostname: a.example.com, service: \"http://me:" + canary + "@b/\"}]",
	} {
		if _, err := Parse("keyhaven.yaml", []byte(file)); err == nil || strings.Contains(err.Error(), canary) {
			t.Errorf("%q: %v", file, err)
		}
	}
}
