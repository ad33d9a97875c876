//go:build netns

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/mtls"
)

// What people get wrong is told with the remedy, and visitors notice nothing of it.
func TestMistakes(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	ctx, cancel := context.WithCancel(t.Context())
	visits := make(chan error, 1)
	go func() {
		n := 0
		for ctx.Err() == nil {
			if err := w.fetches(t.Context()); err != nil {
				visits <- fmt.Errorf("after %d visits: %w", n, err)
				return
			}
			n++
		}
		visits <- nil
	}()
	stop := sync.OnceFunc(func() {
		cancel()
		check(t, <-visits)
	})
	defer stop()
	t.Run("records", func(t *testing.T) {
		w.admin(t, "tunnel", "create", "other")
		w.admin(t, "route", "add", "--hostname", "db.corp.test", "--tunnel", "a")
		w.refused(t, []string{"10.20.0.0/33"}, "route", "add", "10.20.0.0/33", "--tunnel", "a")
		w.refused(t, []string{"10.20.0.9/24", "10.20.0.0/24"}, "route", "add", "10.20.0.9/24", "--tunnel", "a")
		w.refused(t, []string{"10.20.0.0/24", `"a"`}, "route", "add", "10.20.0.0/24", "--tunnel", "other")
		w.refused(t, []string{"db.corp.test", `"a"`}, "route", "add", "--hostname", "DB.corp.test.", "--tunnel", "other")
		w.refused(t, []string{"nope", "tunnel list"}, "route", "add", "10.77.0.0/16", "--tunnel", "nope")
		w.refused(t, []string{"10.20.0.0/24"}, "tunnel", "delete", "a")
		w.refused(t, []string{"7844"}, "port", "add", "x", "--listen", "203.0.113.1:7844", "--to", origin)
	})
	t.Run("token", func(t *testing.T) {
		bad := w.Path("bad-token")
		must(t, os.WriteFile(bad, []byte("this is no token\n"), 0o600))
		if err := w.Join(t.Context(), w.Sites[0], bad, filepath.Join(t.TempDir(), "id"), "x"); err == nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("garbage: got %v", err)
		}
		good, err := os.ReadFile(w.Path("token-a"))
		must(t, err)
		// One letter of the middle is another: the secret, or who may be trusted, is wrong.
		b := []byte(strings.TrimSpace(string(good)))
		b[len(b)/2] ^= 1
		must(t, os.WriteFile(bad, b, 0o600))
		if err := w.Join(t.Context(), w.Sites[0], bad, filepath.Join(t.TempDir(), "id"), "x"); err == nil || !strings.Contains(err.Error(), "token") {
			t.Errorf("one letter wrong: got %v", err)
		}
	})
	t.Run("another installation's connector", func(t *testing.T) {
		otherCA := filepath.Join(t.TempDir(), "ca")
		ca, err := mtls.InitAuthority(otherCA, "other.test")
		must(t, err)
		key, csr, err := mtls.NewKeyCSR()
		must(t, err)
		chain, err := ca.IssueCSR(csr, mtls.Identity{TrustDomain: "other.test", Kind: mtls.KindConnector, Name: "a"}, time.Hour)
		must(t, err)
		dir := filepath.Join(t.TempDir(), "identity")
		must(t, mtls.WriteIdentity(dir, key, chain, ca.RootPEM()))
		w.says(t, w.connector(t, "foreign", dir), "no session to the edge", "certificate")
	})
	t.Run("port in use", func(t *testing.T) {
		second := w.Process("second", w.edge, "keyhaven-edge", "run", "--config", w.Path("second.yaml"))
		cfg := w.EdgeConfig()
		cfg["state"] = obj{"file": w.Path("second.db")}
		cfg["admin"] = obj{"socket": w.Path("second.sock")}
		delete(cfg, "ops")
		must(t, w.WriteYAML("second.yaml", cfg))
		must(t, second.Start())
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := second.Wait(ctx); err == nil || !strings.Contains(second.Log(), "address already in use") {
			t.Errorf("got %v and\n%s", err, second.Log())
		}
	})
	t.Run("broken configuration", func(t *testing.T) {
		good, err := os.ReadFile(w.Path("connector-a.yaml"))
		must(t, err)
		p := w.Sites[0].Connector
		seen := len(p.Log())
		must(t, os.WriteFile(w.Path("connector-a.yaml"), append(good, "alow: []\n"...), 0o600))
		must(t, p.Signal(syscall.SIGHUP))
		eventually(t, "the connector keeps the old one", func(context.Context) error {
			if log := p.Log()[seen:]; !strings.Contains(log, "not reloaded") || !strings.Contains(log, "alow") {
				return fmt.Errorf("it says %q", log)
			}
			return nil
		})
		must(t, os.WriteFile(w.Path("connector-a.yaml"), good, 0o600))
	})
	t.Run("two connectors with one identity", func(t *testing.T) {
		seen := len(w.Sites[0].Connector.Log())
		twin := w.connector(t, "twin", w.Path("connector-a"))
		w.says(t, twin, "session up")
		// The edge tells the older one, once it is sure that that lives.
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		must(t, w.Sites[0].Connector.WaitLog(ctx, seen, "another process runs with"))
		stop() // whoever of the two goes leaves a gap until the other is let in again
	})
}

// says runs a program until it has said all of the texts in one line, and ends it.
func (w *world) says(t *testing.T, p *lab.Process, texts ...string) {
	t.Helper()
	must(t, p.Start())
	t.Cleanup(func() { check(t, p.Stop()) })
	eventually(t, "the connector's word", func(context.Context) error {
	lines:
		for line := range strings.Lines(p.Log()) {
			for _, s := range texts {
				if !strings.Contains(line, s) {
					continue lines
				}
			}
			return nil
		}
		return fmt.Errorf("want %q; it says\n%s", texts, p.Log())
	})
}
