package control

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// Lifetimes of join tokens.
const (
	DefaultTokenTTL = time.Hour
	MaxTokenTTL     = 7 * 24 * time.Hour
	minTokenTTL     = time.Second
	// tokenMemory is how long a token is remembered after it expired, so that whoever comes with it is told why.
	tokenMemory = 24 * time.Hour
)

// CreateToken makes a join token for the tunnel ref, a name or id, that enrols one connector within ttl; zero means
// [DefaultTokenTTL]. The token is returned this once; the store has its hash alone.
func (c *Control) CreateToken(ctx context.Context, ref string, ttl time.Duration) (JoinGrant, error) {
	if ttl == 0 {
		ttl = DefaultTokenTTL
	}
	if ttl < minTokenTTL || ttl > MaxTokenTTL {
		return JoinGrant{}, refusal(CodeInvalid, fmt.Sprintf("use %s to %s", minTokenTTL, MaxTokenTTL), "a join token cannot live for %s", ttl)
	}
	addrs := c.joinAddrs()
	if len(addrs) == 0 {
		return JoinGrant{}, refusal(CodeInvalid, "set tunnel.advertise in the edge's configuration", "the edge does not know which address connectors dial")
	}
	tok, err := mtls.NewJoinToken(c.cfg.Authority.Pin(), addrs)
	if err != nil {
		return JoinGrant{}, fmt.Errorf("control: make a join token: %w", err)
	}
	grant := JoinGrant{Token: tok.Reveal(), ID: tok.ID, Expires: c.now().Add(ttl)}
	err = c.change(ctx, func(m *model) ([]state.Op, error) {
		t, err := m.tunnelLocked(ref)
		if err != nil {
			return nil, err
		}
		ops := m.forgetTokensLocked(c.now())
		if len(m.tokens)-len(ops) >= maxTokens {
			return nil, refusal(CodeLimit, "wait until some expire", "there are %d join tokens, which is the limit", maxTokens)
		}
		grant.Tunnel = t.Name
		return append(ops, put(prefixToken+tok.ID, mtls.JoinRecord{ID: tok.ID, Hash: tok.Hash(), Tunnel: t.ID, Expires: grant.Expires})), nil
	})
	if err != nil {
		return JoinGrant{}, err
	}
	c.log.Info("join token made", "token", tok.ID, "tunnel", grant.Tunnel, "expires", grant.Expires)
	return grant, nil
}

func (m *model) forgetTokensLocked(now time.Time) (ops []state.Op) {
	for id, r := range m.tokens {
		if now.Sub(r.Expires) > tokenMemory && len(ops) < maxOps-1 {
			ops = append(ops, state.Delete(prefixToken+id))
		}
	}
	return ops
}

// Join enrols a connector: it redeems the token, once, and issues a certificate for the name that the connector
// proposes, or for one made up from the tunnel's. It is made for [tunnel.ListenConfig]; errors wrap both a
// [*tunnel.RefusedError], which the connector gets, and an [*Error], for the log.
func (c *Control) Join(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
	reply, err := c.join(ctx, r)
	if err != nil {
		return tunnel.JoinReply{}, fmt.Errorf("control: join as %q with token %q: %w (%w)", clip(r.Name), clip(r.TokenID), joinRefusal(err), err)
	}
	c.log.Info("connector enrolled", "peer", reply.Identity.String(), "tunnel", reply.Tunnel, "token", r.TokenID, "remote", r.Remote.String())
	return reply, nil
}

func joinRefusal(err error) *tunnel.RefusedError {
	switch {
	case errors.Is(err, ErrTokenUnknown):
		return tunnel.ErrTokenUnknown
	case errors.Is(err, ErrTokenUsed):
		return tunnel.ErrTokenUsed
	case errors.Is(err, ErrTokenExpired):
		return tunnel.ErrTokenExpired
	case errors.Is(err, ErrInvalid):
		return tunnel.ErrBadRequest
	case errors.Is(err, ErrExists), errors.Is(err, ErrNotFound):
		return tunnel.ErrNotAllowed
	case errors.Is(err, ErrLimit), errors.Is(err, ErrConflict), errors.Is(err, ErrUnavailable):
		return tunnel.ErrBusy
	}
	return tunnel.ErrEdgeInternal
}

func (c *Control) join(ctx context.Context, r tunnel.JoinRequest) (tunnel.JoinReply, error) {
	// The token is looked at first: nobody without one makes this edge sign or write.
	if reply, again, err := c.joinAgain(r); again {
		return reply, err
	}
	name, err := c.checkJoin(r)
	if errors.Is(err, ErrTokenUnknown) { // made at another edge just now?
		c.catchUp(ctx)
		name, err = c.checkJoin(r)
	}
	if err != nil {
		return tunnel.JoinReply{}, err
	}
	if err := c.settleRevocation(ctx, name); err != nil {
		return tunnel.JoinReply{}, err
	}
	id := c.connector(name)
	chain, leaf, err := c.issue(r.CSR, id)
	if err != nil {
		return tunnel.JoinReply{}, refusal(CodeInvalid, "", "the certificate request is not acceptable: %v", err)
	}
	k := Connector{ID: newID("cn"), Name: name, Created: c.now(), ValidFrom: leaf.NotBefore}
	reply := tunnel.JoinReply{Chain: chain, Roots: c.cfg.Authority.RootPEM(), Identity: id, Edges: c.joinAddrs()}
	err = c.change(ctx, func(m *model) ([]state.Op, error) {
		rec, t, err := m.redeemLocked(r, c.now())
		if err != nil {
			return nil, err
		}
		if err := m.nameFreeLocked(name); err != nil {
			return nil, err
		}
		rec.UsedAt, rec.UsedBy, rec.UsedKey = k.Created, name, csrKey(r.CSR)
		k.Tunnel, reply.Tunnel = t.ID, t.Name
		return []state.Op{put(prefixToken+rec.ID, rec), put(prefixConn+name, k)}, nil
	})
	return reply, err
}

// joinAgain answers a connector that the token has enrolled and that comes with it and the same key once more, before the
// token expires: the answer never reached it, or was lost as its power went. Nothing is stored, and the connector stays the one
// that it is. It reports whether the request is such a one.
func (c *Control) joinAgain(r tunnel.JoinRequest) (tunnel.JoinReply, bool, error) {
	c.model.mu.RLock()
	rec := c.model.tokens[r.TokenID] // of the zero record, the secret is never right
	k, t := c.model.connectors[rec.UsedBy], c.model.tunnels[rec.Tunnel]
	c.model.mu.RUnlock()
	now := c.now()
	if !errors.Is(rec.Redeem(now, r.TokenID, r.Secret), mtls.ErrTokenUsed) || !now.Before(rec.Expires) ||
		rec.UsedKey == "" || rec.UsedKey != csrKey(r.CSR) ||
		!k.Created.Equal(rec.UsedAt) || !k.Revoked.IsZero() || k.Tunnel != rec.Tunnel {
		return tunnel.JoinReply{}, false, nil
	}
	id := c.connector(k.Name)
	chain, _, err := c.issue(r.CSR, id)
	if err != nil {
		return tunnel.JoinReply{}, true, refusal(CodeInvalid, "", "the certificate request is not acceptable: %v", err)
	}
	return tunnel.JoinReply{Chain: chain, Roots: c.cfg.Authority.RootPEM(), Identity: id, Tunnel: t.Name, Edges: c.joinAddrs()}, true, nil
}

// csrKey is the SHA-256 of the public key of a certificate request, in hexadecimal; "" for what is none.
func csrKey(der []byte) string {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	return hex.EncodeToString(sum[:])
}

// connector returns the identity of the connector name.
func (c *Control) connector(name string) mtls.Identity {
	return mtls.Identity{TrustDomain: c.cfg.Authority.TrustDomain(), Kind: mtls.KindConnector, Name: name}
}

// settleRevocation waits until certificates that are issued from now on begin later than all that an earlier, revoked
// enrolment of the name got: certificates count in seconds. It is for enrolling a name in the second of its revocation.
func (c *Control) settleRevocation(ctx context.Context, name string) error {
	c.model.mu.RLock()
	old := c.model.connectors[name]
	c.model.mu.RUnlock()
	next := old.Revoked.Truncate(time.Second).Add(time.Second)
	if old.Revoked.IsZero() || !time.Now().Before(next) {
		return nil
	}
	sleep(ctx, time.Until(next))
	return ctx.Err()
}

// checkJoin decides on the request without using the token up, and returns the connector's name.
func (c *Control) checkJoin(r tunnel.JoinRequest) (string, error) {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	_, t, err := c.model.redeemLocked(r, c.now())
	if err != nil {
		return "", err
	}
	name := r.Name
	if name == "" {
		suffix := newID("")[1:7]
		name = t.Name[:min(len(t.Name), maxName-len(suffix)-1)] + "-" + suffix
	}
	if err := c.connector(name).Validate(); err != nil {
		return "", refusal(CodeInvalid, "use up to 64 of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit", "%q is not a name for a connector", clip(name))
	}
	return name, c.model.nameFreeLocked(name)
}

func (m *model) nameFreeLocked(name string) error {
	old, had := m.connectors[name]
	if had && old.Revoked.IsZero() {
		return refusal(CodeExists, "choose another name, or revoke that connector first", "there is a connector %q already", name)
	}
	if !had && len(m.connectors) >= maxConnectors {
		return refusal(CodeLimit, "delete unused tunnels", "there are %d connectors, which is the limit", maxConnectors)
	}
	return nil
}

// redeemLocked returns the record of the request's token, and its tunnel, if it can be used now.
func (m *model) redeemLocked(r tunnel.JoinRequest, now time.Time) (mtls.JoinRecord, Tunnel, error) {
	rec := m.tokens[r.TokenID] // the zero record redeems nothing
	if err := rec.Redeem(now, r.TokenID, r.Secret); err != nil {
		return rec, Tunnel{}, tokenRefusal(rec, err)
	}
	t, ok := m.tunnels[rec.Tunnel]
	if !ok {
		return rec, t, refusal(CodeNotFound, "make a new token", "the tunnel of the join token is gone")
	}
	return rec, t, nil
}

func tokenRefusal(rec mtls.JoinRecord, err error) error {
	const remedy = "make a new one with 'tunnel token create NAME'"
	switch {
	case errors.Is(err, mtls.ErrTokenUsed):
		return refusal(CodeTokenUsed, remedy, "the join token enrolled connector %q at %s", rec.UsedBy, rec.UsedAt.Format(time.RFC3339))
	case errors.Is(err, mtls.ErrTokenExpired):
		return refusal(CodeTokenExpired, remedy, "the join token expired at %s", rec.Expires.Format(time.RFC3339))
	}
	return refusal(CodeTokenUnknown, remedy, "this edge has no such join token")
}
