//go:build netns

package chaos

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

// scheme is the one that every rule permits.
const scheme = "ecdsa_secp256r1_sha256"

func clientID(edge int) string { return fmt.Sprintf("spiffe://%s/edge/edge%d", lab.KeyDomain, edge+1) }

// A policy is which edge may have which host's key used, for that name alone.
type policy map[grant]bool

type grant struct{ client, host string }

// everything permits all that the visitors need.
func everything() policy {
	p := policy{}
	for e := range 2 {
		for _, h := range hosts {
			p[grant{clientID(e), h}] = true
		}
	}
	return p
}

// rules writes the policy as the key server reads it.
func (p policy) rules() (rules []obj) {
	for e := range 2 {
		for _, h := range hosts {
			if p[grant{clientID(e), h}] {
				rules = append(rules, obj{"id": clientID(e), "keys": []string{h}, "operations": []string{"tls-sign"}, "schemes": []string{scheme}, "snis": []string{h}})
			}
		}
		rules = append(rules, obj{"id": clientID(e), "operations": []string{"renew"}})
	}
	return rules
}

// A timeline knows which policies each key server may have had at a time.
type timeline struct {
	mu      sync.Mutex // guards servers
	servers [][]*change
}

// A change may be in force from written on, and is from confirmed on, until the next one.
type change struct {
	policy             policy
	written, confirmed time.Time
}

func (l *timeline) init(servers int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for range servers {
		l.servers = append(l.servers, []*change{{policy: everything()}})
	}
}

func (l *timeline) begin(server int, p policy) *change {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &change{policy: p, written: time.Now()}
	l.servers[server] = append(l.servers[server], c)
	return c
}

func (l *timeline) confirm(c *change) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c.confirmed = time.Now()
}

// permitted reports whether a policy that may have been in force at some time between from and to has the grant.
func (l *timeline) permitted(server int, g grant, from, to time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	changes := l.servers[server]
	for i := len(changes) - 1; i >= 0; i-- {
		c := changes[i]
		if c.written.After(to) {
			continue
		}
		if c.policy[g] {
			return true
		}
		if !c.confirmed.IsZero() && c.confirmed.Before(from) {
			return false // nothing older was in force
		}
	}
	return false
}

// enforce gives a key server a policy. It is confirmed when the server says so.
func (w *world) enforce(ctx context.Context, server int, p policy) error {
	k := w.KeyServers[server]
	file := k.Proc.Name() + ".yaml"
	c := w.policies.begin(server, p)
	if err := w.rewrite(file, func(cfg obj) { cfg["clients"] = p.rules() }); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := w.Tool(ctx, "keyhaven-keyserver", "reload", "--config", w.Path(file)); err != nil {
		return err
	}
	w.policies.confirm(c)
	return nil
}

// A record is what the audit log keeps of an operation.
type record struct {
	Kind, Client, Op, Scheme, Label, Result, Reason string
	Time                                            time.Time
	Dur                                             time.Duration
	SNI                                             string `json:"asserted_sni"`
}

// audit verifies the logs of all key servers, and each use of a key against the policies that may have been in force.
func (w *world) audit(t *testing.T) {
	t.Helper()
	for i, k := range w.KeyServers {
		out, err := w.Tool(context.Background(), "keyhaven-keyserver", "audit", "verify", "--dir", k.AuditDir, "--public-key", w.Path("audit.pub"))
		if err != nil {
			t.Errorf("%s: audit verify: %v\n%s", k.Name, err, out)
		}
		files, err := filepath.Glob(filepath.Join(k.AuditDir, "audit-*.jsonl"))
		check(t, err)
		signed, refused := 0, 0
		for _, file := range files {
			b, err := os.ReadFile(file)
			check(t, err)
			for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
				var r record
				if json.Unmarshal(sc.Bytes(), &r) != nil || r.Kind != "op" {
					continue // a torn line; verify has judged it
				}
				switch {
				case r.Result == "refused":
					refused++
				case r.Op == "renew":
				case r.Op != "tls-sign" || r.Scheme != scheme || r.SNI != r.Label:
					t.Errorf("%s: a key was used outside of every policy: %s", k.Name, sc.Text())
				case !w.policies.permitted(i, grant{r.Client, r.SNI}, r.Time, r.Time.Add(r.Dur)):
					t.Errorf("%s: a key was used outside of the policy in force: %s", k.Name, sc.Text())
				default:
					signed++
				}
			}
		}
		t.Logf("%s: %d log files, %d signatures within policy, %d requests refused", k.Name, len(files), signed, refused)
		if signed == 0 || refused == 0 {
			t.Errorf("%s: %d signatures, %d refusals: the test proves nothing", k.Name, signed, refused)
		}
	}
}

// A forbidden request, which a key server must refuse.
type forbidden struct {
	name string
	ask  func(ctx context.Context, c *keyless.Client, w *world) ([]byte, error)
}

func forbiddens() []forbidden {
	return []forbidden{
		{name: "another name", ask: tlsSign(hostA, hostB, tls.ECDSAWithP256AndSHA256)},
		{name: "no name", ask: tlsSign(hostA, "", tls.ECDSAWithP256AndSHA256)},
		{name: "a key without a rule", ask: tlsSign(hostForbidden, hostForbidden, tls.ECDSAWithP256AndSHA256)},
		{name: "a key without a rule, for a name with one", ask: tlsSign(hostForbidden, hostA, tls.ECDSAWithP256AndSHA256)},
		{name: "another scheme", ask: tlsSign(hostA, hostA, tls.ECDSAWithP384AndSHA384)},
		{name: "any digest", ask: func(ctx context.Context, c *keyless.Client, w *world) ([]byte, error) {
			ski, err := w.ski(hostA)
			if err != nil {
				return nil, err
			}
			return c.Do(ctx, &keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, SNI: hostA, Payload: make([]byte, 32)})
		}},
	}
}

// tlsSign asks for a handshake's signature.
func tlsSign(key, sni string, sch tls.SignatureScheme) func(context.Context, *keyless.Client, *world) ([]byte, error) {
	return func(ctx context.Context, c *keyless.Client, w *world) ([]byte, error) {
		ski, err := w.ski(key)
		if err != nil {
			return nil, err
		}
		msg := append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...)
		msg = append(msg, make([]byte, crypto.SHA256.Size())...)
		return c.Do(ctx, &keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, SNI: sni,
			Payload: keyless.AppendTLSSign(nil, sch, msg)})
	}
}

func (w *world) ski(host string) (keyless.SKI, error) {
	b, err := os.ReadFile(w.Chain(host))
	if err != nil {
		return keyless.SKI{}, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return keyless.SKI{}, fmt.Errorf("no certificate of %s", host)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return keyless.SKI{}, err
	}
	return keyless.SKIOf(cert.PublicKey)
}

// forge asks a key server for what it must refuse, from inside its site. It reports whether the server itself refused;
// one that cannot be reached says nothing.
func (w *world) forge(ctx context.Context, server int, f forbidden) (refused bool) {
	cfg, err := w.keyClient(server, "edge-client")
	if err != nil {
		w.violate("%v", err)
		return false
	}
	c, err := keyless.NewClient(keyless.ClientConfig{Servers: []string{w.KeyServers[server].Listen}, ConnsPerServer: 1,
		Dial: w.sites["sitea"].Dial, TLS: func(string) *tls.Config { return cfg }})
	if err != nil {
		w.violate("%v", err)
		return false
	}
	defer c.Close()
	reply, err := f.ask(ctx, c, w)
	if err == nil {
		w.violate("%s signed what is forbidden (%s): %x", w.KeyServers[server].Name, f.name, reply)
	}
	_, refused = errors.AsType[*keyless.Error](err)
	return refused
}

// keyClient is the configuration of a client of a key server, with the identity in a directory of the lab.
func (w *world) keyClient(server int, dir string) (*tls.Config, error) {
	src, err := mtls.OpenDir(w.Path(dir), nil)
	if err != nil {
		return nil, err
	}
	id, err := mtls.ParseIdentity("spiffe://" + lab.KeyDomain + "/keyserver/" + w.KeyServers[server].Name)
	if err != nil {
		return nil, err
	}
	return src.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptIdentities(id)}), nil
}

// estrange comes to a key server with an identity of the other authority. It is an error if the server does not refuse.
func (w *world) estrange(ctx context.Context, server int) error {
	cfg, err := w.keyClient(server, "edge-identity")
	if err != nil {
		return err
	}
	raw, err := w.sites["sitea"].Dial(ctx, w.KeyServers[server].Listen)
	if err != nil {
		return err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	c := tls.Client(raw, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: cfg.NextProtos, GetClientCertificate: cfg.GetClientCertificate})
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	n, err := c.Read(make([]byte, 1))
	if n > 0 {
		w.violate("%s talks to an identity of the other authority", w.KeyServers[server].Name)
	}
	if alert, ok := errors.AsType[*net.OpError](err); !ok || !strings.Contains(alert.Error(), "tls: ") {
		return fmt.Errorf("want the refusal of a certificate, got %w", err)
	}
	return nil
}

// forgeAll asks a healthy key server for everything that is forbidden.
func (w *world) forgeAll(ctx context.Context, rng *rand.Rand) error {
	server := rng.IntN(len(w.KeyServers))
	for _, f := range forbiddens() {
		if !w.forge(ctx, server, f) {
			return fmt.Errorf("%s did not refuse %q by itself", w.KeyServers[server].Name, f.name)
		}
	}
	return w.estrange(ctx, server)
}
