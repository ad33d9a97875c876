package appliance

import (
	"fmt"
	"log/slog"
	"strings"
)

// MaxConfig bounds keyhaven.yaml and the files of the Raspberry Pi Imager, in bytes.
const MaxConfig = 64 << 10

// ConfigNames are the names under which the file is looked for on the card, the best first: editors of some systems
// add an ending of their own.
var ConfigNames = []string{"keyhaven.yaml", "keyhaven.yml", "keyhaven.yaml.txt", "keyhaven.txt"}

// A Config is what keyhaven.yaml says, checked and completed. The zero value is that of an empty file: a connector without a
// token, addresses by DHCP, and no camera, SSH or service.
type Config struct {
	Token    Secret    `mapstructure:"token"`    // join token; empty: none, or it was taken from the card
	Edges    []string  `mapstructure:"edges"`    // host:port; empty: those that the token and the edges name
	Hostname Text      `mapstructure:"hostname"` // empty: keyhaven
	TimeZone string    `mapstructure:"timezone"` // such as Europe/Berlin; empty: UTC
	WiFi     WiFi      `mapstructure:"wifi"`
	Network  Network   `mapstructure:"network"`
	NTP      []string  `mapstructure:"ntp"`   // time servers; empty: the system's
	Proxy    Proxy     `mapstructure:"proxy"` // by which edges and the update source are reached
	SSH      SSH       `mapstructure:"ssh"`
	Camera   *Camera   `mapstructure:"camera"` // nil: none
	Publish  []Publish `mapstructure:"publish"`
	Allow    []Allow   `mapstructure:"allow"` // what routes of the edge may reach
	Update   Update    `mapstructure:"update"`

	leftover Secret // in place of the token: one that was taken off the card in part, and is to be taken off wholly
}

// WiFi is the wireless network. Without networks there is none.
type WiFi struct {
	Country  string        `mapstructure:"country"` // two letters, ISO 3166-1
	Networks []WiFiNetwork `mapstructure:"networks"`

	// A single network can be written without the list; Parse moves it there.
	SSID     Text    `mapstructure:"ssid"`
	Password *Secret `mapstructure:"password"`
	Hidden   bool    `mapstructure:"hidden"`
}

// A WiFiNetwork is one network that may be joined.
type WiFiNetwork struct {
	SSID     Text    `mapstructure:"ssid"`
	Password *Secret `mapstructure:"password"` // never nil after Parse; empty: the network is open
	Hidden   bool    `mapstructure:"hidden"`
}

// Network is the address. The zero value is DHCP on every interface.
type Network struct {
	Address   string   `mapstructure:"address"` // with prefix length, such as 192.168.1.50/24
	Gateway   string   `mapstructure:"gateway"`
	DNS       []string `mapstructure:"dns"`
	Interface string   `mapstructure:"interface"` // empty: Wi-Fi if it is set up, else the cable
}

// SSH lets people log in as root with one of the keys. Without keys no SSH server runs.
type SSH struct {
	Keys []string `mapstructure:"keys"` // lines as in authorized_keys
}

// Camera serves a USB camera on the machine's loopback and publishes it.
type Camera struct {
	Hostname   string `mapstructure:"hostname"`   // under which visitors see it
	Device     string `mapstructure:"device"`     // "auto" or /dev/videoN; empty: auto
	Resolution string `mapstructure:"resolution"` // such as 1280x720; empty: that
	FPS        int    `mapstructure:"fps"`        // frames a second; 0: 10
	Quality    int    `mapstructure:"quality"`    // of the JPEG, 1 to 100; 0: 80
	Bandwidth  string `mapstructure:"bandwidth"`  // to all visitors together; empty: no limit
	Test       bool   `mapstructure:"test"`       // a picture made by the kernel in place of a camera's
}

// ShortForm makes "camera: cam.example.com" mean its host name.
func (Camera) ShortForm() string { return "hostname" }

// Publish is a service that the connector publishes, a rule of its ingress.
type Publish struct {
	Hostname  string `mapstructure:"hostname"`
	Path      string `mapstructure:"path"`
	Service   string `mapstructure:"service"`
	Bandwidth string `mapstructure:"bandwidth"` // empty: no limit
}

// Allow is a rule of the connector's allow-list.
type Allow struct {
	To    string `mapstructure:"to"`
	Ports []any  `mapstructure:"ports"`
}

// Update says where new versions come from and when they are taken.
type Update struct {
	Source    string `mapstructure:"source"`    // base URL; empty: the one that the image was built with, if any
	Channel   string `mapstructure:"channel"`   // empty: stable
	Schedule  string `mapstructure:"schedule"`  // hours of the day, local time, such as 03:00-05:00; empty: always
	Automatic *bool  `mapstructure:"automatic"` // nil: true
}

// Text is a string that may look like a number or another kind of YAML value.
type Text string

// UnmarshalText implements encoding.TextUnmarshaler.
func (t *Text) UnmarshalText(b []byte) error { *t = Text(b); return nil }

// Secret is a string that prints as nothing but its being there.
type Secret string

const redacted = "(secret)"

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *Secret) UnmarshalText(b []byte) error { *s = Secret(b); return nil }

// Reveal returns the secret itself.
func (s Secret) Reveal() string { return string(s) }

// String implements fmt.Stringer and hides the secret.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// GoString is String.
func (s Secret) GoString() string { return s.String() }

// Format implements fmt.Formatter for every verb.
func (s Secret) Format(f fmt.State, _ rune) { fmt.Fprint(f, s.String()) }

// LogValue is String.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText is String.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// Parse reads keyhaven.yaml, or the user-data or network-config that the Raspberry Pi Imager writes, told apart by name: a
// path whose base is one of those is taken as such. Everything that is wrong is reported at once, as conf.Errors whose entries
// are [*conf.Error]: the line, what is wrong and what to do, with no secret in it.
func Parse(name string, b []byte) (*Config, error) {
	switch base(name) {
	case UserData:
		return parseUserData(name, b)
	case NetworkConfig:
		return parseNetworkConfig(name, b)
	}
	return parseOwn(name, b)
}

// base is the last element of a path of any system.
func base(name string) string { return name[strings.LastIndexAny(name, `/\`)+1:] }
