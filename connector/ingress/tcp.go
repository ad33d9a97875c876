package ingress

import (
	"context"
	"errors"
	"fmt"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

// ErrNoService says that no rule leads from a flow of bytes to a service that carries bytes.
var ErrNoService = errors.New("no ingress rule for this host carries bytes")

// Dial connects a flow of bytes: the first rule for f.Host without a path must lead to tcp:// or unix:. The caller copies
// between the result and the flow; see [tunnel.Splice]. Errors are [ErrNoService], [ErrDenied], ctx's, or those of the
// network.
func (h *Handler) Dial(ctx context.Context, f tunnel.Flow) (tunnel.Conn, error) {
	host, err := ingressconf.CanonicalHost(f.Host)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoService, err)
	}
	r := h.rules.Load()
	i, t := r.config.MatchFlow(host)
	if t == nil {
		return nil, ErrNoService
	}
	switch t.Service.Scheme {
	case ingressconf.TCP, ingressconf.Unix:
		return h.dialer.dial(ctx, t, r.source == SourceRemote, f.Visitor)
	}
	return nil, fmt.Errorf("%w: ingress[%d] leads to %s", ErrNoService, i, t.Service)
}
