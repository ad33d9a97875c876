package appliance

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"strings"

	"github.com/keyhaven/keyhaven/appliance/camera"
	"github.com/keyhaven/keyhaven/connector"
	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/vnet"
)

// Bounds of the lists.
const (
	maxEdges    = 8
	maxNetworks = 16
	maxKeys     = 32
	maxServers  = 8
	maxPublish  = 100
	maxAllow    = 100
)

// A faultFunc takes what is wrong with a key.
type faultFunc func(key, format string, args ...any)

// complete checks what each key means and fills in what is not said.
func (c *Config) complete(fault faultFunc) {
	c.completeToken(fault)
	c.completeSystem(fault)
	c.completeWiFi(fault)
	c.Network.check(fault)
	c.Proxy.check(fault)
	c.completeSSH(fault)
	if c.Camera != nil {
		c.Camera.check(fault)
	}
	c.checkPublish(fault)
	c.checkAllow(fault)
	c.Update.check(fault)
}

func tooMany(fault faultFunc, key string, n, limit int) bool {
	if n > limit {
		fault(key, "has %d entries, at most %d are allowed", n, limit)
	}
	return n > limit
}

func (c *Config) completeToken(fault faultFunc) {
	c.Token = Secret(strings.TrimSpace(c.Token.Reveal()))
	if t := c.Token.Reveal(); scrubbed(t) {
		if c.Token = ""; t != filler(len(t)) {
			c.leftover = Secret(t)
		}
	}
	if c.Token != "" {
		if _, err := mtls.ParseJoinToken(c.Token.Reveal()); err != nil {
			fault("token", "%v; copy it whole, from khj1_ to its end, in one line, as keyhaven-edge tunnel token create printed it", err)
		}
	}
	if tooMany(fault, "edges", len(c.Edges), maxEdges) {
		return
	}
	for i, e := range c.Edges {
		if _, _, err := connector.ParseEdge(e); err != nil {
			fault(fmt.Sprintf("edges[%d]", i), "%v", err)
		}
	}
}

var hostLabel = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (c *Config) completeSystem(fault faultFunc) {
	c.Hostname = Text(strings.ToLower(string(c.Hostname)))
	if h := string(c.Hostname); h != "" && !hostLabel.MatchString(h) {
		fault("hostname", "%q is no name for a computer; use letters, digits and hyphens, such as petcam, 63 at most", curtail(h))
	}
	if c.TimeZone != "" {
		if err := checkZone(zoneDir, c.TimeZone); err != nil {
			fault("timezone", "%v", err)
		}
	}
	if tooMany(fault, "ntp", len(c.NTP), maxServers) {
		return
	}
	for i, s := range c.NTP {
		if c.NTP[i] = host(s); c.NTP[i] == "" {
			fault(fmt.Sprintf("ntp[%d]", i), "%q is no time server; write its name or address, such as pool.ntp.org", curtail(s))
		}
	}
}

// host is an address, or a host name as programs take it, of plain letters; empty if s is neither.
func host(s string) string {
	if a, err := netip.ParseAddr(s); err == nil {
		if a.Zone() != "" {
			return ""
		}
		return a.String()
	}
	name, err := vnet.CanonicalHost(s)
	if err != nil || strings.HasPrefix(name, "*.") {
		return ""
	}
	return name
}

func (c *Config) completeWiFi(fault faultFunc) {
	w := &c.WiFi
	switch {
	case w.SSID != "":
		w.Networks = append([]WiFiNetwork{{SSID: w.SSID, Password: w.Password, Hidden: w.Hidden}}, w.Networks...)
		checkWiFi(fault, "wifi", w.Networks[0])
		for i, n := range w.Networks[1:] {
			checkWiFi(fault, fmt.Sprintf("wifi.networks[%d]", i), n)
		}
	case w.Password != nil || w.Hidden:
		fault("wifi", "has no ssid; add ssid: and the name of the network")
	default:
		for i, n := range w.Networks {
			checkWiFi(fault, fmt.Sprintf("wifi.networks[%d]", i), n)
		}
	}
	w.SSID, w.Password, w.Hidden = "", nil, false
	tooMany(fault, "wifi.networks", len(w.Networks), maxNetworks)
	w.Country = strings.ToUpper(w.Country)
	switch {
	case w.Country != "":
		if err := checkCountry(w.Country); err != nil {
			fault("wifi.country", "%v", err)
		}
	case len(w.Networks) > 0:
		fault("wifi", "has no country; add the two letters of the country that the device is in, such as country: DE: the law there says which channels it may use")
	}
}

var hexKey = regexp.MustCompile(`^[0-9a-fA-F]{64}$`)

// checkWiFi never tells the password.
func checkWiFi(fault faultFunc, key string, n WiFiNetwork) {
	if s := string(n.SSID); s == "" {
		fault(key, "has no ssid; add ssid: and the name of the network")
	} else if len(s) > 32 {
		fault(key+".ssid", "is longer than 32 bytes, which no network's name is")
	}
	if n.Password == nil {
		fault(key, `has no password; add password:, or, for a network that has none, password: ""`)
		return
	}
	p := n.Password.Reveal()
	odd := strings.ContainsFunc(p, func(r rune) bool { return r < ' ' || r > '~' })
	switch {
	case p == "" || hexKey.MatchString(p) && len(p) == 64:
	case odd && strings.ContainsAny(p, "“”„‘’"):
		fault(key+".password", "has curly quotes, which editors put in by themselves; write straight ones, or none")
	case odd:
		fault(key+".password", "has a character that Wi-Fi passwords cannot have; they are of the letters A to Z, a to z, digits, spaces and the signs of an English keyboard")
	case len(p) < 8 || len(p) > 63:
		fault(key+".password", "has %d characters; Wi-Fi passwords have 8 to 63", len(p))
	}
}

var interfaceName = regexp.MustCompile(`^[a-zA-Z][a-zA-Z0-9_.-]{0,14}$`)

func (n *Network) check(fault faultFunc) {
	if n.Interface != "" && !interfaceName.MatchString(n.Interface) {
		fault("network.interface", "%q is no interface; write eth0 for the cable or wlan0 for Wi-Fi, or leave it out", curtail(n.Interface))
	}
	if !tooMany(fault, "network.dns", len(n.DNS), maxServers) {
		for i, d := range n.DNS {
			if a, err := netip.ParseAddr(d); err != nil || a.Zone() != "" {
				fault(fmt.Sprintf("network.dns[%d]", i), "%q is no address; write one such as 192.168.1.1", curtail(d))
			}
		}
	}
	if n.Address == "" {
		if n.Gateway != "" {
			fault("network.gateway", "goes with an address; add address: such as 192.168.1.50/24, or remove the gateway, which DHCP tells")
		}
		return
	}
	net, ok := n.checkAddress(fault)
	gw, err := netip.ParseAddr(n.Gateway)
	switch {
	case n.Gateway == "":
		fault("network", "has an address but no gateway; add gateway: and the address of your router, such as 192.168.1.1")
	case err != nil || gw.Zone() != "":
		fault("network.gateway", "%q is no address; write your router's, such as 192.168.1.1", curtail(n.Gateway))
	case ok && gw == net.Addr():
		fault("network.gateway", "is the device's own address; write your router's")
	case ok && !net.Contains(gw) && !gw.IsLinkLocalUnicast():
		fault("network.gateway", "%s is not in the network %s of the address, so it cannot be reached; correct one of them", gw, net.Masked())
	}
	if len(n.DNS) == 0 && err == nil {
		n.DNS = []string{n.Gateway}
	}
}

// checkAddress checks the static address.
func (n *Network) checkAddress(fault faultFunc) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(n.Address)
	if err != nil {
		if a, err := netip.ParseAddr(n.Address); err == nil {
			fault("network.address", "has no length of the network; write %s/%d, if your network is like most", a, map[bool]int{true: 24, false: 64}[a.Is4()])
		} else {
			fault("network.address", "%q is no address; write one such as 192.168.1.50/24", curtail(n.Address))
		}
		return p, false
	}
	a := p.Addr()
	switch {
	case a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Is4In6():
		fault("network.address", "%s is no address for a device; write a free one of your network", a)
	case p.Bits() == 0:
		fault("network.address", "/0 is every network; most networks at home are /24")
	case a.Is4() && p.Bits() < 31 && (a == p.Masked().Addr() || a == broadcast(p)):
		fault("network.address", "%s stands for the whole network %s; write a free address in it", a, p.Masked())
	default:
		return p, true
	}
	return p, false
}

// broadcast is the last address of an IPv4 network.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(b)
}

func (c *Config) completeSSH(fault faultFunc) {
	if tooMany(fault, "ssh.keys", len(c.SSH.Keys), maxKeys) {
		return
	}
	for i, k := range c.SSH.Keys {
		c.SSH.Keys[i] = strings.TrimSpace(k)
		if err := checkSSHKey(c.SSH.Keys[i]); err != nil {
			fault(fmt.Sprintf("ssh.keys[%d]", i), "%v", err)
		}
	}
}

// ribbon finds what people write for a camera on the ribbon cable.
var ribbon = regexp.MustCompile(`(?i)^(csi|mipi|ribbon|libcamera|picamera|raspicam|rpicam|imx[0-9]|ov56)`)

func (c *Camera) settings() camera.Settings {
	return camera.Settings{Device: c.Device, Resolution: c.Resolution, FPS: c.FPS, Quality: c.Quality}
}

func (c *Camera) check(fault faultFunc) {
	name, err := vnet.CanonicalHost(c.Hostname)
	switch {
	case !strings.Contains(c.Hostname, ".") && ribbon.MatchString(c.Hostname):
		fault("camera.hostname", "%s", noRibbon)
	case c.Hostname == "":
		fault("camera", "has no hostname; add hostname: and the name under which visitors are to see it, such as cam.example.com")
	case err != nil || strings.HasPrefix(name, "*."):
		fault("camera.hostname", "%q is no host name; write the name under which visitors are to see the camera, such as cam.example.com", curtail(c.Hostname))
	}
	for _, f := range c.settings().Check() {
		if f.Field == "device" && ribbon.MatchString(strings.TrimPrefix(c.Device, "/dev/")) {
			f.Text = noRibbon
		}
		fault("camera."+f.Field, "%s", f.Text)
	}
}

const noRibbon = "cameras on the ribbon cable (CSI) do not work with this image, whose kernel is Debian's; use a USB camera, or " +
	"install Raspberry Pi OS and the package keyhaven-connector there, which serves what its camera software shows"

func orElse[T comparable](v, def T) T {
	var none T
	if v == none {
		return def
	}
	return v
}

// rules are those of the connector's ingress: the camera's first, then the published services in their order, and at the end
// one for every other name, where the last service does not take them.
func (c *Config) rules() []ingressconf.Rule {
	var rules []ingressconf.Rule
	if c.Camera != nil {
		rules = append(rules, camera.Rule(c.Camera.Hostname, c.Camera.Bandwidth))
	}
	for _, p := range c.Publish {
		rules = append(rules, ingressconf.Rule{Hostname: p.Hostname, Path: p.Path, Service: p.Service, Bandwidth: p.Bandwidth})
	}
	if n := len(rules); n > 0 && (rules[n-1].Hostname != "" && rules[n-1].Hostname != "*" || rules[n-1].Path != "") {
		rules = append(rules, ingressconf.Rule{Service: "http_status:404"})
	}
	return rules
}

// checkPublish has the ingress look at the rules, and tells its errors by the keys of this file.
func (c *Config) checkPublish(fault faultFunc) {
	if tooMany(fault, "publish", len(c.Publish), maxPublish) {
		return
	}
	_, err := ingressconf.New(c.rules(), ingressconf.Defaults())
	if err == nil {
		return
	}
	list, ok := errors.AsType[ingressconf.Errors](err)
	if !ok {
		fault("publish", "%v", err)
		return
	}
	for _, e := range list {
		if key := c.publishKey(e.Key); key != "camera.hostname" { // which the camera's own check tells
			fault(key, "%s", e.Msg)
		}
	}
}

var ingressKey = regexp.MustCompile(`^ingress\[(\d+)\]`)

// publishKey turns a key of the ingress into the one of this file.
func (c *Config) publishKey(key string) string {
	m := ingressKey.FindStringSubmatch(key)
	if m == nil {
		return "publish"
	}
	var i int
	fmt.Sscan(m[1], &i) //nolint:errcheck // it is digits
	rest := key[len(m[0]):]
	if c.Camera != nil {
		if i == 0 {
			return "camera" + rest
		}
		i--
	}
	return fmt.Sprintf("publish[%d]%s", min(i, len(c.Publish)-1), rest)
}

// checkAllow has the connector's allow-list look at the rules.
func (c *Config) checkAllow(fault faultFunc) {
	if tooMany(fault, "allow", len(c.Allow), maxAllow) {
		return
	}
	for i, a := range c.Allow {
		r := connector.Rule{To: a.To}
		good := a.To != ""
		if !good {
			fault(fmt.Sprintf("allow[%d]", i), "has no to; add to: and an address, a network such as 192.168.1.0/24, or a host name")
		}
		for j, p := range a.Ports {
			ports, err := connector.ParsePorts(fmt.Sprint(p))
			if err != nil {
				fault(fmt.Sprintf("allow[%d].ports[%d]", i, j), "%v", err)
				good = false
			}
			r.Ports = append(r.Ports, ports)
		}
		if !good {
			continue
		}
		if _, err := connector.NewAllow([]connector.Rule{r}); err != nil {
			key := fmt.Sprintf("allow[%d]", i)
			if e, ok := errors.AsType[*connector.RuleError](err); ok {
				key, err = key+"."+e.Field, e.Err
			}
			fault(key, "%v", err)
		}
	}
}

var (
	channelName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)
	hours       = regexp.MustCompile(`^([01][0-9]|2[0-3]):[0-5][0-9]-([01][0-9]|2[0-3]):[0-5][0-9]$`)
)

func (u *Update) check(fault faultFunc) {
	if u.Source != "" {
		s, err := url.Parse(u.Source)
		if err != nil || s.Scheme != "http" && s.Scheme != "https" || s.Host == "" || s.User != nil || s.RawQuery != "" || s.Fragment != "" {
			fault("update.source", "is no address of a web server's directory; write one such as https://updates.example.com/keyhaven")
		}
	}
	if u.Channel != "" && !channelName.MatchString(u.Channel) {
		fault("update.channel", "%q is no channel; write stable, or the name of another one", curtail(u.Channel))
	}
	if u.Schedule != "" && !hours.MatchString(u.Schedule) {
		fault("update.schedule", "%q is no time of the day; write from and to, such as 03:00-05:00", curtail(u.Schedule))
	}
}

// curtail shortens what is quoted.
func curtail(s string) string {
	if r := []rune(s); len(r) > 40 {
		return string(r[:40]) + "…"
	}
	return s
}

// nearestOf returns the entry of a sorted list that is most like name, or "".
func nearestOf(name string, list []string) string {
	best, dist := "", max(2, len(name)/3)+1
	for _, k := range list {
		if d := conf.Distance(strings.ToLower(name), strings.ToLower(k)); d < dist {
			best, dist = k, d
		}
	}
	return best
}
