package appliance

import (
	"fmt"
	"slices"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/internal/conf"
)

// The files that the Raspberry Pi Imager writes, in the form of cloud-init.
const (
	UserData      = "user-data"
	NetworkConfig = "network-config"
)

// A cloudFile reads the little that counts out of a file of cloud-init. What it does not know is left alone: such files
// hold much that is meant for others.
type cloudFile struct {
	name string
	errs conf.Errors
}

func (f *cloudFile) fault(n *yaml.Node, key, format string, args ...any) {
	f.errs = append(f.errs, &conf.Error{File: f.name, Line: n.Line, Key: key, Msg: fmt.Sprintf(format, args...)})
}

// open returns the document's mapping, or nil for an empty file.
func (f *cloudFile) open(b []byte) (*yaml.Node, error) {
	text, err := plainText(f.name, b)
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(text, &doc); err != nil {
		return nil, conf.Errors{&conf.Error{File: f.name, Msg: "is not valid YAML; write it again with the Raspberry Pi Imager, or delete it and use keyhaven.yaml"}}
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil, nil
	}
	if doc.Content[0].Kind != yaml.MappingNode {
		return nil, conf.Errors{&conf.Error{File: f.name, Line: doc.Content[0].Line, Msg: "holds no keys with values; write it again with the Raspberry Pi Imager, or delete it"}}
	}
	return doc.Content[0], nil
}

// at returns the value below the keys, or nil.
func at(n *yaml.Node, keys ...string) *yaml.Node {
	for _, k := range keys {
		if n == nil || n.Kind != yaml.MappingNode {
			return nil
		}
		var found *yaml.Node
		for i := 0; i+1 < len(n.Content); i += 2 {
			if n.Content[i].Value == k {
				found = n.Content[i+1]
			}
		}
		n = found
	}
	return n
}

// text returns a single value; nothing and null are "".
func text(n *yaml.Node) string {
	if n == nil || n.Kind != yaml.ScalarNode || n.Tag == "!!null" {
		return ""
	}
	return n.Value
}

// texts returns a list's single values, or a single value as a list.
func texts(n *yaml.Node) (list []string) {
	if n == nil {
		return nil
	}
	if n.Kind != yaml.SequenceNode {
		if s := text(n); s != "" {
			return []string{s}
		}
		return nil
	}
	for _, c := range n.Content {
		if s := text(c); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// finish completes c with the checks of keyhaven.yaml.
func (f *cloudFile) finish(c *Config, root *yaml.Node) (*Config, error) {
	c.complete(func(key, format string, args ...any) { f.fault(root, key, format, args...) })
	if err := f.errs.Err(); err != nil {
		return nil, explain(f.name, nil, err)
	}
	return c, nil
}

// parseUserData reads host name, time zone and SSH keys. Users and passwords are left alone: there is one user to log in
// as, and no password.
func parseUserData(name string, b []byte) (*Config, error) {
	f := &cloudFile{name: name}
	root, err := f.open(b)
	if err != nil || root == nil {
		return &Config{}, err
	}
	c := &Config{Hostname: Text(text(at(root, "hostname"))), TimeZone: text(at(root, "timezone"))}
	c.SSH.Keys = texts(at(root, "ssh_authorized_keys"))
	if users := at(root, "users"); users != nil && users.Kind == yaml.SequenceNode {
		for _, u := range users.Content {
			c.SSH.Keys = append(c.SSH.Keys, texts(at(u, "ssh_authorized_keys"))...)
		}
	}
	slices.Sort(c.SSH.Keys)
	c.SSH.Keys = slices.Compact(c.SSH.Keys)
	return f.finish(c, root)
}

// parseNetworkConfig reads the wireless networks, and a static address of the first interface that has one.
func parseNetworkConfig(name string, b []byte) (*Config, error) {
	f := &cloudFile{name: name}
	root, err := f.open(b)
	if err != nil || root == nil {
		return &Config{}, err
	}
	net := root
	if n := at(root, "network"); n != nil {
		net = n
	}
	c := &Config{}
	if wifis := at(net, "wifis"); wifis != nil && wifis.Kind == yaml.MappingNode {
		for i := 0; i+1 < len(wifis.Content); i += 2 {
			f.wifi(c, wifis.Content[i].Value, wifis.Content[i+1])
		}
	}
	if wires := at(net, "ethernets"); wires != nil && wires.Kind == yaml.MappingNode {
		for i := 0; i+1 < len(wires.Content); i += 2 {
			c.static(wires.Content[i].Value, wires.Content[i+1])
		}
	}
	if len(c.WiFi.Networks) > 0 && c.WiFi.Country == "" {
		f.fault(root, "wifis", "names no country; set the wireless LAN country in the Raspberry Pi Imager, or write wifi: with country: into keyhaven.yaml")
		return nil, f.errs.Err()
	}
	return f.finish(c, root)
}

// wifi takes the access points of one interface.
func (f *cloudFile) wifi(c *Config, iface string, n *yaml.Node) {
	points := at(n, "access-points")
	if points == nil || points.Kind != yaml.MappingNode {
		return
	}
	if country := text(at(n, "regulatory-domain")); country != "" {
		c.WiFi.Country = country
	}
	for i := 0; i+1 < len(points.Content); i += 2 {
		point := points.Content[i+1]
		password := text(at(point, "password"))
		if password == "" {
			password = text(at(point, "auth", "password"))
		}
		secret := Secret(password)
		c.WiFi.Networks = append(c.WiFi.Networks, WiFiNetwork{SSID: Text(points.Content[i].Value), Password: &secret,
			Hidden: text(at(point, "hidden")) == "true"})
	}
	c.static(iface, n)
}

// static takes a static address, if none was found before.
func (c *Config) static(iface string, n *yaml.Node) {
	addresses := texts(at(n, "addresses"))
	if len(addresses) == 0 || c.Network.Address != "" {
		return
	}
	c.Network = Network{Address: addresses[0], Interface: iface, DNS: texts(at(n, "nameservers", "addresses"))}
	if c.Network.Gateway = text(at(n, "gateway4")); c.Network.Gateway != "" {
		return
	}
	if routes := at(n, "routes"); routes != nil && routes.Kind == yaml.SequenceNode {
		for _, r := range routes.Content {
			if to := text(at(r, "to")); to == "default" || to == "0.0.0.0/0" {
				c.Network.Gateway = text(at(r, "via"))
			}
		}
	}
}

// complement fills in what c does not say from what another file says.
func (c *Config) complement(o *Config) {
	c.Hostname, c.TimeZone = orElse(c.Hostname, o.Hostname), orElse(c.TimeZone, o.TimeZone)
	if len(c.WiFi.Networks) == 0 {
		c.WiFi.Networks = o.WiFi.Networks
		c.WiFi.Country = orElse(c.WiFi.Country, o.WiFi.Country)
	}
	if c.Network.Address == "" && len(c.Network.DNS) == 0 {
		c.Network = o.Network
	}
	if len(c.SSH.Keys) == 0 {
		c.SSH.Keys = o.SSH.Keys
	}
}
