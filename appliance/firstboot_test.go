package appliance

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// An onceEdge enrols each token for one key, as often as it is asked.
type onceEdge struct{ used map[string]string }

func (e *onceEdge) join(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string, via *tunnel.ProxyConfig) error {
	key, err := os.ReadFile(keyFile)
	if errors.Is(err, os.ErrNotExist) {
		key = fmt.Appendf(nil, "key %d", len(e.used))
		err = writeFile(keyFile, key, 0o600)
	}
	if err != nil {
		return err
	}
	if by, used := e.used[token.ID]; used && by != string(key) {
		return fmt.Errorf("join: %w", tunnel.ErrTokenUsed)
	}
	e.used[token.ID] = string(key)
	return joinsAt(ctx, token, keyFile, dir, name, via)
}

// Wherever the power goes in a first boot, the next start ends with an identity, and without a token on the card.
func TestFirstBootCutAnywhere(t *testing.T) {
	t.Parallel()
	token := testToken(t)
	text := token.Reveal()
	enrolled := func(e *onceEdge) { e.used[token.ID] = "key 0" }
	pending := func(m *machine, t *testing.T) {
		t.Helper()
		if err := writeFile(m.path(configDir, "token"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	key := func(m *machine, t *testing.T) {
		t.Helper()
		pending(m, t)
		if err := writeFile(m.path(configDir, "join-"+token.ID+".pem"), []byte("key 0"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	identity := func(m *machine, t *testing.T, dir string, files ...string) {
		t.Helper()
		for _, f := range files {
			if err := writeFile(m.path(dir, f), []byte(f), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	whole := []string{"key.pem", "cert.pem", "ca.pem", "join.json"}
	cuts := map[string]func(m *machine, e *onceEdge, t *testing.T){
		"before all":       func(*machine, *onceEdge, *testing.T) {},
		"a temporary file": func(m *machine, _ *onceEdge, t *testing.T) { identity(m, t, configDir, ".keyhaven-123") },
		"token kept":       func(m *machine, _ *onceEdge, t *testing.T) { pending(m, t) },
		"key made":         func(m *machine, _ *onceEdge, t *testing.T) { key(m, t) },
		"answer lost":      func(m *machine, e *onceEdge, t *testing.T) { key(m, t); enrolled(e) },
		"half an identity": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, newIdentity, "key.pem")
		},
		"identity not in place": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, newIdentity, whole...)
		},
		"identity ready": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, readyIdentity, whole...)
		},
		"ready, no old": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, readyIdentity, whole...)
			os.RemoveAll(m.path(identityDir))
		},
		"identity in place": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, identityDir, whole...)
		},
		"noted": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			enrolled(e)
			identity(m, t, identityDir, whole...)
			note(m, t, token.ID)
		},
		"token gone, key there": func(m *machine, e *onceEdge, t *testing.T) {
			key(m, t)
			os.Remove(m.path(configDir, "token"))
			enrolled(e)
			identity(m, t, identityDir, whole...)
			note(m, t, token.ID)
		},
		"done, token on the card": func(m *machine, e *onceEdge, t *testing.T) {
			enrolled(e)
			identity(m, t, identityDir, whole...)
			note(m, t, token.ID)
		},
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, map[string]string{"keyhaven.yaml": "hostname: petcam\ntoken: " + text + "\n", "keyhaven.yaml~": "token: " + text})
			e := &onceEdge{map[string]string{}}
			cut(m, e, t)
			m.settles(t, e)
		})
	}
	// The card, cut within the overwriting: whatever of it has reached the card.
	full := "hostname: petcam\ntoken: " + text + "\n"
	for n := 0; n <= len(text); n += 29 {
		for _, early := range []bool{true, false} {
			part := filler(len(text))[:n] + text[n:]
			if early {
				part = text[:n] + filler(len(text))[n:]
			}
			t.Run(fmt.Sprintf("overwriting %d %v", n, early), func(t *testing.T) {
				t.Parallel()
				m := newMachine(t, map[string]string{"keyhaven.yaml": strings.Replace(full, text, part, 1)})
				pending(m, t)
				m.settles(t, &onceEdge{map[string]string{}})
			})
		}
	}
}

func note(m *machine, t *testing.T, id string) {
	t.Helper()
	h := m.host()
	if err := (enroller{&h}).note(enrolment{TokenID: id, State: enrolJoined}); err != nil {
		t.Fatal(err)
	}
}

// settles runs the agent until it has an identity and nothing is left of the token.
func (m *machine) settles(t *testing.T, e *onceEdge) {
	t.Helper()
	gone := func() bool {
		left, _ := filepath.Glob(m.path(configDir, "join-*.pem"))
		return m.exists(identityDir+"/cert.pem") && m.exists(identityDir+"/join.json") && !m.exists(configDir+"/token") && !m.exists(readyIdentity) && len(left) <= 1
	}
	m.run(t, m.agent(e.join), gone)
	for _, f := range []string{"keyhaven.yaml", "keyhaven.yaml~"} {
		if b, err := os.ReadFile(m.path(cardDir, f)); err == nil && tokenText.Match(b) {
			t.Errorf("%s on the card holds\n%s", f, b)
		}
	}
	if got := m.read(t, identityDir+"/key.pem"); got != "key.pem" {
		t.Errorf("the identity's key is %q", got)
	}
}

// A token that was refused is told, and a new one is taken at once; the old one that is still on the card is not.
func TestTokenRefused(t *testing.T) {
	t.Parallel()
	old, fresh := testToken(t), testToken(t)
	m := newMachine(t, map[string]string{"keyhaven.yaml": "token: " + old.Reveal() + "\n"})
	e := &onceEdge{map[string]string{old.ID: "of another device"}}
	m.run(t, m.agent(e.join), func() bool { return strings.Contains(m.status(), string(StateRefused)) })
	for _, want := range []string{"was used before", "tunnel token create"} {
		if !strings.Contains(m.status(), want) {
			t.Errorf("the status has no %q:\n%s", want, m.status())
		}
	}
	m.write(t, cardDir+"/keyhaven.yaml", "token: "+fresh.Reveal()+"\n")
	m.settles(t, e)
}

// A new token on a device that has an identity gives it a new one. Until then, and if it is refused, the old one stays.
func TestTokenRenewed(t *testing.T) {
	t.Parallel()
	first, refused, second := testToken(t), testToken(t), testToken(t)
	m := newMachine(t, map[string]string{"keyhaven.yaml": "token: " + first.Reveal() + "\n"})
	e := &onceEdge{map[string]string{refused.ID: "of another device"}}
	m.settles(t, e)
	m.write(t, identityDir+"/cert.pem", "the first")
	m.connect(t, true)
	m.write(t, cardDir+"/keyhaven.yaml", "token: "+refused.Reveal()+"\n")
	m.run(t, m.agent(e.join), func() bool { return strings.Contains(m.status(), "The last join token was refused") })
	if got := m.read(t, identityDir+"/cert.pem"); got != "the first" {
		t.Errorf("after a refusal the identity is %q", got)
	}
	if !strings.Contains(m.status(), `"state": "connected"`) {
		t.Errorf("a refused token hides that the device is connected:\n%s", m.status())
	}
	m.write(t, cardDir+"/keyhaven.yaml", "token: "+second.Reveal()+"\n")
	m.run(t, m.agent(e.join), func() bool {
		b, err := os.ReadFile(m.path(identityDir, "cert.pem")) // it is away while the new one takes its place
		return err == nil && string(b) == "cert.pem"
	})
}

func TestJoinTrouble(t *testing.T) {
	now := time.Date(1970, 1, 1, 0, 1, 0, 0, time.UTC)
	for _, tt := range []struct {
		err   error
		state State
		want  string
	}{
		{fmt.Errorf("a: %w", x509.CertificateInvalidError{Reason: x509.Expired}), StateJoining, "The clock says 1 January 1970"},
		{errors.New("CRYPTO_ERROR: x509: certificate has expired or is not yet valid: current time"), StateJoining, "Waiting for a time server"},
		{fmt.Errorf("a: %w", mtls.ErrRefused), StateJoining, "another installation"},
		{fmt.Errorf("a: %w", &net.DNSError{Name: "edge.example.com", IsNotFound: true}), StateJoining, "edge.example.com does not exist"},
		{fmt.Errorf("a: %w", &net.DNSError{Name: "edge.example.com", IsTimeout: true}), StateNoNetwork, "(DNS) does not answer"},
		{fmt.Errorf("a: %w", syscall.ENETUNREACH), StateNoNetwork, "leads nowhere"},
		{fmt.Errorf("a: %w", tunnel.ErrNoAnswer), StateJoining, "does not answer"},
		{fmt.Errorf("a: %w", tunnel.ErrBusy), StateJoining, "busy"},
		{fmt.Errorf("a: %w", syscall.ENOSPC), StateJoining, "cannot be written"},
		{fmt.Errorf("odd: khj1_%s", strings.Repeat("a", 500)), StateJoining, "Joining fails: odd: khj1_…"},
	} {
		got := joinTrouble(tt.err, now)
		if got.state != tt.state || !strings.Contains(got.text, tt.want) || got.todo == "" {
			t.Errorf("%v: %+v, want %s %q", tt.err, got, tt.state, tt.want)
		}
	}
}

// Joining goes on for ever, through every failure.
func TestJoinGoesOn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, map[string]string{"keyhaven.yaml": "token: " + testToken(t).Reveal() + "\n"})
	e, tries := &onceEdge{map[string]string{}}, 0
	m.run(t, m.agent(func(ctx context.Context, token mtls.JoinToken, keyFile, dir, name string, via *tunnel.ProxyConfig) error {
		if tries++; tries == 1 {
			return fmt.Errorf("join: %w", tunnel.ErrNoAnswer)
		}
		return e.join(ctx, token, keyFile, dir, name, via)
	}), func() bool { return m.exists(identityDir + "/cert.pem") })
	if !strings.Contains(m.log.String(), "joining failed") {
		t.Error("the failure is not in the log")
	}
}
