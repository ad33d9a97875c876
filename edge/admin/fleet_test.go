package admin

import (
	"errors"
	"fmt"
	"testing"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/state"
)

func testFleet(t *testing.T, c *Client, s state.Store) {
	ctx := t.Context()
	tunnel, err := c.AddTunnel(ctx, "cams", "")
	must(t, err)
	// A device as a connector and the edge that it spoke to leave it behind.
	_, err = s.Txn(ctx, nil, []state.Op{
		state.Put("connectors/pi", fmt.Appendf(nil, `{"id":"con_1","name":"pi","tunnel":%q,"created":"2026-01-01T00:00:00Z","valid_from":"2026-01-01T00:00:00Z"}`, tunnel.ID)),
		state.Put("devices/pi", []byte(`{"connector":"con_1","at":"2026-01-02T00:00:00Z","edge":"e1","failed":{"version":"1.1.0","at":"2026-01-02T00:00:00Z"},
			"report":{"product":"keyhaven-appliance","arch":"arm64","board":"Pi","version":"1.0.0","previous":"0.9","state":"rolled_back","target":"1.1.0","error":"no tunnel","trial":true,
			"checked":"2026-01-01T00:00:00Z","since":"2026-01-02T00:00:00Z","camera":"ok"}}`)),
		state.Put("control/generation", []byte(`{"schema":1}`)),
	})
	must(t, err)
	spec := control.RolloutSpec{Name: "spring", Version: "1.2.0", Channel: "stable", Percent: 100, Tunnels: []string{"cams"}, MaxFailures: 3}
	created, err := c.CreateRollout(ctx, spec) // waits for what is above
	must(t, err)
	devices, err := c.Devices(ctx, "cams")
	must(t, err)
	d, err := c.Device(ctx, "pi")
	must(t, err)
	want := fleet.Directive{Policy: fleet.Update, Version: "1.2.0", Channel: "stable", Rollout: "spring"}
	if len(devices) != 1 || d.Contact != control.DeviceAway || d.Failed == nil || d.Directive != want || d.Report.Camera != "ok" {
		t.Errorf("devices %+v, %+v", devices, d)
	}
	changed, err := c.SetRollout(ctx, "spring", control.RolloutChange{Percent: new(5), MaxFailures: new(1), Paused: new(true)}, created.Revision)
	must(t, err)
	if changed.Status != control.RolloutPaused || changed.Config.Percent != 5 || changed.Revision <= created.Revision || len(changed.Config.Events) != 4 {
		t.Errorf("SetRollout: %+v", changed)
	}
	if _, err := c.SetRollout(ctx, "spring", control.RolloutChange{}, created.Revision); !errors.Is(err, control.ErrStale) {
		t.Errorf("a change of what is no longer there: %v", err)
	}
	if _, err := c.CreateRollout(ctx, spec); !errors.Is(err, control.ErrExists) {
		t.Errorf("a second rollout of the name: %v", err)
	}
	one, err := c.Rollout(ctx, "spring")
	must(t, err)
	all, err := c.Rollouts(ctx)
	must(t, err)
	if len(all) != 1 || one.Progress.Selected != 1 || len(one.TunnelNames) != 1 {
		t.Errorf("rollouts %+v, %+v", all, one)
	}
	must(t, c.DeleteTunnel(ctx, "cams", true))
	if one, err = c.Rollout(ctx, "spring"); err != nil || one.Progress.Selected != 0 || one.TunnelNames[0] != "(deleted: "+tunnel.ID+")" {
		t.Errorf("after its tunnel is gone: %+v, %v", one, err)
	}
	must(t, c.DeleteRollout(ctx, "spring"))
}
