package control

import (
	"fmt"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// crowd registers n sessions of as many connectors, in tunnels of their own or all in one.
func crowd(c *Control, n int, oneTunnel bool) {
	for i := range n {
		id := fmt.Sprintf("tn_%d", i)
		if oneTunnel {
			id = "tn_0"
		}
		c.register(fmt.Sprintf("p%d", i), id)
	}
}

// register is what a session's coming costs, but for the session.
func (c *Control) register(name, tunnelID string) {
	l := &live{s: &tunnel.Session{}, connector: Connector{ID: "cn_" + name, Name: name, Tunnel: tunnelID}, since: c.now(), due: make(chan struct{}, 1)}
	c.reg.add(l, c.peers.upSince(tunnelID, l.since))
	c.touch(tunnelID)
	c.bulk.up(l)
	l.tell()
	c.sessionUp(l)
	c.configRound()
}

// What a session costs to register does not depend on how many there are.
func TestRegistrationStaysFlat(t *testing.T) {
	for _, oneTunnel := range []bool{false, true} {
		cost := func(n int) float64 {
			c := alone()
			crowd(c, n, oneTunnel)
			i := 0
			return testing.AllocsPerRun(50, func() {
				i++
				id := "tn_0"
				if !oneTunnel {
					id = fmt.Sprintf("tn_x%d", i)
				}
				c.register(fmt.Sprintf("x%d", i), id)
			})
		}
		few, many := cost(100), cost(10_000)
		t.Logf("one tunnel %v: %.0f allocations beside 100 sessions, %.0f beside 10,000", oneTunnel, few, many)
		if many > few+10 {
			t.Errorf("one tunnel %v: %.0f allocations beside 100 sessions, %.0f beside 10,000; want the same", oneTunnel, few, many)
		}
	}
}

// alone is a Control that nothing runs in.
func alone() *Control {
	c := &Control{model: newModel(), reg: newRegistry(), configs: newPusher(), polls: newPoller(), status: newStatuses()}
	c.bulk, c.peers = newBulk("", c.reg), newPeers(c)
	return c
}

func BenchmarkRegister(b *testing.B) {
	for _, n := range []int{100, 1_000, 10_000} {
		for _, oneTunnel := range []bool{false, true} {
			b.Run(fmt.Sprintf("beside=%d/one_tunnel=%v", n, oneTunnel), func(b *testing.B) {
				c := alone()
				crowd(c, n, oneTunnel)
				i := 0
				for b.Loop() {
					i++
					id := "tn_0"
					if !oneTunnel {
						id = fmt.Sprintf("tn_x%d", i)
					}
					c.register(fmt.Sprintf("x%d", i), id)
				}
			})
		}
	}
}

// The records of a tunnel with very many processes, and of many tunnels, fit into what the store takes.
func TestPresenceFitsTheStore(t *testing.T) {
	of := func(id string) (v presence) {
		n := 500
		if id == "tn_19" {
			n = 2 * maxPresence
		}
		for i := range n {
			v.Processes = append(v.Processes, presentProcess{Connector: fmt.Sprintf("%064d", i), Instance: fmt.Sprintf("%080d", i), Sessions: 4, Draining: 4, Want: 4, Complete: true})
		}
		return v
	}
	var ids []string
	for i := range 20 {
		ids = append(ids, fmt.Sprintf("tn_%d", i))
	}
	for c := alone(); len(ids) > 0; {
		ops, size := c.peers.presenceOps(ids, false, of)
		if len(ops) == 0 || size > 5<<18 {
			t.Fatalf("%d operations with %d bytes; etcd takes 1.5 MiB", len(ops), size)
		}
		if err := state.CheckTxn(nil, ops); err != nil {
			t.Fatal(err)
		}
		ids = ids[len(ops):]
	}
}

// What was measured of connectors that are gone for long is forgotten, and nothing of those that are there or have flows.
func TestBulkForgets(t *testing.T) {
	c := alone()
	c.register("here", "tn_0")
	for _, name := range []string{"here", "gone", "flows"} {
		c.bulk.stateLocked(name)
	}
	c.bulk.by["flows"].open = 1
	now := time.Now()
	for i, want := range []int{3, 3, 2} {
		c.bulk.rest(now.Add(time.Duration(i)*(bulkForget/2+time.Second)), nil)
		if got := len(c.bulk.by); got != want {
			t.Errorf("look %d: %d are known, want %d", i, got, want)
		}
	}
	if c.bulk.by["gone"] != nil {
		t.Error("the one that is gone is still known")
	}
}
