package control

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

// States of join tokens.
const (
	TokenOpen    = "open" // can be used
	TokenUsed    = "used"
	TokenExpired = "expired"
)

// A TokenView is a join token as shown, without its secret, which nobody has any more.
type TokenView struct {
	ID         string    `json:"id"`
	Tunnel     string    `json:"tunnel"` // id
	TunnelName string    `json:"tunnel_name"`
	Status     string    `json:"status"`
	Expires    time.Time `json:"expires"`
	UsedAt     time.Time `json:"used_at,omitzero"`
	UsedBy     string    `json:"used_by,omitempty"` // name of the connector that it enrolled
}

// Tokens returns the join tokens that are remembered, those of the tunnel ref (name or id) if ref is not empty, sorted by
// expiry. They are forgotten a day after they expired.
func (c *Control) Tokens(ref string) ([]TokenView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	only, err := m.tunnelIDLocked(ref)
	if err != nil {
		return nil, err
	}
	list := []TokenView{}
	now := c.now()
	for _, r := range m.tokens {
		if only == "" || r.Tunnel == only {
			list = append(list, m.tokenViewLocked(r, now))
		}
	}
	slices.SortFunc(list, func(a, b TokenView) int { return cmp.Or(a.Expires.Compare(b.Expires), cmp.Compare(a.ID, b.ID)) })
	return list, nil
}

func (m *model) tokenViewLocked(r mtls.JoinRecord, now time.Time) TokenView {
	return TokenView{ID: r.ID, Tunnel: r.Tunnel, TunnelName: m.tunnels[r.Tunnel].Name, Status: tokenStatus(r, now),
		Expires: r.Expires, UsedAt: r.UsedAt, UsedBy: r.UsedBy}
}

func tokenStatus(r mtls.JoinRecord, now time.Time) string {
	switch {
	case !r.UsedAt.IsZero():
		return TokenUsed
	case !now.Before(r.Expires):
		return TokenExpired
	}
	return TokenOpen
}

// RevokeToken makes the join token id worthless. One that has enrolled a connector is [ErrTokenUsed]: the connector is to
// be revoked then.
func (c *Control) RevokeToken(ctx context.Context, id string) (TokenView, error) {
	var view TokenView
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		r, ok := m.tokens[id]
		if !ok {
			return nil, refusal(CodeNotFound, "'tunnel token list' shows those that there are", "there is no join token %q", clip(id))
		}
		if !r.UsedAt.IsZero() {
			return nil, refusal(CodeTokenUsed, "revoke the connector, with 'connector revoke "+r.UsedBy+"'",
				"the join token enrolled connector %q at %s", r.UsedBy, r.UsedAt.Format(time.RFC3339))
		}
		view = m.tokenViewLocked(r, c.now())
		return []state.Op{state.Delete(prefixToken + id)}, nil
	})
	if err == nil {
		c.log.Info("join token revoked", "token", id, "tunnel", view.TunnelName)
	}
	return view, err
}
