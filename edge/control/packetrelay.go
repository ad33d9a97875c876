package control

import (
	"context"
	"errors"
	"io"
	"slices"
	"sync"

	"github.com/keyhaven/keyhaven/tunnel"
)

// relayPackets joins a forwarded flow of packets with one over a session of this edge. If that session is lost, the
// forwarded flow is cut, so that the edge which it came from moves it to another.
func (c *Control) relayPackets(ctx, dial context.Context, in *tunnel.Incoming, q Query) {
	f := in.Flow()
	up, r, err := c.openPacket(dial, q, f.Kind, f.ID, "")
	c.dials.WithLabelValues(dialResult(err)).Inc()
	if err != nil {
		in.Reject(peerResult(err)) //nolint:errcheck // the other edge sees what comes of it
		return
	}
	defer r.forget()
	down, err := in.AcceptPacket()
	if err != nil {
		up.Close() //nolint:errcheck // nothing was sent
		return
	}
	stop := context.AfterFunc(ctx, func() { cutPackets(up); cutPackets(down) })
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { copyPackets(up, down, r.sent) })
	copyPackets(down, up, r.got)
	wg.Wait()
}

// openPacket opens a flow of packets over a session of this edge, or of another one where q allows that. The sessions of the
// connector near, which may have the flow's association, come first, as far as they are alive.
func (c *Control) openPacket(ctx context.Context, q Query, kind tunnel.FlowKind, id [16]byte, near string) (tunnel.PacketConn, *record, error) {
	ctx, cancel := c.withTimeout(ctx)
	defer cancel()
	p, list, err := c.candidates(q)
	if err != nil {
		return nil, nil, err
	}
	if len(list) == 0 {
		return nil, nil, c.down(p)
	}
	if near != "" {
		rank := func(k candidate) int {
			if k.connector() == near && !k.suspect() {
				return 0
			}
			return 1 // the list has those that are suspect last
		}
		slices.SortStableFunc(list, func(a, b candidate) int { return rank(a) - rank(b) })
	}
	p.flow.Kind, p.flow.ID = kind, id
	r, err := c.reserve(p)
	if err != nil {
		return nil, nil, err
	}
	conn, via, err := p.openInTurn(ctx, list)
	if err != nil {
		r.forget()
		return nil, nil, p.failed(err)
	}
	return conn, c.begin(r, via, conn), nil
}

// cutPackets ends a flow so that its peer does not take the end for a clean one.
func cutPackets(conn tunnel.PacketConn) {
	if r, ok := conn.(tunnel.Resetter); ok {
		r.Reset(tunnel.ResultReset)
		return
	}
	conn.Close() //nolint:errcheck // nothing to save
}

var packetBuffers = sync.Pool{New: func() any { return new([tunnel.MaxPacket]byte) }}

// copyPackets moves packets, and reports of refused ones, until src ends, and then ends dst likewise: cleanly or not.
func copyPackets(dst, src tunnel.PacketConn, count func(int)) {
	buf := packetBuffers.Get().(*[tunnel.MaxPacket]byte)
	defer packetBuffers.Put(buf)
	for {
		n, err := src.ReadPacket(buf[:])
		if refused, ok := errors.AsType[*tunnel.UnreachableError](err); ok {
			dst.Unreachable(refused.Code)
			continue
		}
		if err == nil {
			count(n)
			err = dst.WritePacket(buf[:n])
			if errors.Is(err, tunnel.ErrPacketTooLong) {
				continue
			}
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			dst.Close() //nolint:errcheck // nothing is written any more
			src.Close() //nolint:errcheck // it has ended
			return
		default:
			cutPackets(dst)
			cutPackets(src)
			return
		}
	}
}
