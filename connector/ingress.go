package connector

import (
	"context"
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/connector/ingress"
	"github.com/keyhaven/keyhaven/tunnel"
)

// permit lets ingress rules that came from an edge reach what the allow-list permits in any virtual network.
type permit struct{ *Allow }

// Name implements [ingress.Permit].
func (p permit) Name(name string, port uint16) bool {
	for v := range p.networks() {
		if p.Resolvable(v, name, port) {
			return true
		}
	}
	return false
}

// Addr implements [ingress.Permit].
func (p permit) Addr(name string, to netip.AddrPort) bool {
	for v := range p.networks() {
		if p.permits(v, name, to) {
			return true
		}
	}
	return false
}

// bindIngress gives the connector's own ingress its allow-list, and the edges' configurations to it.
func (c *Connector) bindIngress() {
	if c.cfg.Ingress == nil {
		return
	}
	c.cfg.Ingress.SetPermit(permit{c.allow.Load()})
	if c.cfg.OnConfig == nil {
		c.cfg.OnConfig = c.cfg.Ingress.Configure
	}
}

// permitIngress puts a new allow-list in force for the ingress and returns how many connections to origins were cut.
func (c *Connector) permitIngress(a *Allow) int {
	if c.cfg.Ingress == nil {
		return 0
	}
	return c.cfg.Ingress.SetPermit(permit{a})
}

// serveIngress answers a flow for the connector's own ingress and serves it to its end. An error means that the flow is not
// answered yet.
func (c *Connector) serveIngress(ctx context.Context, in incoming, start time.Time) error {
	h, f := c.cfg.Ingress, in.Flow()
	switch {
	case h == nil:
		return errKind
	case f.Service == "http":
		conn, err := in.Accept()
		if err != nil {
			c.log.Debug("flow was given up before it began", "host", f.Host, "err", err)
			return nil
		}
		c.metrics.observe(tunnel.ResultOK, time.Since(start))
		h.ServeFlow(ctx, conn, f)
		return nil
	case f.Service == "tcp":
		return c.spliceIngress(ctx, h, in, start)
	}
	return errKind
}

func (c *Connector) spliceIngress(ctx context.Context, h *ingress.Handler, in incoming, start time.Time) error {
	f := in.Flow()
	var origin tunnel.Conn
	err := c.dialIngress(ctx, in, func(ctx context.Context) (err error) {
		origin, err = h.Dial(ctx, f)
		return err
	})
	if err != nil {
		return err
	}
	c.metrics.observe(tunnel.ResultOK, time.Since(start))
	conn, err := in.Accept()
	if err != nil {
		origin.Close()
		c.log.Debug("flow was given up before it began", "host", f.Host, "err", err)
		return nil
	}
	toOrigin, fromOrigin, err := tunnel.Splice(ctx, conn, origin)
	c.metrics.toOrigin.Add(float64(toOrigin))
	c.metrics.fromOrigin.Add(float64(fromOrigin))
	if err != nil {
		c.log.Debug("flow was cut", "host", f.Host, "dur", time.Since(start), "err", err)
	}
	return nil
}

// serveIngressUDP connects a flow of packets to the ingress' service and serves it to its end. An error means that the flow is
// not answered yet.
func (c *Connector) serveIngressUDP(ctx context.Context, in incoming, start time.Time) error {
	h, f := c.cfg.Ingress, in.Flow()
	if h == nil || f.Service != "udp" {
		return errKind
	}
	flowCtx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	k := udpKey{id: f.ID, host: f.Host, port: f.Port} // no network: no flow of another kind has this key
	var sock *udpSocket
	err := c.dialIngress(ctx, in, func(ctx context.Context) (err error) {
		sock, err = c.udp.associate(ctx, k, cut, func() (*udpSocket, error) {
			o, err := h.DialPacket(ctx, f)
			if err != nil {
				return nil, err
			}
			return &udpSocket{UDPConn: o.UDPConn, to: o.To(), service: o}, nil
		})
		return err
	})
	if err != nil {
		return err
	}
	keep := c.carryUDP(flowCtx, in, sock, start)
	c.udp.leave(k, sock, keep || ctx.Err() != nil)
	return nil
}

// dialIngress calls dial, with the time that the flow has and while the edge waits.
func (c *Connector) dialIngress(ctx context.Context, in incoming, dial func(context.Context) error) error {
	f := in.Flow()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if f.Deadline > 0 {
		ctx, cancel = context.WithTimeout(ctx, f.Deadline)
		defer cancel()
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() {
		select {
		case <-in.Cancelled():
			cancel()
		case <-ctx.Done():
		}
	})
	err := dial(ctx)
	switch {
	case errors.Is(err, ingress.ErrDenied):
		err = errors.Join(errDenied, err)
	case errors.Is(err, ingress.ErrNoService):
		err = errors.Join(errNoService, err)
	}
	return err
}

// errNoService says that the ingress has nothing for a flow.
var errNoService = errors.New("the ingress has no service for this")
