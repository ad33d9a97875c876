package appliance

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"

	"go.yaml.in/yaml/v3"
)

const made = "# Made from keyhaven.yaml at each start; changes here are lost.\n"

// defaultHostname is the name of a machine that was given none.
const defaultHostname = "keyhaven"

// networkFiles are the files of systemd-networkd, by name.
func networkFiles(c *Config) map[string][]byte {
	static := c.Network.Address != ""
	name := c.Network.Interface
	wireless := strings.HasPrefix(name, "wl") || name == "" && len(c.WiFi.Networks) > 0
	files := map[string][]byte{
		"20-keyhaven-wired.network": networkFile("Type=ether\nKind=!*", c, static && name == "" && !wireless, 100),
		"20-keyhaven-wifi.network":  networkFile("Type=wlan\nWLANInterfaceType=station", c, static && name == "" && wireless, 600),
	}
	if static && name != "" {
		files["10-keyhaven-static.network"] = networkFile("Name="+name, c, true, 50)
	}
	return files
}

// networkFile is one of them. The interface with the lower metric carries what may go over several.
func networkFile(match string, c *Config, static bool, metric int) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s[Match]\n%s\n\n[Network]\nMulticastDNS=yes\nLLMNR=no\nIPv6PrivacyExtensions=no\n", made, match)
	for _, d := range c.Network.DNS {
		fmt.Fprintf(&b, "DNS=%s\n", d)
	}
	if static {
		fmt.Fprintf(&b, "Address=%s\n", c.Network.Address)
		gw, err := netip.ParseAddr(c.Network.Gateway)
		fmt.Fprintf(&b, "\n[Route]\nGateway=%s\nMetric=%d\n", c.Network.Gateway, metric)
		if p, perr := netip.ParsePrefix(c.Network.Address); err == nil && perr == nil && !p.Contains(gw) {
			b.WriteString("GatewayOnLink=yes\n")
		}
		return []byte(b.String())
	}
	use := "yes"
	if len(c.Network.DNS) > 0 {
		use = "no"
	}
	fmt.Fprintf(&b, "DHCP=yes\n\n[DHCPv4]\nRouteMetric=%d\nUseDNS=%s\nUseDomains=yes\n\n[DHCPv6]\nUseDNS=%s\n\n[IPv6AcceptRA]\nRouteMetric=%d\nUseDNS=%s\n", metric, use, use, metric, use)
	return []byte(b.String())
}

// wpaSupplicant is the configuration of wpa_supplicant, readable by root alone. Names are in hexadecimal, in which nothing has
// a meaning of its own. A password cannot have line breaks, and the program takes it up to the line's last quote.
func wpaSupplicant(c *Config) []byte {
	var b strings.Builder
	b.WriteString(made + "ctrl_interface=DIR=" + wpaDir + "\nupdate_config=0\n")
	if c.WiFi.Country != "" {
		fmt.Fprintf(&b, "country=%s\n", c.WiFi.Country)
	}
	for i, n := range c.WiFi.Networks {
		fmt.Fprintf(&b, "\nnetwork={\n\tssid=%s\n\tpriority=%d\n", hex.EncodeToString([]byte(n.SSID)), len(c.WiFi.Networks)-i)
		if n.Hidden {
			b.WriteString("\tscan_ssid=1\n")
		}
		switch p := n.Password.Reveal(); {
		case p == "":
			b.WriteString("\tkey_mgmt=NONE\n")
		case hexKey.MatchString(p):
			fmt.Fprintf(&b, "\tkey_mgmt=WPA-PSK WPA-PSK-SHA256\n\tieee80211w=1\n\tpsk=%s\n", p)
		default:
			fmt.Fprintf(&b, "\tkey_mgmt=WPA-PSK WPA-PSK-SHA256 SAE\n\tieee80211w=1\n\tpsk=\"%s\"\n", p)
		}
		b.WriteString("}\n")
	}
	return []byte(b.String())
}

// hosts is /etc/hosts.
func hosts(c *Config) []byte {
	return fmt.Appendf(nil, "127.0.0.1\tlocalhost\n::1\tlocalhost\n127.0.1.1\t%s\n", orElse(string(c.Hostname), defaultHostname))
}

// timeServers is what systemd-timesyncd reads beside its own configuration.
func timeServers(c *Config) []byte {
	return fmt.Appendf(nil, "%s[Time]\nNTP=%s\n", made, strings.Join(c.NTP, " "))
}

// authorizedKeys is what the SSH server reads.
func authorizedKeys(c *Config) []byte {
	var b bytes.Buffer
	for _, k := range c.SSH.Keys {
		fmt.Fprintf(&b, "%s\n", k)
	}
	return b.Bytes()
}

// ingressRule is a rule as the connector's file has it.
type ingressRule struct {
	Hostname  string `yaml:"hostname,omitempty"`
	Path      string `yaml:"path,omitempty"`
	Service   string `yaml:"service"`
	Bandwidth string `yaml:"bandwidth,omitempty"`
}

// allowRule is an entry of the allow-list as the connector's file has it.
type allowRule struct {
	To    string `yaml:"to"`
	Ports []any  `yaml:"ports,omitempty,flow"`
}

// connectorFile is the connector's configuration.
type connectorFile struct {
	Identity struct {
		Dir string `yaml:"dir"`
	} `yaml:"identity"`
	Edges     []string `yaml:"edges,omitempty"`
	Transport struct {
		Proxy *proxyPart `yaml:"proxy,omitempty"`
	} `yaml:"transport,omitempty"`
	Allow   []allowRule   `yaml:"allow"`
	Control string        `yaml:"control"`
	Ingress []ingressRule `yaml:"ingress,omitempty"`
	Remote  bool          `yaml:"remote_config"`
}

// connectorYAML is the connector's file. The allow-list is empty unless the owner says otherwise: services that are published are
// reached by their rules.
func connectorYAML(c *Config) ([]byte, error) {
	f := connectorFile{Edges: c.Edges, Allow: []allowRule{}, Control: controlPath, Remote: true}
	f.Identity.Dir = identityDir
	f.Transport.Proxy = c.Proxy.part()
	for _, a := range c.Allow {
		f.Allow = append(f.Allow, allowRule(a))
	}
	for _, r := range c.rules() {
		f.Ingress = append(f.Ingress, ingressRule{Hostname: r.Hostname, Path: r.Path, Service: r.Service, Bandwidth: r.Bandwidth})
	}
	b, err := yaml.Marshal(f)
	return append([]byte(made), b...), err
}
