package ingress

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A PacketOrigin is a connected UDP socket to a service, with its rule's bandwidth.
type PacketOrigin struct {
	*net.UDPConn
	to     netip.AddrPort
	pace   *pace
	forget func()
}

// To is the service's address.
func (o *PacketOrigin) To() netip.AddrPort { return o.to }

// Close closes the socket.
func (o *PacketOrigin) Close() error {
	o.forget()
	return o.UDPConn.Close()
}

// Reset closes the socket when the service is not permitted any more.
func (o *PacketOrigin) Reset(tunnel.Result) {
	o.Close() //nolint:errcheck // nothing to save
}

// ToService returns what packets of visitors pass on their way to send. The caller closes it.
func (o *PacketOrigin) ToService(send func([]byte) error) *Lane {
	if o.pace == nil {
		return (*pace)(nil).lane(nil, send)
	}
	return o.pace.lane(o.pace.toService, send)
}

// ToVisitor returns what packets of the service pass on their way to send. The caller closes it.
func (o *PacketOrigin) ToVisitor(send func([]byte) error) *Lane {
	if o.pace == nil {
		return (*pace)(nil).lane(nil, send)
	}
	return o.pace.lane(o.pace.toVisitor, send)
}

// DialPacket connects a flow of packets: the first rule for f.Host without a path must lead to udp://. Errors are as those of
// [Handler.Dial].
func (h *Handler) DialPacket(ctx context.Context, f tunnel.Flow) (*PacketOrigin, error) {
	i, r, err := h.match(f)
	if err != nil {
		return nil, err
	}
	t := r.config.Targets()[i]
	if t.Service.Scheme != ingressconf.UDP {
		return nil, fmt.Errorf("%w: ingress[%d] leads to %s", ErrNoService, i, t.Service)
	}
	ctx, cancel := context.WithTimeout(ctx, t.Origin.ConnectTimeout)
	defer cancel()
	o, err := h.dialer.dialPacket(ctx, t.Service, r.source == SourceRemote)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", t.Service, err)
	}
	o.pace = r.paces[i]
	return o, nil
}
