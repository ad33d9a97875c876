package control

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/state"
)

const (
	prefixRollout = "rollouts/" // + name
	maxRollouts   = 64
	// maxRolloutTunnels and maxRolloutEvents bound what one record holds; older events are forgotten.
	maxRolloutTunnels = 256
	maxRolloutEvents  = 32
)

// A RolloutConfig has a part of the devices update to a version, and the others wait.
type RolloutConfig struct {
	Name    string `json:"name"`
	Version string `json:"version"`
	Channel string `json:"channel,omitempty"` // of the devices' update source; empty: each device's own
	// Percent is how many of the devices are to update, 0 to 100. Who is in at one percentage is in at every higher one.
	Percent int `json:"percent"`
	// Tunnels are the ids of those whose devices it is about. Empty: all devices.
	Tunnels []string `json:"tunnels"`
	// MaxFailures is how many devices may give the update up before the rollout is paused by itself.
	MaxFailures int    `json:"max_failures"`
	Salt        string `json:"salt"` // makes each rollout begin with other devices
	Paused      bool   `json:"paused"`
	// Reason is why it is paused.
	Reason string `json:"reason,omitempty"`
	// CountFrom is since when failures count: the rollout's beginning, or when it was last resumed.
	CountFrom time.Time `json:"count_from"`
	// Events are what was done with it, the newest last.
	Events []RolloutEvent `json:"events"`
}

// A RolloutEvent is a change of a rollout.
type RolloutEvent struct {
	At   time.Time `json:"at"`
	What string    `json:"what"`
}

// Rollout is a stored rollout.
type Rollout = Stored[RolloutConfig]

var rolloutShelf = shelf[RolloutConfig]{"fleet rollout", prefixRollout, maxRollouts, func(m *model) map[string]Rollout { return m.rollouts },
	func(r *RolloutConfig) string { return r.Name }}

// A RolloutSpec is what a new rollout is made from.
type RolloutSpec struct {
	Name        string   `json:"name"`
	Version     string   `json:"version"`
	Channel     string   `json:"channel,omitempty"`
	Percent     int      `json:"percent"`
	Tunnels     []string `json:"tunnels,omitempty"` // names or ids; empty: all devices
	MaxFailures int      `json:"max_failures"`
}

// A RolloutChange is what to change of a rollout; nil fields stay.
type RolloutChange struct {
	Percent     *int  `json:"percent,omitempty"`
	MaxFailures *int  `json:"max_failures,omitempty"`
	Paused      *bool `json:"paused,omitempty"`
}

// CreateRollout begins a rollout. It goes before those that are there: see [Control.Rollouts].
func (c *Control) CreateRollout(ctx context.Context, s RolloutSpec) (RolloutView, error) {
	if err := s.check(); err != nil {
		return RolloutView{}, err
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		r := RolloutConfig{Name: s.Name, Version: s.Version, Channel: s.Channel, Percent: s.Percent, MaxFailures: s.MaxFailures,
			Salt: rand.Text(), CountFrom: c.now(), Tunnels: []string{}}
		for _, ref := range s.Tunnels {
			t, err := m.tunnelLocked(ref)
			if err != nil {
				return nil, err
			}
			r.Tunnels = append(r.Tunnels, t.ID)
		}
		slices.Sort(r.Tunnels)
		r.Tunnels = slices.Compact(r.Tunnels)
		r.happened(c.now(), "created at "+percent(s.Percent))
		return rolloutShelf.create(m, r, c.now())
	})
	return c.rolloutAfter(s.Name, err)
}

func (s RolloutSpec) check() error {
	if err := checkName("rollout", s.Name); err != nil {
		return err
	}
	if !fleet.Word(s.Version) || s.Channel != "" && !fleet.Word(s.Channel) {
		return refusal(CodeInvalid, "use up to 64 of A-Z, a-z, 0-9 and . _ ~ + -", "the version %q or the channel %q cannot be one", clip(s.Version), clip(s.Channel))
	}
	if len(s.Tunnels) > maxRolloutTunnels {
		return refusal(CodeInvalid, "name fewer, or none for all devices", "%d tunnels are named, at most %d can be", len(s.Tunnels), maxRolloutTunnels)
	}
	return checkRolloutNumbers(s.Percent, s.MaxFailures)
}

func checkRolloutNumbers(percent, failures int) error {
	if percent < 0 || percent > 100 {
		return refusal(CodeInvalid, "use 0 to 100", "%d is no percentage", percent)
	}
	if failures < 0 {
		return refusal(CodeInvalid, "use 0 to pause at the first failure", "the number of failures cannot be %d", failures)
	}
	return nil
}

// SetRollout changes a rollout that still has a revision, if that is not zero. Resuming one lets earlier failures count no
// more.
func (c *Control) SetRollout(ctx context.Context, name string, change RolloutChange, ifRevision state.Revision) (RolloutView, error) {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		old, err := rolloutShelf.at(m, name, ifRevision)
		if err != nil {
			return nil, err
		}
		r := old.Config
		r.Events = slices.Clone(r.Events)
		r.apply(change, c.now())
		if err := checkRolloutNumbers(r.Percent, r.MaxFailures); err != nil {
			return nil, err
		}
		return rolloutShelf.replace(m, r, 0, c.now())
	})
	return c.rolloutAfter(name, err)
}

func (r *RolloutConfig) apply(change RolloutChange, now time.Time) {
	if p := change.Percent; p != nil && *p != r.Percent {
		r.happened(now, "set from "+percent(r.Percent)+" to "+percent(*p))
		r.Percent = *p
	}
	if f := change.MaxFailures; f != nil && *f != r.MaxFailures {
		r.happened(now, "failures that may be: "+count(*f))
		r.MaxFailures = *f
	}
	if p := change.Paused; p != nil && *p != r.Paused {
		r.Paused = *p
		if *p {
			r.Reason = "an operator paused it"
			r.happened(now, "paused by an operator")
		} else {
			r.Reason, r.CountFrom = "", now
			r.happened(now, "resumed")
		}
	}
}

func (r *RolloutConfig) happened(at time.Time, what string) {
	r.Events = append(r.Events, RolloutEvent{At: at, What: what})
	if n := len(r.Events); n > maxRolloutEvents {
		r.Events = slices.Clone(r.Events[n-maxRolloutEvents:])
	}
}

func (c *Control) rolloutAfter(name string, err error) (RolloutView, error) {
	if err != nil {
		return RolloutView{}, err
	}
	v, err := c.Rollout(name)
	if err == nil {
		c.log.Info("rollout changed", "rollout", name, "version", v.Config.Version, "percent", v.Config.Percent, "paused", v.Config.Paused)
	}
	return v, err
}

// DeleteRollout deletes the rollout name. Devices that it was about are left to the other rollouts, or to themselves.
func (c *Control) DeleteRollout(ctx context.Context, name string, ifRevision state.Revision) error {
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		if _, err := rolloutShelf.at(m, name, ifRevision); err != nil {
			return nil, err
		}
		return []state.Op{state.Delete(prefixRollout + name)}, nil
	})
	if err == nil {
		c.log.Info("rollout deleted", "rollout", name)
	}
	return err
}

// directs reports whether a record is one that decides what devices are told.
func directs(d delta) bool { return strings.HasPrefix(d.key, prefixRollout) }

func (m *model) applyRolloutLocked(name string, d delta) error {
	err := applyStored(m.rollouts, name, d)
	m.rolloutOrder = m.rolloutOrder[:0:0]
	for _, r := range m.rollouts {
		m.rolloutOrder = append(m.rolloutOrder, r)
	}
	slices.SortFunc(m.rolloutOrder, func(a, b Rollout) int {
		return cmp.Or(b.Created.Compare(a.Created), cmp.Compare(a.Config.Name, b.Config.Name))
	})
	return err
}

// directiveLocked decides what the device behind a connector is to do. The newest rollout that has the device in it
// decides; a device that waits for its turn in a newer one may still follow an older one.
func (m *model) directiveLocked(k Connector) fleet.Directive {
	waits := fleet.Directive{Policy: fleet.Free}
	for i := range m.rolloutOrder {
		r := &m.rolloutOrder[i].Config
		switch {
		case !r.selects(k):
		case !r.has(k):
			if waits.Policy == fleet.Free {
				waits = fleet.Directive{Policy: fleet.Hold, Rollout: r.Name}
			}
		case r.Paused:
			return fleet.Directive{Policy: fleet.Hold, Rollout: r.Name}
		default:
			return fleet.Directive{Policy: fleet.Update, Version: r.Version, Channel: r.Channel, Rollout: r.Name}
		}
	}
	return waits
}

// selects reports whether the rollout is about the device behind k, whatever its percentage.
func (r *RolloutConfig) selects(k Connector) bool {
	return len(r.Tunnels) == 0 || slices.Contains(r.Tunnels, k.Tunnel)
}

// has reports whether it is the turn of the device behind k.
func (r *RolloutConfig) has(k Connector) bool {
	return r.Percent > 0 && (r.Percent >= 100 || bucket(r.Salt, k.ID) < r.Percent)
}

// bucket spreads connectors evenly over 0 to 99.
func bucket(salt, connectorID string) int {
	h := sha256.Sum256([]byte(salt + "\x00" + connectorID))
	return int(binary.BigEndian.Uint64(h[:8]) % 100)
}
