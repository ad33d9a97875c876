package control

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// States of a device's contact.
const (
	DeviceOnline = "online"
	DeviceSilent = "silent" // its connector has a session, but nothing reports any more
	DeviceAway   = "away"   // its connector has no session; what is shown is the last that was heard
)

// DeviceView is a device, named as its connector is.
type DeviceView struct {
	Name       string       `json:"name"`
	Tunnel     string       `json:"tunnel"` // id
	TunnelName string       `json:"tunnel_name"`
	Contact    string       `json:"contact"` // online, silent or away
	Reported   time.Time    `json:"reported"`
	Edge       string       `json:"edge,omitempty"` // to which it was reported
	Report     fleet.Report `json:"report"`
	// Failed is the update that it gave up, until that version runs.
	Failed *FailedUpdate `json:"failed,omitempty"`
	// Problem is why Report is not what it is.
	Problem string `json:"problem,omitempty"`
	// Directive is what it is to do, by the rollouts.
	Directive fleet.Directive `json:"directive"`
}

// RolloutView is a rollout with how far it is.
type RolloutView struct {
	Rollout
	TunnelNames []string        `json:"tunnel_names"`
	Status      string          `json:"status"` // running, paused or stopped
	Progress    RolloutProgress `json:"progress"`
}

// States of a rollout.
const (
	RolloutRunning = "running"
	RolloutPaused  = "paused"  // by an operator
	RolloutStopped = "stopped" // by itself, for its failures
)

// RolloutProgress counts the devices of a rollout.
type RolloutProgress struct {
	Selected int `json:"selected"` // of its tunnels
	In       int `json:"in"`       // of these, by the percentage; the sum of those below
	Updated  int `json:"updated"`  // run the version
	Updating int `json:"updating"` // are on the way to it, or try it
	Failed   int `json:"failed"`   // gave it up
	Waiting  int `json:"waiting"`  // have not begun, or are away
}

// Devices returns the devices that have ever reported, sorted by name, those of the tunnel ref if that is not empty.
func (c *Control) Devices(ref string) ([]DeviceView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	only, err := m.tunnelIDLocked(ref)
	if err != nil {
		return nil, err
	}
	list := make([]DeviceView, 0, len(m.devices))
	up := c.upLocked()
	m.eachDeviceLocked(func(k Connector, d deviceRecord) {
		if only == "" || k.Tunnel == only {
			list = append(list, m.deviceViewLocked(k, d, up(k)))
		}
	})
	slices.SortFunc(list, func(a, b DeviceView) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

// Device returns the device behind the connector name.
func (c *Control) Device(name string) (DeviceView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	k, known := m.connectors[name]
	d, ok := m.devices[name]
	if !known || !ok || d.Connector != k.ID {
		return DeviceView{}, refusal(CodeNotFound, "'fleet list' shows those that have reported", "there is no device %q", clip(name))
	}
	return m.deviceViewLocked(k, d, c.upLocked()(k)), nil
}

// eachDeviceLocked calls f for the devices of connectors that are enrolled and not revoked.
func (m *model) eachDeviceLocked(f func(Connector, deviceRecord)) {
	for name, d := range m.devices {
		if k, ok := m.connectors[name]; ok && k.ID == d.Connector && k.Revoked.IsZero() {
			f(k, d)
		}
	}
}

// upLocked tells which connectors have a session on any edge.
func (c *Control) upLocked() func(Connector) bool {
	works := map[string]map[string]bool{} // by tunnel, then by connector
	return func(k Connector) bool {
		by, ok := works[k.Tunnel]
		if !ok {
			by = map[string]bool{}
			for key := range c.workOf(k.Tunnel).processes {
				by[key[0]] = true
			}
			works[k.Tunnel] = by
		}
		return by[k.Name]
	}
}

func (m *model) deviceViewLocked(k Connector, d deviceRecord, up bool) DeviceView {
	v := DeviceView{Name: k.Name, Tunnel: k.Tunnel, TunnelName: m.tunnels[k.Tunnel].Name, Contact: d.contact(up, time.Now()), Reported: d.At,
		Edge: d.Edge, Report: d.Report, Problem: string(d.Problem), Directive: m.directiveLocked(k)}
	if d.Failed.Version != "" {
		v.Failed = &d.Failed
	}
	return v
}

func (d *deviceRecord) contact(up bool, now time.Time) string {
	switch {
	case !up:
		return DeviceAway
	case now.Sub(d.At) > deviceSilent:
		return DeviceSilent
	}
	return DeviceOnline
}

// Rollouts returns all rollouts, the newest first: in this order they decide about a device.
func (c *Control) Rollouts() []RolloutView {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return c.rolloutViewsLocked(c.model.rolloutOrder)
}

// Rollout returns the rollout name.
func (c *Control) Rollout(name string) (RolloutView, error) {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	r, err := rolloutShelf.get(c.model, name)
	if err != nil {
		return RolloutView{}, err
	}
	return c.rolloutViewsLocked([]Rollout{r})[0], nil
}

func (c *Control) rolloutViewsLocked(list []Rollout) []RolloutView {
	m := c.model
	views := make([]RolloutView, len(list))
	for i, r := range list {
		views[i] = RolloutView{Rollout: r, TunnelNames: []string{}, Status: r.Config.status()}
		for _, id := range r.Config.Tunnels {
			views[i].TunnelNames = append(views[i].TunnelNames, cmp.Or(m.tunnels[id].Name, fmt.Sprintf("(deleted: %s)", id)))
		}
	}
	m.eachDeviceLocked(func(k Connector, d deviceRecord) {
		for i := range views {
			views[i].Progress.count(&views[i].Config, k, d)
		}
	})
	return views
}

func (r *RolloutConfig) status() string {
	switch {
	case r.stopped():
		return RolloutStopped
	case r.Paused:
		return RolloutPaused
	}
	return RolloutRunning
}

func (p *RolloutProgress) count(r *RolloutConfig, k Connector, d deviceRecord) {
	if !r.selects(k) {
		return
	}
	p.Selected++
	if !r.has(k) {
		return
	}
	p.In++
	switch {
	case d.Report.Version == r.Version && !d.Report.Trial:
		p.Updated++
	case d.failed(r, k):
		p.Failed++
	case d.Report.Target == r.Version && d.Report.Updating():
		p.Updating++
	default:
		p.Waiting++
	}
}
