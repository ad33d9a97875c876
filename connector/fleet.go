package connector

import (
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// deviceFresh is how long a report counts. An agent that has not reported for that long has stopped, and edges are told
// of no device until it reports again.
const deviceFresh = 15 * time.Minute

// A DeviceStatus is what the connector knows of the device that it runs on.
type DeviceStatus struct {
	Report   fleet.Report `json:"report"`
	Reported time.Time    `json:"reported"` // when the agent gave the report
	// Directive is the newest of any edge.
	Directive fleet.Directive `json:"directive"`
	Directed  time.Time       `json:"directed,omitzero"` // when it came; zero: none has
}

// device keeps the newest directive and report. The zero value knows nothing.
type device struct {
	mu        sync.Mutex // guards the fields below
	report    fleet.Report
	encoded   []byte // report
	reported  time.Time
	directive fleet.Directive
	directed  time.Time
	missed    throttle // of complaints
}

// ReportDevice takes the report of an agent on this host, encoded as [fleet.Report.Encode] does, and returns the newest
// directive of any edge: the zero Directive if none came yet. A report that cannot be read changes nothing.
func (c *Connector) ReportDevice(encoded []byte) (fleet.Directive, error) {
	r, err := fleet.ParseReport(encoded)
	if err != nil {
		return fleet.Directive{}, err
	}
	d := &c.device
	d.mu.Lock()
	defer d.mu.Unlock()
	d.report, d.encoded, d.reported = r, append([]byte(nil), encoded...), time.Now()
	return d.directive, nil
}

// exchangeDevice takes a directive of an edge and returns the report, nothing if there is none. A directive that cannot be
// read changes nothing.
func (c *Connector) exchangeDevice(directive []byte) []byte {
	next, err := fleet.ParseDirective(directive)
	d := &c.device
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	switch {
	case err != nil:
		if ok, missed := d.missed.allow(now); ok {
			c.log.Warn("directive of an edge not understood, the one before stays", "err", err, "missed", missed)
		}
	case next != (fleet.Directive{}):
		if next != d.directive && !d.reported.IsZero() {
			c.log.Info("directive of an edge", "policy", next.Policy, "version", next.Version, "rollout", next.Rollout)
		}
		d.directive, d.directed = next, now
	}
	if d.reported.IsZero() || now.Sub(d.reported) > deviceFresh {
		return nil
	}
	return d.encoded
}

// onDevice is what sessions ask, nil if edges are to be told that there is no device.
func (c *Connector) onDevice() func([]byte) []byte {
	if !c.cfg.Device {
		return nil
	}
	return c.exchangeDevice
}

// status is nil if there is no device.
func (d *device) status() *DeviceStatus {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.reported.IsZero() {
		return nil
	}
	return &DeviceStatus{Report: d.report, Reported: d.reported, Directive: d.directive, Directed: d.directed}
}
