package control

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/state"
)

// DefaultUnseen is how long a connector may be away before a cleanup takes it for gone.
const DefaultUnseen = 30 * 24 * time.Hour

// minUnseen keeps a cleanup from removing connectors that are only restarting.
const minUnseen = time.Hour

// revokedRest is how long the record of a revoked connector is kept at least. Certificates count in seconds: a name that
// is enrolled anew in the second of its revocation must find the record, which makes it wait.
const revokedRest = time.Minute

// CleanupSpec says what to clean up.
type CleanupSpec struct {
	Tunnel string        // name or id; empty: all tunnels
	Unseen time.Duration // connectors that were away for longer go; zero: [DefaultUnseen]
	DryRun bool          // only say what would go
}

// Reasons for which a cleanup removes something.
const (
	CleanRevoked = "revoked"
	CleanUnseen  = "unseen"
	CleanNever   = "never_seen"
	CleanUsed    = "used"
	CleanExpired = "expired"
)

// A Cleaned is one thing that a cleanup removes.
type Cleaned struct {
	Kind       string    `json:"kind"` // "connector" or "token"
	Name       string    `json:"name"` // a connector's name or a token's id
	TunnelName string    `json:"tunnel_name"`
	Reason     string    `json:"reason"`
	Since      time.Time `json:"since,omitzero"` // when that began
}

// Cleanup removes connectors that are revoked or were away for long, and join tokens that nobody can use. Connectors that
// have a session on any edge stay, as do those that an endpoint of a pool names. It returns what it removed, or would.
func (c *Control) Cleanup(ctx context.Context, s CleanupSpec) ([]Cleaned, error) {
	if s.Unseen == 0 {
		s.Unseen = DefaultUnseen
	}
	if s.Unseen < minUnseen {
		return nil, refusal(CodeInvalid, "use at least "+minUnseen.String(), "%s is too short: connectors that restart would be removed", s.Unseen)
	}
	removed := []Cleaned{}
	for {
		var found []Cleaned
		err := c.change(ctx, func(m *model) (ops []state.Op, err error) {
			if found, err = c.cleanableLocked(s); err != nil || s.DryRun {
				return nil, err
			}
			found = found[:min(len(found), maxOps/3)] // a connector takes three operations
			for _, f := range found {
				ops = append(ops, m.cleanOpsLocked(f)...)
			}
			return ops, nil
		})
		if err != nil {
			return removed, err
		}
		removed = append(removed, found...)
		if s.DryRun || len(found) == 0 {
			return removed, nil
		}
		for _, f := range found {
			c.log.Info("cleaned up", "op", f.Kind, "peer", f.Name, "tunnel", f.TunnelName, "reason", f.Reason)
		}
	}
}

func (m *model) cleanOpsLocked(f Cleaned) []state.Op {
	if f.Kind == "token" {
		return []state.Op{state.Delete(prefixToken + f.Name)}
	}
	ops := []state.Op{state.Delete(prefixConn + f.Name)}
	if _, ok := m.seen[f.Name]; ok {
		ops = append(ops, state.Delete(prefixSeen+f.Name))
	}
	if _, ok := m.devices[f.Name]; ok {
		ops = append(ops, state.Delete(prefixDevice+f.Name))
	}
	return ops
}

// cleanableLocked returns what a cleanup removes, connectors first.
func (c *Control) cleanableLocked(s CleanupSpec) ([]Cleaned, error) {
	m, now := c.model, c.now()
	only, err := m.tunnelIDLocked(s.Tunnel)
	if err != nil {
		return nil, err
	}
	found, pinned := []Cleaned{}, m.pinnedLocked()
	for _, k := range m.connectors {
		if only != "" && k.Tunnel != only || pinned[k.Name] || pinned[k.ID] {
			continue
		}
		if f, ok := c.cleanConnectorLocked(k, s.Unseen, now); ok {
			found = append(found, f)
		}
	}
	for _, r := range m.tokens {
		status := tokenStatus(r, now)
		if status == TokenOpen || only != "" && r.Tunnel != only {
			continue
		}
		f := Cleaned{Kind: "token", Name: r.ID, TunnelName: m.tunnels[r.Tunnel].Name, Reason: CleanExpired, Since: r.Expires}
		if status == TokenUsed {
			f.Reason, f.Since = CleanUsed, r.UsedAt
		}
		found = append(found, f)
	}
	slices.SortFunc(found, func(a, b Cleaned) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.TunnelName, b.TunnelName), cmp.Compare(a.Name, b.Name))
	})
	return found, nil
}

// pinnedLocked returns the names and ids of connectors that endpoints of pools name.
func (m *model) pinnedLocked() map[string]bool {
	pinned := map[string]bool{}
	for _, p := range m.pools {
		for _, e := range p.Config.Endpoints {
			pinned[e.Connector] = true
		}
	}
	return pinned
}

func (c *Control) cleanConnectorLocked(k Connector, unseen time.Duration, now time.Time) (Cleaned, bool) {
	v := c.connectorViewLocked(k)
	f := Cleaned{Kind: "connector", Name: k.Name, TunnelName: v.TunnelName}
	switch {
	case !k.Revoked.IsZero():
		f.Reason, f.Since = CleanRevoked, k.Revoked
		return f, now.Sub(k.Revoked) > revokedRest
	case v.Status == Healthy || v.Status == Degraded:
		return f, false
	case v.LastSeen.IsZero():
		f.Reason, f.Since = CleanNever, k.Created
	default:
		f.Reason, f.Since = CleanUnseen, v.LastSeen
	}
	return f, now.Sub(f.Since) > unseen
}
