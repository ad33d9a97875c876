package ingress

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

// ErrNoService says that no rule leads from a flow of bytes or packets to a service that carries such.
var ErrNoService = errors.New("no ingress rule for this host carries this")

// Dial connects a flow of bytes: the first rule for f.Host without a path must lead to tcp:// or unix:. The caller copies
// between the result and the flow; see [tunnel.Splice]. Errors are [ErrNoService], [ErrDenied], ctx's, or those of the
// network.
func (h *Handler) Dial(ctx context.Context, f tunnel.Flow) (tunnel.Conn, error) {
	i, r, err := h.match(f)
	if err != nil {
		return nil, err
	}
	t := r.config.Targets()[i]
	switch t.Service.Scheme {
	case ingressconf.TCP, ingressconf.Unix:
		conn, err := h.dialer.dial(ctx, t, r.source == SourceRemote, f.Visitor, r.paces[i])
		if err != nil {
			return nil, err // not conn, which would be an interface that holds nil
		}
		return conn, nil
	}
	return nil, fmt.Errorf("%w: ingress[%d] leads to %s", ErrNoService, i, t.Service)
}

// match returns the rule for a flow without a path, and the rules that it is one of.
func (h *Handler) match(f tunnel.Flow) (int, *rules, error) {
	host, err := ingressconf.CanonicalHost(f.Host)
	if err != nil {
		return 0, nil, fmt.Errorf("%w: %w", ErrNoService, err)
	}
	r := h.rules.Load()
	i, t := r.config.MatchFlow(host)
	if t == nil {
		return 0, nil, ErrNoService
	}
	return i, r, nil
}
