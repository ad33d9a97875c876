package control

import (
	"context"

	"github.com/keyhaven/keyhaven/tunnel"
)

// Echo pings q.Host, a host behind a tunnel, and returns who answered how. Errors are as those of [Control.Dial],
// [tunnel.ErrEchoTimeout] if nobody answered in time, and a [*tunnel.UnreachableError] if the connector's host knows no way.
func (c *Control) Echo(ctx context.Context, q Query, e tunnel.EchoRequest) (tunnel.EchoReply, error) {
	q.Port, q.Class = 0, tunnel.ClassInteractive
	conn, r, err := c.openPacket(ctx, q, tunnel.KindICMP, [16]byte{}, "")
	c.dials.WithLabelValues(dialResult(err)).Inc()
	if err != nil {
		return tunnel.EchoReply{}, err
	}
	defer r.forget()
	defer conn.Close()
	r.sent(len(e.Payload))
	reply, err := tunnel.Echo(ctx, conn, e)
	r.got(len(reply.Payload))
	c.packets.echoes.WithLabelValues(echoResult(reply, err)).Inc()
	return reply, err
}

// echoResult is the label of an echo.
func echoResult(r tunnel.EchoReply, err error) string {
	switch {
	case err == tunnel.ErrEchoTimeout:
		return "timed_out"
	case err != nil:
		return "failed"
	case r.Type == tunnel.EchoReplied:
		return "ok"
	case r.Type == tunnel.EchoTimeExceeded:
		return "time_exceeded"
	}
	return "unreachable"
}
