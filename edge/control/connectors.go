package control

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// sessionsPerEdge is how many sessions a healthy connector process has to each edge that it knows, with consecutive
// indexes from a multiple of it. An edge that a connector knows by two addresses sees two such groups.
const sessionsPerEdge = 4

// maxSessionsPerConnector bounds the sessions of one identity: two processes with a few groups each, and room for
// reconnecting.
const maxSessionsPerConnector = 16 * sessionsPerEdge

// statusRevoked is the status of a connector that may not come in.
const statusRevoked = "revoked"

// Admit decides whether a connector with a valid certificate gets a session: it must be enrolled, not revoked, its
// tunnel must be there, and the certificate must come from the present enrolment. It is made for
// [tunnel.ListenConfig].
func (c *Control) Admit(ctx context.Context, peer mtls.Identity, cert *x509.Certificate, _ tunnel.Registration) error {
	k, err := c.admitted(peer)
	if errors.Is(err, tunnel.ErrUnknown) || errors.Is(err, tunnel.ErrRevoked) { // enrolled through another edge just now?
		c.catchUp(ctx)
		k, err = c.admitted(peer)
	}
	if err != nil {
		return err
	}
	if cert.NotBefore.Before(k.ValidFrom) {
		return fmt.Errorf("control: the certificate of %s is from an earlier enrolment: %w", peer, tunnel.ErrRevoked)
	}
	if n := c.reg.countOf(k.Name); n >= maxSessionsPerConnector {
		return fmt.Errorf("control: %s has %d sessions, which is the limit: %w", peer, n, tunnel.ErrBusy)
	}
	return nil
}

// admitted returns the record of peer if it may come in now.
func (c *Control) admitted(peer mtls.Identity) (Connector, error) {
	if peer.Kind != mtls.KindConnector || peer.TrustDomain != c.cfg.Authority.TrustDomain() {
		return Connector{}, fmt.Errorf("control: %s is no connector of %s: %w", peer, c.cfg.Authority.TrustDomain(), tunnel.ErrNotAllowed)
	}
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	k, ok := m.connectors[peer.Name]
	if !ok {
		return Connector{}, fmt.Errorf("control: %s is not enrolled: %w", peer, tunnel.ErrUnknown)
	}
	if !k.Revoked.IsZero() {
		return Connector{}, fmt.Errorf("control: %s was revoked: %w", peer, tunnel.ErrRevoked)
	}
	if _, ok := m.tunnels[k.Tunnel]; !ok {
		return Connector{}, fmt.Errorf("control: the tunnel of %s is gone: %w", peer, tunnel.ErrUnknown)
	}
	return k, nil
}

// Renew issues a new certificate to an enrolled connector that is not revoked. It is made for [tunnel.ListenConfig].
func (c *Control) Renew(_ context.Context, peer mtls.Identity, csrDER []byte) ([][]byte, error) {
	if _, err := c.admitted(peer); err != nil {
		return nil, err
	}
	chain, leaf, err := c.issue(csrDER, peer)
	if err != nil {
		return nil, err
	}
	c.log.Info("connector certificate renewed", "peer", peer.String(), "not_after", leaf.NotAfter)
	return chain, nil
}

func (c *Control) issue(csrDER []byte, id mtls.Identity) ([][]byte, *x509.Certificate, error) {
	chain, err := c.cfg.Authority.IssueCSR(csrDER, id, c.cfg.ConnectorLifetime)
	if err != nil {
		return nil, nil, fmt.Errorf("control: issue a certificate for %s: %w (%w)", id, tunnel.ErrBadRequest, err)
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, nil, fmt.Errorf("control: issue a certificate for %s: %w", id, err)
	}
	return chain, leaf, nil
}

// Connectors returns all connectors, sorted by name, those of the tunnel ref (name or id) if ref is not empty.
func (c *Control) Connectors(ref string) ([]ConnectorView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	if ref != "" {
		t, err := m.tunnelLocked(ref)
		if err != nil {
			return nil, err
		}
		return c.connectorViewsLocked(m.connectorsOfTunnel[t.ID]), nil
	}
	all := make(set, len(m.connectors))
	for name := range m.connectors {
		all[name] = struct{}{}
	}
	return c.connectorViewsLocked(all), nil
}

func (c *Control) connectorViewsLocked(names set) []ConnectorView {
	list := make([]ConnectorView, 0, len(names))
	works := map[string]work{} // by tunnel
	for name := range names {
		k := c.model.connectors[name]
		w, ok := works[k.Tunnel]
		if !ok {
			w = c.workOf(k.Tunnel)
			works[k.Tunnel] = w
		}
		list = append(list, c.connectorViewOfLocked(k, w))
	}
	slices.SortFunc(list, func(a, b ConnectorView) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

func (c *Control) connectorViewLocked(k Connector) ConnectorView {
	return c.connectorViewOfLocked(k, c.workOf(k.Tunnel))
}

func (c *Control) connectorViewOfLocked(k Connector, w work) ConnectorView {
	v := ConnectorView{Connector: k, TunnelName: c.model.tunnels[k.Tunnel].Name, Status: Inactive, Sessions: c.reg.viewsOf(k)}
	if s, ok := c.model.seen[k.Name]; ok && !s.Last.Before(k.Created) {
		v.Status, v.LastSeen, v.Origin, v.Version, v.Hostname = Down, s.Last, s.Origin, s.Version, s.Hostname
	}
	if status, up := w.status(k.Name); up {
		v.Status, v.LastSeen, v.Elsewhere = status, c.now(), w.elsewhereOf(k.Name)
	}
	if n := len(v.Sessions); n > 0 {
		v.Origin, v.Version, v.Config = v.Sessions[n-1].Remote, v.Sessions[n-1].Version, c.configs.view(k.ID)
	}
	if !k.Revoked.IsZero() {
		v.Status = statusRevoked
	}
	return v
}

// RevokeConnector refuses the connector name from now on: its sessions end, new ones and renewals are refused. A name
// that is revoked can be enrolled again with a new join token; old certificates stay refused.
func (c *Control) RevokeConnector(ctx context.Context, name string) (ConnectorView, error) {
	if err := need("a connector", name); err != nil {
		return ConnectorView{}, err
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		k, ok := m.connectors[name]
		if !ok {
			return nil, refusal(CodeNotFound, "'connector list' shows those that there are", "there is no connector %q", clip(name))
		}
		if !k.Revoked.IsZero() {
			return nil, refusal(CodeRevoked, "", "connector %q was revoked on %s", name, k.Revoked.Format("2006-01-02 15:04:05 MST"))
		}
		k.Revoked = c.now()
		return []state.Op{put(prefixConn+name, k)}, nil
	})
	if err != nil {
		return ConnectorView{}, err
	}
	c.log.Info("connector revoked", "peer", name)
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return c.connectorViewLocked(c.model.connectors[name]), nil
}
