package edge

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// twoKeys is a world whose zone a has an ECDSA and then an RSA certificate.
func twoKeys(t *testing.T) (w *world, ec keyless.SKI) {
	w = newWorld(t)
	w.addZone("a", "rsa2048", echoOrigin(t), "a.test")
	file, ec := w.addKey("a-ec", "p256", 90*24*time.Hour, "a.test")
	z := &w.cfg.Zones[0]
	z.Certificates, z.Certificate = []string{file, z.Certificate}, ""
	return w, ec
}

func TestVisitorsGetTheCertificateThatFits(t *testing.T) {
	w, _ := twoKeys(t)
	w.start()
	for _, tt := range []struct{ name, want, args string }{
		{"anything, TLS 1.3", "Peer signature type: ECDSA", "-tls1_3"},
		{"anything, TLS 1.2", "Peer signature type: ECDSA", "-tls1_2"},
		{"RSA only, TLS 1.3", "Peer signature type: RSA-PSS", "-tls1_3 -sigalgs rsa_pss_rsae_sha256"},
		{"RSA only, TLS 1.2", "Peer signature type: RSA", "-tls1_2 -sigalgs RSA+SHA256"},
	} {
		out, err := w.sClient(append([]string{"-servername", "a.test"}, strings.Fields(tt.args)...)...)
		if err != nil || !strings.Contains(out, tt.want) {
			t.Errorf("%s: %v, want %q in\n%s", tt.name, err, tt.want, out)
		}
	}
}

func TestCertificateWhoseKeyIsGoneIsPassedOver(t *testing.T) {
	w, ec := twoKeys(t)
	w.start()
	w.vault.drop(ec)
	out, err := w.sClient("-servername", "a.test")
	if err == nil {
		t.Fatalf("a handshake with a key that is gone:\n%s", out)
	}
	out, err = w.sClient("-servername", "a.test")
	if err != nil || !strings.Contains(out, "Peer signature type: RSA-PSS") {
		t.Errorf("the next handshake: %v, want the other certificate\n%s", err, out)
	}
}

func TestCertificateOutOfForceIsPassedOver(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "rsa2048", echoOrigin(t), "a.test")
	file, _ := w.addKey("a-old", "p256", time.Minute, "a.test")
	z := &w.cfg.Zones[0]
	z.Certificates, z.Certificate = []string{file, z.Certificate}, ""
	w.start()
	if out, err := w.sClient("-servername", "a.test"); err != nil || !strings.Contains(out, "Peer signature type: RSA-PSS") {
		t.Errorf("%v, want the certificate that is in force\n%s", err, out)
	}
}

// A session lives as long as the key of its full handshake, however often it was resumed under another certificate.
func TestTicketsFollowTheirKeyThroughARotation(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	fresh, _ := w.addKey("a-new", "p256", 90*24*time.Hour, "a.test")
	w.start()
	old := w.cfg.Zones[0].Certificate
	use := func(files ...string) {
		t.Helper()
		w.cfg.Zones[0].Certificate, w.cfg.Zones[0].Certificates = "", files
		must(t, w.server.Reload(w.cfg))
	}
	for _, v := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		use(old)
		cfg := w.tlsConfig("a.test")
		cfg.MinVersion, cfg.MaxVersion, cfg.ClientSessionCache = v, v, tls.NewLRUClientSessionCache(1)
		visit := func() bool {
			dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "tcp", w.addr())
			}
			c := &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DialContext: dial, DisableKeepAlives: true}}
			return resumes(t, c, "a.test")
		}
		if visit() {
			t.Fatalf("%s: the first visit resumed", tls.VersionName(v))
		}
		use(fresh, old)
		for range 3 { // each brings a ticket that replaces the one before
			if !visit() {
				t.Fatalf("%s: a session of the old key did not resume while both are in use", tls.VersionName(v))
			}
		}
		use(fresh)
		if visit() {
			t.Errorf("%s: a session of a key that is gone resumed", tls.VersionName(v))
		}
		if !visit() {
			t.Errorf("%s: a session of the new key did not resume", tls.VersionName(v))
		}
	}
}

func TestFaultsOfCertificateLists(t *testing.T) {
	w, _ := twoKeys(t)
	good := w.cfg.Zones[0].Certificates
	for _, tt := range []struct {
		name, key, want string
		change          func(*Config)
	}{
		{"both", "zones[0].certificate", "beside certificates", func(c *Config) { c.Zones[0].Certificate = good[0] }},
		{"twice", "zones[0].certificates[1]", "is the file of certificates[0]", func(c *Config) { c.Zones[0].Certificates = []string{good[0], good[0]} }},
		{"missing", "zones[0].certificates[1]", "no such file", func(c *Config) { c.Zones[0].Certificates = []string{good[0], "/nonexistent.pem"} }},
		{"empty", "zones[0].certificates[0]", "no file", func(c *Config) { c.Zones[0].Certificates = []string{""} }},
		{"none", "zones[0].certificate", "no file", func(c *Config) { c.Zones[0].Certificates = nil }},
	} {
		w.cfg.Zones[0].Certificate, w.cfg.Zones[0].Certificates = "", good
		tt.change(&w.cfg)
		found := false
		w.cfg.Validate(func(key, format string, args ...any) {
			found = found || key == tt.key && strings.Contains(fmt.Sprintf(format, args...), tt.want)
		})
		if !found {
			t.Errorf("%s: no fault at %s with %q", tt.name, tt.key, tt.want)
		}
	}
}
