//go:build netns

package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// fetches is nil when a new visitor gets the page, by a full handshake.
func (w *world) fetches(ctx context.Context) error {
	out, err := w.curl(ctx, plain, "/", "-f", "-m", "5")
	if err == nil && !strings.Contains(out, "private origin") {
		err = fmt.Errorf("got %q", out)
	}
	return err
}

// All four parts are killed and started again, in each of the 24 orders. Whatever the order, visitors are served again
// without anybody's help.
func TestHealing(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	parts := []*lab.Process{w.EdgeProc, w.Sites[0].Connector, w.KeyServer, w.Sites[0].Origin}
	longest := time.Duration(0)
	for _, order := range permutations(len(parts)) {
		for _, i := range order {
			must(t, parts[i].Kill())
		}
		var names []string
		for _, i := range order {
			must(t, parts[i].Start())
			names = append(names, parts[i].Name())
		}
		began := time.Now()
		eventually(t, strings.Join(names, ", "), w.fetches)
		took := time.Since(began)
		longest = max(longest, took)
		t.Logf("%-45s served again %.1f s after the last start", strings.Join(names, ", "), took.Seconds())
	}
	t.Logf("longest: %.1f s", longest.Seconds())
}

// Each part alone is killed while visitors come; all others stay up.
func TestOnePartAtATime(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	for _, p := range []*lab.Process{w.EdgeProc, w.Sites[0].Connector, w.KeyServer, w.Sites[0].Origin} {
		must(t, p.Kill())
		if err := w.fetches(t.Context()); err == nil {
			t.Errorf("a page came while %s was dead: the test proves nothing", p.Name())
		}
		must(t, p.Start())
		began := time.Now()
		eventually(t, p.Name(), w.fetches)
		t.Logf("%s: served again %.1f s after its start", p.Name(), time.Since(began).Seconds())
	}
}

func permutations(n int) (all [][]int) {
	var extend func(prefix []int)
	extend = func(prefix []int) {
		if len(prefix) == n {
			all = append(all, append([]int(nil), prefix...))
			return
		}
	next:
		for i := range n {
			for _, p := range prefix {
				if p == i {
					continue next
				}
			}
			extend(append(prefix, i))
		}
	}
	extend(nil)
	return all
}

// With the origin away the visitor gets 502 and a page that names the part, and nothing of the inside.
func TestOriginAway(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	must(t, w.Sites[0].Origin.Kill())
	out, err := w.curl(t.Context(), plain, "/", "-w", "%{http_code}", "-H", "Accept: text/html")
	if err != nil || !strings.HasSuffix(out, "502") || !strings.Contains(out, "origin") {
		t.Errorf("got %v, %q", err, out)
	}
	for _, secret := range []string{"10.20.0", "8080", "198.51.100", "vn_", "connector"} {
		if strings.Contains(out, secret) {
			t.Errorf("the page shows %q:\n%s", secret, out)
		}
	}
}
