package appliance

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// Joining, the connector and the updater are told of the proxy; its password is the connector's alone and shown nowhere, and gone
// with the proxy.
func TestProxy(t *testing.T) {
	t.Parallel()
	const canary = "CANARYpw12"
	with := "token: " + testToken(t).Reveal() + "\nproxy: {url: \"http://proxy.example.com:3128\", user: me, password: " + canary + "}\n"
	m := newMachine(t, map[string]string{"keyhaven.yaml": with})
	m.connect(t, true)
	joined, asked := make(chan *tunnel.ProxyConfig, 1), make(chan UpdateHooks, 8)
	updates := func(h UpdateHooks) (Updater, error) {
		asked <- h
		return &fakeUpdater{fleet.Report{Version: "1.2.3"}}, nil
	}
	a := m.agent(func(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string, via *tunnel.ProxyConfig) error {
		joined <- via
		return joinsAt(ctx, token, keyFile, dir, name, via)
	})
	a.Updates = updates
	m.run(t, a, func() bool {
		return m.exists(identityDir+"/cert.pem") && m.exists(cardDir+"/keyhaven-status.txt") && len(asked) > 0
	})
	file := m.path(runDir, proxyPasswordFile)
	if via := <-joined; via == nil || *via != (tunnel.ProxyConfig{URL: "http://proxy.example.com:3128", User: "me", PasswordFile: file}) {
		t.Errorf("joined by %+v", via)
	}
	if u := (<-asked).Proxy; u == nil || u.String() != "http://me:"+canary+"@proxy.example.com:3128" {
		t.Errorf("updates by %v", u.Redacted())
	}
	if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 || m.read(t, runDir+"/"+proxyPasswordFile) != canary+"\n" {
		t.Errorf("the password: %v, %v", st, err)
	}
	yaml := m.read(t, runDir+"/connector.yaml")
	for _, want := range []string{"url: http://proxy.example.com:3128", "user: me", "password_file: " + runDir + "/" + proxyPasswordFile} {
		if !strings.Contains(yaml, want) {
			t.Errorf("the connector's file lacks %q:\n%s", want, yaml)
		}
	}
	if all := yaml + m.status() + m.log.String() + m.read(t, cardDir+"/keyhaven-status.txt") + fmt.Sprint(m.commands); strings.Contains(all, canary) {
		t.Errorf("the password is in %s", all)
	}

	m.write(t, cardDir+"/keyhaven.yaml", "hostname: a\n")
	a = m.agent(nil)
	a.Updates = updates
	m.run(t, a, func() bool { return len(asked) > 0 })
	if h := <-asked; h.Proxy != nil || m.exists(runDir+"/"+proxyPasswordFile) || strings.Contains(m.read(t, runDir+"/connector.yaml"), "proxy") {
		t.Errorf("the proxy is still there: %v", h.Proxy)
	}
}

// A proxy that does not let a device out is named as what is in the way.
func TestProxyTrouble(t *testing.T) {
	t.Parallel()
	err := errors.Join(errors.New("QUIC: no answer"), fmt.Errorf("%w 192.0.2.1:3128: it does not accept the user (407)", tunnel.ErrProxy))
	got := joinTrouble(err, time.Now())
	if got.state != StateJoining || !strings.Contains(got.text, "The proxy does not let it out") || !strings.Contains(got.text, "407") || !strings.Contains(got.todo, "proxy: in keyhaven.yaml") {
		t.Errorf("%+v", got)
	}
}
