//go:build netns && browser

package integration

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// A real browser gets the page over HTTP/2 and, told to, over HTTP/3, with keys of both common types in the token.
func TestBrowser(t *testing.T) {
	zones := []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: "rsa.keyhaven.test", KeyType: "rsa2048"}}
	w := up(t, zones, (*world).siteA)
	for _, z := range zones {
		for _, v := range []struct{ protocol, flag string }{{"h2", "--disable-quic"}, {"h3", "--origin-to-force-quic-on=" + z.Host + ":443"}} {
			t.Run(z.KeyType+", "+v.protocol, func(t *testing.T) {
				before := w.signatures(z.Host)
				dom := w.browse(t, z.Host, v.flag)
				for _, want := range []string{"private origin a", "protocol: " + v.protocol} {
					if !strings.Contains(dom, want) {
						t.Errorf("the page lacks %q:\n%s", want, dom)
					}
				}
				eventually(t, "a record", func(context.Context) error {
					if w.signatures(z.Host) == before {
						return fmt.Errorf("no signature for %s", z.Host)
					}
					return nil
				})
			})
		}
	}
}

// browse loads /browser in a fresh Chromium on the visitor's host and returns the page as the browser sees it. The lab's
// authority is no public one: the browser is told the key that it may trust, and checks everything else.
func (w *world) browse(t *testing.T, host, flag string) string {
	t.Helper()
	pin := sha256.Sum256(leafOf(t, w.Chain(host)).RawSubjectPublicKeyInfo)
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	for range 3 { // its first start on a machine has ended without a page, not even an empty one, once
		cmd := w.visitor.Command(ctx, "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
			"--disable-component-update", "--disable-sync", "--user-data-dir="+t.TempDir(), "--host-resolver-rules=MAP "+host+" 203.0.113.1",
			"--ignore-certificate-errors-spki-list="+base64.StdEncoding.EncodeToString(pin[:]), flag, "--virtual-time-budget=10000", "--dump-dom", "https://"+host+"/browser")
		var said bytes.Buffer
		cmd.Stderr = &said
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("chromium: %v\n%s\n%s", err, out, said.String())
		}
		if len(bytes.TrimSpace(out)) > 0 {
			return string(out)
		}
		t.Logf("chromium ended without a page:\n%s", said.String())
	}
	return ""
}
