package control

import (
	"context"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/state"
)

const (
	prefixDevice = "devices/" // + connector name; changes without anybody's decision, as sightings do
	// deviceRefresh is how often a report in which nothing has changed is written again.
	deviceRefresh = 10 * time.Minute
	// deviceSilent is how old the report of a device with a session may be; then its agent has stopped.
	deviceSilent = 45 * time.Minute
	// devicesPause collects reports for one transaction.
	devicesPause = 250 * time.Millisecond
)

// A deviceRecord is the last that any edge heard of a device.
type deviceRecord struct {
	Connector string        `json:"connector"` // id: a name that is enrolled anew is another device
	Report    fleet.Report  `json:"report,omitzero"`
	At        time.Time     `json:"at"`
	Edge      string        `json:"edge,omitempty"` // that was told
	Failed    FailedUpdate  `json:"failed,omitzero"`
	Problem   deviceProblem `json:"problem,omitempty"`
}

// A FailedUpdate is an update that a device gave up. It is kept until that version runs.
type FailedUpdate struct {
	Version string    `json:"version"`
	At      time.Time `json:"at"`             // when an edge learnt of it
	Since   time.Time `json:"since,omitzero"` // when it was, by the device, which tells one from the next
}

type deviceProblem string

const unreadable deviceProblem = "what it reports cannot be read; is the connector's or the agent's version newer than the edge's?"

// next is the record after a report.
func (d deviceRecord) next(r fleet.Report, now time.Time, edge string) deviceRecord {
	n := deviceRecord{Connector: d.Connector, Report: r, At: now, Edge: edge, Failed: d.Failed}
	switch {
	case r.Broken() && r.Target != "":
		// A device that looks for updates meanwhile is back at the same failure afterwards.
		if r.Target != d.Failed.Version || !r.Since.Equal(d.Failed.Since) {
			n.Failed = FailedUpdate{Version: r.Target, At: now, Since: r.Since.UTC()}
		}
	case !r.Broken() && !r.Trial && r.Version == d.Failed.Version:
		n.Failed = FailedUpdate{}
	}
	return n
}

// says reports whether d tells others something that old does not.
func (d deviceRecord) says(old deviceRecord) bool {
	if d.At.Sub(old.At) >= deviceRefresh {
		return true
	}
	a, b := d.Report, old.Report
	since := a.Since.Equal(b.Since)
	a.Checked, a.Since, b.Checked, b.Since = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	return a != b || !since || d.Failed != old.Failed || d.Problem != old.Problem || d.Connector != old.Connector
}

// deviceLog collects records to be written, at most one for each connector.
type deviceLog struct {
	mu    sync.Mutex
	fresh map[string]deviceRecord // by connector name
	wake  chan struct{}           // holds a value while fresh is not empty
}

func newDeviceLog() *deviceLog {
	return &deviceLog{fresh: map[string]deviceRecord{}, wake: make(chan struct{}, 1)}
}

// reported notes what a device has reported; r is nil if it cannot be read.
func (c *Control) reported(k Connector, r *fleet.Report) {
	l, now := c.deviceLog, c.now()
	l.mu.Lock()
	defer l.mu.Unlock()
	old, ok := l.fresh[k.Name]
	if !ok {
		old = c.deviceRecord(k.Name)
	}
	if old.Connector != k.ID {
		old = deviceRecord{}
	}
	next := old
	if r != nil {
		next = old.next(*r, now, c.cfg.Name)
	} else {
		next.Problem, next.At, next.Edge = unreadable, now, c.cfg.Name
	}
	next.Connector = k.ID
	if !next.says(old) {
		return
	}
	l.fresh[k.Name] = next
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (c *Control) deviceRecord(name string) deviceRecord {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return c.model.devices[name]
}

func (l *deviceLog) take() (names []string, ops []state.Op) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for name, v := range l.fresh {
		if len(ops) == maxOps {
			break
		}
		names, ops = append(names, name), append(ops, put(prefixDevice+name, v))
	}
	return names, ops
}

// written forgets what was written, unless it has changed again.
func (l *deviceLog) written(names []string, ops []state.Op) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, name := range names {
		if string(put(prefixDevice+name, l.fresh[name]).Value) == string(ops[i].Value) {
			delete(l.fresh, name)
		}
	}
}

// recordDevices writes what is collected until ctx ends.
func (c *Control) recordDevices(ctx context.Context) {
	for {
		select {
		case <-c.deviceLog.wake:
		case <-ctx.Done():
			return
		}
		for {
			sleep(ctx, devicesPause)
			names, ops := c.deviceLog.take()
			if len(ops) == 0 || ctx.Err() != nil {
				break
			}
			if _, err := c.cfg.Store.Txn(ctx, nil, ops); err != nil {
				c.log.Warn("reports of devices not written, will try again", "err", err)
				sleep(ctx, followPause)
				continue
			}
			c.deviceLog.written(names, ops)
		}
	}
}

// watchFailures pauses rollouts of which more devices gave up than may, until ctx ends.
func (c *Control) watchFailures(ctx context.Context) {
	for {
		select {
		case <-c.failing:
		case <-ctx.Done():
			return
		}
		for _, name := range c.failedRollouts() {
			if err := c.pauseFailed(ctx, name); err != nil && ctx.Err() == nil {
				c.log.Error("rollout with failures not paused, will try again", "rollout", name, "err", err)
				sleep(ctx, followPause)
				c.markFailures()
			}
		}
		sleep(ctx, devicesPause)
	}
}

// markFailures asks for a look at the failures. It never blocks.
func (c *Control) markFailures() {
	select {
	case c.failing <- struct{}{}:
	default:
	}
}

// failedRollouts returns the running rollouts that have too many failures.
func (c *Control) failedRollouts() (names []string) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	var failures map[string]int
	for _, r := range m.rolloutOrder {
		if r.Config.Paused {
			continue
		}
		if failures == nil {
			failures = m.failuresLocked()
		}
		if failures[r.Config.Name] > r.Config.MaxFailures {
			names = append(names, r.Config.Name)
		}
	}
	return names
}

// failuresLocked counts, for each rollout, the devices that it has told to update and that gave up.
func (m *model) failuresLocked() map[string]int {
	n := map[string]int{}
	for name, d := range m.devices {
		if d.Failed.Version == "" {
			continue
		}
		k, ok := m.connectors[name]
		for i := range m.rolloutOrder {
			if r := &m.rolloutOrder[i].Config; ok && d.failed(r, k) {
				n[r.Name]++
			}
		}
	}
	return n
}

// failed reports whether the device behind k counts as one of the rollout's failures.
func (d *deviceRecord) failed(r *RolloutConfig, k Connector) bool {
	return d.Failed.Version == r.Version && d.Failed.At.After(r.CountFrom) && d.Connector == k.ID && k.Revoked.IsZero() && r.selects(k) && r.has(k)
}

func (c *Control) pauseFailed(ctx context.Context, name string) error {
	paused := 0
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		old, ok := m.rollouts[name]
		n := m.failuresLocked()[name]
		if paused = 0; !ok || old.Config.Paused || n <= old.Config.MaxFailures {
			return nil, nil // another edge was faster, or an operator
		}
		paused = n
		r := old.Config
		r.Events = append([]RolloutEvent(nil), r.Events...)
		r.Paused, r.Reason = true, failuresReason+count(n)+", where "+count(r.MaxFailures)+" may"
		r.happened(c.now(), "paused by itself: "+r.Reason)
		return rolloutShelf.replace(m, r, 0, c.now())
	})
	if err == nil && paused > 0 {
		c.log.Warn("rollout paused, devices gave the update up", "rollout", name, "failures", paused)
	}
	return err
}

// failuresReason begins the reason of rollouts that were paused by themselves.
const failuresReason = "too many devices gave the update up: "

func (r *RolloutConfig) stopped() bool {
	return r.Paused && strings.HasPrefix(r.Reason, failuresReason)
}

func percent(n int) string { return strconv.Itoa(n) + " %" }
func count(n int) string   { return strconv.Itoa(n) }
