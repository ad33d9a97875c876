package control

import (
	"testing"

	"github.com/keyhaven/keyhaven/state"
)

// What the previous version wrote is read, and what a later one added to it, or beside it, keeps nothing from working.
func TestRecordsOfOtherVersions(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	_, err := s.Txn(t.Context(), nil, []state.Op{
		state.Put(prefixVNet+"default", []byte(`{"id":"default","name":"default","created":"2026-01-01T00:00:00Z"}`)),
		state.Put(keyDefaultVNet, []byte("default")),
		state.Put(prefixTunnel+"tn_a", []byte(`{"id":"tn_a","name":"plant","created":"2026-01-01T00:00:00Z"}`)),
		state.Put(prefixTunnel+"tn_b", []byte(`{"id":"tn_b","name":"office","created":"2026-01-01T00:00:00Z","later":{"x":[1]}}`)),
		state.Put(prefixConn+"p1", []byte(`{"id":"cn_1","name":"p1","tunnel":"tn_a","created":"2026-01-01T00:00:00Z","valid_from":"2026-01-01T00:00:00Z"}`)),
		state.Put(prefixRoute+"default/prefix/10.0.0.0/8", []byte(`{"vnet":"default","prefix":"10.0.0.0/8","tunnel":"tn_a","created":"2026-01-01T00:00:00Z"}`)),
		state.Put("later/thing", []byte("of a later version")),
		state.Put(keyGeneration, []byte(schema)),
	})
	must(t, err)
	must(t, s.Close())
	s = b.openStore()
	defer s.Close()
	c := b.control(s)
	defer c.Close()
	tunnels := c.Tunnels()
	if len(tunnels) != 2 || tunnels[0].Name != "office" || tunnels[1].Routes != 1 || tunnels[1].Connectors != 1 {
		t.Fatalf("read as %+v", tunnels)
	}
	_, err = c.SetTunnel(t.Context(), "plant", TunnelChange{MaxFlows: new(3)})
	must(t, err)
	if e, err := s.Get(t.Context(), "later/thing"); err != nil || string(e.Value) != "of a later version" {
		t.Errorf("a record of a later version has become %q, %v", e.Value, err)
	}
}
