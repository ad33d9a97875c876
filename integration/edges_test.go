//go:build netns

package integration

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/internal/lab"
)

// twoEdges is an installation of two edges, which share an etcd, and two connectors of one site.
//
//	visitor ──┬── edge1 203.0.113.1 ──┬── connectors a, a2 in site a
//	          └── edge2 203.0.113.9 ──┘
func twoEdges(t *testing.T) *world {
	t.Helper()
	w := hosts(t)
	second := netip.MustParsePrefix("203.0.113.9/32")
	must(t, w.edge.AddAddr("lo", second))
	must(t, w.visitor.Route(second, netip.MustParseAddr("203.0.113.1")))
	site := w.siteA()
	site.Replicas = []lab.ConnectorPlan{{Name: "a2", Ops: "127.0.0.1:9603"}}
	plan := lab.Plan{Dir: t.TempDir(), Bin: bin, Tools: filepath.Join(bin, "keyhaven-demo"), Zones: onePlainZone, Sites: []lab.SitePlan{site},
		Edge:      lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		MoreEdges: []lab.EdgePlan{{NS: w.edge, Tunnel: "203.0.113.9:7844", Visitors: "203.0.113.9:443", Ops: "127.0.0.1:9604"}},
		Etcd:      lab.EtcdPlan{NS: w.edge, Client: "127.0.0.1:2379", Peer: "127.0.0.1:2380"}}
	var err error
	w.Lab, err = lab.New(t.Context(), plan)
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		w.searchLogs(t)
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	must(t, w.Start(t.Context()))
	return w
}

// visit asks for the zone's page at whichever edge can be connected to.
func (w *world) visit(ctx context.Context) error {
	cmd, err := w.Curl(ctx, w.visitor, onePlainZone[0].Host, "/", "-m", "15")
	if err != nil {
		return err
	}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("curl: %w: %s", err, errs.String())
	}
	if !strings.Contains(out.String(), `private origin "a"`) {
		return fmt.Errorf("got %q", out.String())
	}
	return nil
}
