//go:build netns

package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/internal/lab"
)

// controlSocket is where a connector that runs on a device answers its agent.
func controlSocket(dir, connector string) string { return filepath.Join(dir, connector+".sock") }

// A pi stands for a device: a real connector, and an agent that reports what the test says.
type pi struct {
	c      *lab.Connector
	socket string

	mu     sync.Mutex
	report fleet.Report
	told   fleet.Directive
}

func (p *pi) set(r fleet.Report) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.Product, r.Arch, r.Since = "keyhaven-appliance", "arm64", time.Now()
	p.report = r
}

func (p *pi) last() fleet.Directive {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.told
}

// agent reports until ctx ends. A connector that is being restarted does not answer.
func (p *pi) agent(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		p.mu.Lock()
		r := p.report
		p.mu.Unlock()
		if d, err := fleet.Exchange(ctx, p.socket, r); err == nil {
			p.mu.Lock()
			p.told = d
			p.mu.Unlock()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

// pis adds devices to the tunnel a.
func (w *twoByTwo) pis(t *testing.T, n int) map[string]*pi {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var agents sync.WaitGroup
	t.Cleanup(func() { cancel(); agents.Wait() })
	all := map[string]*pi{}
	for i := range n {
		name := fmt.Sprintf("pi%d", i)
		c, err := w.AddConnector(t.Context(), w.Sites[0], lab.ConnectorPlan{Name: name, Ops: fmt.Sprintf("127.0.0.1:%d", 9620+i)})
		must(t, err)
		must(t, c.Proc.Start())
		p := &pi{c: c, socket: controlSocket(w.Path(), "connector-"+name)}
		p.set(fleet.Report{Version: "1.0.0", State: fleet.Idle})
		agents.Go(func() { p.agent(ctx) })
		all[name] = p
	}
	return all
}

// deviceList is what an edge knows of the devices.
func (w *twoByTwo) deviceList(ctx context.Context, edge int) (by map[string]fleetDevice, err error) {
	out, err := w.EdgeAt(ctx, edge, "fleet", "list", "--output", "json")
	if err != nil {
		return nil, err
	}
	var list []fleetDevice
	if err := json.Unmarshal([]byte(out), &list); err != nil {
		return nil, err
	}
	by = map[string]fleetDevice{}
	for _, d := range list {
		by[d.Name] = d
	}
	return by, nil
}

type fleetDevice struct {
	Name, Contact string
	Report        fleet.Report
	Directive     fleet.Directive
}

// rolloutIs waits until both edges show the rollout with a status and so many devices updated.
func (w *twoByTwo) rolloutIs(t *testing.T, name, status string, updated int) {
	t.Helper()
	for edge := range 2 {
		eventually(t, "rollout "+status, func(ctx context.Context) error {
			out, err := w.EdgeAt(ctx, edge, "fleet", "rollout", "show", name, "--output", "json")
			if err != nil {
				return err
			}
			var v struct {
				Status   string
				Progress struct{ Updated int }
			}
			if err := json.Unmarshal([]byte(out), &v); err != nil {
				return err
			}
			if v.Status != status || v.Progress.Updated != updated {
				return fmt.Errorf("edge %d: got %s, want %s with %d updated", edge, out, status, updated)
			}
			return nil
		})
	}
}

// told waits until agents have a policy.
func told(t *testing.T, pis map[string]*pi, policy string, names ...string) {
	t.Helper()
	for _, name := range names {
		eventually(t, name+" is told to "+policy, func(context.Context) error {
			if d := pis[name].last(); d.Policy != policy {
				return fmt.Errorf("got %+v", d)
			}
			return nil
		})
	}
}

// beginRollout begins one that has some of the devices in at half, and others not, and returns which. With few devices all
// of them may be on one side; each rollout chooses anew.
func (w *twoByTwo) beginRollout(t *testing.T, name string, n int) (in, out []string) {
	t.Helper()
	for {
		w.admin(t, "fleet", "rollout", "create", name, "--version", "1.1.0", "--percent", "50", "--tunnel", "a", "--max-failures", "0")
		devices, err := w.deviceList(t.Context(), 0)
		must(t, err)
		in, out = nil, nil
		for name, d := range devices {
			if d.Directive.Policy == fleet.Update {
				in = append(in, name)
			} else {
				out = append(out, name)
			}
		}
		if len(in) > 0 && len(out) > 1 && len(in)+len(out) == n {
			return in, out
		}
		w.admin(t, "fleet", "rollout", "delete", name)
	}
}

// fleet rolls a version out over devices, one of which gives it up. An update ends with a restart, of the connector too.
func (w *twoByTwo) fleet(t *testing.T) {
	const n = 5
	pis := w.pis(t, n)
	var names []string
	for name := range pis {
		names = append(names, name)
	}
	for edge := range 2 {
		eventually(t, "the devices are known", func(ctx context.Context) error {
			devices, err := w.deviceList(ctx, edge)
			for _, name := range names {
				if d := devices[name]; err == nil && (d.Contact != "online" || d.Report.Version != "1.0.0") {
					err = fmt.Errorf("edge %d: %s is %+v", edge, name, d)
				}
			}
			return err
		})
	}
	told(t, pis, fleet.Free, names...)
	in, out := w.beginRollout(t, "spring", n)
	told(t, pis, fleet.Update, in...)
	told(t, pis, fleet.Hold, out...)

	reboot := func(name string, r fleet.Report) {
		t.Helper()
		pis[name].set(r)
		must(t, w.Restart(t.Context(), pis[name].c, true))
	}
	reboot(in[0], fleet.Report{Version: "1.1.0", Previous: "1.0.0", State: fleet.Confirmed, Target: "1.1.0"})
	w.rolloutIs(t, "spring", "running", 1)
	w.admin(t, "fleet", "rollout", "set", "spring", "--percent", "100")
	told(t, pis, fleet.Update, names...)
	w.admin(t, "fleet", "rollout", "pause", "spring")
	told(t, pis, fleet.Hold, out...)
	if _, err := w.EdgeAt(t.Context(), 1, "fleet", "rollout", "resume", "spring"); err != nil {
		t.Fatal(err)
	}
	told(t, pis, fleet.Update, out...)
	reboot(out[0], fleet.Report{Version: "1.0.0", State: fleet.RolledBack, Target: "1.1.0", Error: "no tunnel in time"})
	w.rolloutIs(t, "spring", "stopped", 1)
	told(t, pis, fleet.Hold, out[1:]...)
	if text := w.admin(t, "fleet", "rollout", "show", "spring"); !strings.Contains(text, "too many devices gave the update up: 1, where 0 may") {
		t.Errorf("rollout show: %s", text)
	}

	// A device that is switched off stays in sight.
	must(t, pis[out[1]].c.Proc.Stop())
	eventually(t, out[1]+" is away", func(ctx context.Context) error {
		text, err := w.EdgeAt(ctx, 1, "fleet", "show", out[1])
		if err == nil && (!strings.Contains(text, "away") || !strings.Contains(text, "1.0.0")) {
			err = fmt.Errorf("got %s", text)
		}
		return err
	})
	metrics, err := w.edge.Command(t.Context(), "curl", "-sSf", "-m", "5", "http://127.0.0.1:9600/metrics").Output()
	must(t, err)
	for _, line := range []string{`keyhaven_edge_fleet_devices{state="confirmed",version="1.1.0"} 1`, `keyhaven_edge_fleet_devices{state="rolled_back",version="1.0.0"} 1`,
		`keyhaven_edge_fleet_devices{state="away",version="1.0.0"} 1`, `keyhaven_edge_fleet_rollouts{status="stopped"} 1`} {
		if !strings.Contains(string(metrics), line+"\n") {
			t.Errorf("the metrics lack %s", line)
		}
	}
	w.admin(t, "fleet", "rollout", "delete", "spring")
	told(t, pis, fleet.Free, in...)
	for _, name := range names {
		if name != out[1] {
			must(t, pis[name].c.Proc.Stop())
		}
	}
}
