package connector

import (
	"fmt"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

func TestCounts(t *testing.T) {
	var s counts
	if s.reserve("a") {
		t.Error("the zero value has room")
	}
	s.set(Limits{PerVNet: map[vnet.ID]int{"a": 2, "none": 0}})
	if _, most := s.total(); most != defaultMaxFlows {
		t.Errorf("limit %d, want the default", most)
	}
	take := func(v vnet.ID, want bool) {
		t.Helper()
		if got := s.reserve(v); got != want {
			t.Errorf("reserve(%q): got %v, want %v", v, got, want)
		}
	}
	take("none", false)
	take("a", true)
	take("a", true)
	take("a", false)
	take("b", true)
	s.set(Limits{MaxFlows: 3, PerVNet: map[vnet.ID]int{"a": 1, "b": 5}})
	take("b", false) // the whole is full
	s.release("b")
	take("a", false) // two, and there may be one
	s.release("a")
	take("a", false)
	s.release("a")
	take("a", true)
	if got, want := fmt.Sprint(s.limited()), "[{a 1 1} {b 0 5}]"; got != want {
		t.Errorf("limited: got %s, want %s", got, want)
	}
	if used, most := s.total(); used != 1 || most != 3 {
		t.Errorf("%d of %d flows, want 1 of 3", used, most)
	}
}

// TestVNetLimit lowers a network's limit while flows are open: they stay, new ones are refused until there are fewer, and
// other networks have theirs.
func TestVNetLimit(t *testing.T) {
	authority, edgeID, connID := identities(t)
	e := startEdge(t, authority, edgeID, "127.0.0.1:0")
	origin := echoServer(t)
	reg := prometheus.NewRegistry()
	c, _ := startConnector(t, Config{Identity: connID, Edges: []string{e.addr}, Allow: loopbackOnly(t), Registerer: reg,
		Limits: Limits{PerVNet: map[vnet.ID]int{"default": 2}}})
	var held []tunnel.Conn
	for range 2 {
		conn, err := e.open(t, origin)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		held = append(held, conn)
	}
	refused := func(when string) {
		t.Helper()
		if conn, err := e.open(t, origin); err == nil || !strings.Contains(err.Error(), tunnel.ResultLimit.String()) {
			t.Errorf("%s: got %v, %v, want the limit", when, conn, err)
		}
	}
	refused("a third flow")
	c.SetLimits(Limits{PerVNet: map[vnet.ID]int{"default": 1}})
	for _, conn := range held {
		echo(t, conn)
	}
	if err := testutil.GatherAndCompare(reg, strings.NewReader(`
# HELP keyhaven_connector_vnet_flows Flows of a virtual network with a limit of its own.
# TYPE keyhaven_connector_vnet_flows gauge
keyhaven_connector_vnet_flows{vnet="default"} 2
# HELP keyhaven_connector_vnet_flows_limit How many flows of the virtual network there may be at a time.
# TYPE keyhaven_connector_vnet_flows_limit gauge
keyhaven_connector_vnet_flows_limit{vnet="default"} 1
`), "keyhaven_connector_vnet_flows", "keyhaven_connector_vnet_flows_limit"); err != nil {
		t.Error(err)
	}
	held[0].Close()
	eventually(t, "the flow to end", func() bool { return c.flows.len() == 1 })
	refused("at the lowered limit")
	held[1].Close()
	eventually(t, "the flow to end", func() bool { return c.flows.len() == 0 })
	conn, err := e.open(t, origin)
	if err != nil {
		t.Fatalf("below the lowered limit: %v", err)
	}
	conn.Close()
}
