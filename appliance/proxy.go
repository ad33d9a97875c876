package appliance

import (
	"net/url"
	"path/filepath"
	"strings"

	"github.com/keyhaven/keyhaven/tunnel"
)

// proxyPasswordFile in runDir is the connector's, and nobody else's.
const proxyPasswordFile = "proxy-password"

// maxProxyText bounds user and password of a proxy, in bytes.
const maxProxyText = 255

// Proxy is the HTTP proxy by which a network lets its machines out. What is published is not reached through it. The zero value
// is none.
type Proxy struct {
	URL      string `mapstructure:"url"` // http://host:port or https://host:port
	User     Text   `mapstructure:"user"`
	Password Secret `mapstructure:"password"`
}

// ShortForm makes "proxy: http://192.168.1.5:3128" mean its URL.
func (Proxy) ShortForm() string { return "url" }

// check never tells the password.
func (p *Proxy) check(fault faultFunc) {
	if p.URL == "" {
		if *p != (Proxy{}) {
			fault("proxy", "has no url; add url: and the proxy's address, such as http://192.168.1.5:3128")
		}
		return
	}
	u, err := url.Parse(p.URL)
	switch {
	case err == nil && u.User != nil:
		fault("proxy.url", "holds a user or a password; write them beside url:, as user: and password:")
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		fault("proxy.url", "is no address of a proxy; write one such as http://192.168.1.5:3128")
	case (&tunnel.ProxyConfig{URL: p.URL}).Validate() != nil: // which looks at the port as well
		fault("proxy.url", "has the port %s, and ports are from 1 to 65535; most proxies have 3128 or 8080", u.Port())
	}
	if (p.User == "") != (p.Password == "") {
		fault("proxy", "needs both user and password, or neither")
	}
	for _, f := range []struct{ key, value string }{{"user", string(p.User)}, {"password", p.Password.Reveal()}} {
		if len(f.value) > maxProxyText || strings.ContainsFunc(f.value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			fault("proxy."+f.key, "is longer than %d bytes, or has a line break or another character that nobody can type", maxProxyText)
		}
	}
	if strings.Contains(string(p.User), ":") {
		fault("proxy.user", "has a colon, which the users of a proxy cannot have")
	}
}

// Address is the proxy with user and password for [net/http.ProxyURL]; nil if there is none.
func (p Proxy) Address() *url.URL {
	u, err := url.Parse(p.URL)
	if p.URL == "" || err != nil {
		return nil
	}
	if p.User != "" {
		u.User = url.UserPassword(string(p.User), p.Password.Reveal())
	}
	return u
}

// proxyPart is the proxy as the connector's file has it.
type proxyPart struct {
	URL          string `yaml:"url"`
	User         string `yaml:"user,omitempty"`
	PasswordFile string `yaml:"password_file,omitempty"`
}

// part is what programs are told; nil if there is no proxy.
func (p Proxy) part() *proxyPart {
	if p.URL == "" {
		return nil
	}
	part := &proxyPart{URL: p.URL, User: string(p.User)}
	if p.User != "" {
		part.PasswordFile = filepath.Join(runDir, proxyPasswordFile)
	}
	return part
}

// applyProxy writes the password for the connector, before its configuration names the file.
func (r *runner) applyProxy() error {
	file := r.Host.path(runDir, proxyPasswordFile)
	password := r.config.Proxy.Password.Reveal()
	if password == "" {
		_, err := remove(file)
		return err
	}
	if _, err := update(file, []byte(password+"\n"), 0o600); err != nil {
		return err
	}
	return r.Host.chown(connectorUser, file)
}

// via is the proxy for joining; nil if there is none.
func (r *runner) via() *tunnel.ProxyConfig {
	r.mu.Lock()
	defer r.mu.Unlock()
	part := r.proxy.part()
	if part == nil {
		return nil
	}
	via := &tunnel.ProxyConfig{URL: part.URL, User: part.User}
	if part.PasswordFile != "" {
		via.PasswordFile = r.Host.path(part.PasswordFile)
	}
	return via
}
