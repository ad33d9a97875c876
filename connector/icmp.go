package connector

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// An echoSocket sends echo requests to one host and receives what comes of them. One goroutine may send while another
// receives.
type echoSocket interface {
	// send sends one request. An *tunnel.UnreachableError says that this host knows no way.
	send(r tunnel.EchoRequest) error
	// receive waits for the next answer. Its payload is the caller's. After close it fails.
	receive() (tunnel.EchoReply, error)
	close() error
}

// errEchoForbidden says that this host does not let the process send echo requests.
var errEchoForbidden = errors.New("this host does not let the connector send echo requests")

// CheckEcho reports whether this host lets the connector send echo requests (ping), and if not, what to do about it.
func CheckEcho() error {
	s, err := openEcho(netip.AddrFrom4([4]byte{127, 0, 0, 1}))
	if errors.Is(err, errEchoForbidden) {
		return fmt.Errorf("connector: %w; %s", err, echoRemedy)
	}
	if err != nil {
		return nil // it says nothing about permission
	}
	return s.close()
}

// warnEcho says once, at start-up, that echoes will be refused.
func (c *Connector) warnEcho() {
	if err := CheckEcho(); err != nil {
		c.log.Warn("pings will be refused", "err", err)
	}
}

// An icmpFamily has what the two versions of ICMP differ in. See RFC 792 and RFC 4443.
type icmpFamily struct {
	request, reply byte
	unreachable    byte
	timeExceeded   byte
	tooBig         byte // zero: a code of unreachable
}

var (
	icmp4 = icmpFamily{request: 8, reply: 0, unreachable: 3, timeExceeded: 11}
	icmp6 = icmpFamily{request: 128, reply: 129, unreachable: 1, timeExceeded: 3, tooBig: 2}
)

func icmpOf(a netip.Addr) icmpFamily {
	if a.Is4() {
		return icmp4
	}
	return icmp6
}

// unreachable6 are the codes of RFC 4443, section 3.1, as those of RFC 792.
var unreachable6 = map[byte]byte{
	0: tunnel.UnreachableNet, 1: tunnel.UnreachableProhibited, 2: tunnel.UnreachableHost, 3: tunnel.UnreachableHost,
	4: tunnel.UnreachablePort, 5: tunnel.UnreachableProhibited, 6: tunnel.UnreachableNet,
}

// report says what an error message of routers means; ok is false if it is none that flows report.
func (f icmpFamily) report(typ, code byte) (t tunnel.EchoType, c byte, ok bool) {
	switch {
	case typ == f.timeExceeded:
		return tunnel.EchoTimeExceeded, code, true
	case f.tooBig != 0 && typ == f.tooBig:
		return tunnel.EchoUnreachable, tunnel.UnreachableTooBig, true
	case typ == f.unreachable && f == icmp6:
		return tunnel.EchoUnreachable, unreachable6[code], true
	case typ == f.unreachable:
		return tunnel.EchoUnreachable, code, true
	}
	return 0, 0, false
}

// echoHeaderLen is type, code, checksum, identifier, sequence number.
const echoHeaderLen = 8

// appendEcho appends an echo request. The checksum is filled in for IPv4; for IPv6 the kernel does it.
func (f icmpFamily) appendEcho(dst []byte, id, seq uint16, payload []byte) []byte {
	start := len(dst)
	dst = append(dst, f.request, 0, 0, 0)
	dst = binary.BigEndian.AppendUint16(dst, id)
	dst = binary.BigEndian.AppendUint16(dst, seq)
	dst = append(dst, payload...)
	if f == icmp4 {
		binary.BigEndian.PutUint16(dst[start+2:], internetChecksum(dst[start:]))
	}
	return dst
}

// internetChecksum is that of RFC 1071.
func internetChecksum(b []byte) uint16 {
	var sum uint32
	for ; len(b) > 1; b = b[2:] {
		sum += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		sum += uint32(b[0]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// parseEcho reads an echo message of type typ.
func parseEcho(b []byte, typ byte) (id, seq uint16, payload []byte, ok bool) {
	if len(b) < echoHeaderLen || b[0] != typ || b[1] != 0 {
		return 0, 0, nil, false
	}
	return binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:]), b[echoHeaderLen:], true
}

// sentTimes remembers when the last requests were sent.
type sentTimes struct {
	mu   sync.Mutex // guards the field below
	last [64]struct {
		seq uint16
		at  time.Time
	}
}

func (s *sentTimes) note(seq uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := &s.last[int(seq)%len(s.last)]
	e.seq, e.at = seq, time.Now()
}

// since is how long ago seq was sent, and whether that is known.
func (s *sentTimes) since(seq uint16) (time.Duration, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.last[int(seq)%len(s.last)]
	if e.seq != seq || e.at.IsZero() {
		return 0, false
	}
	return time.Since(e.at), true
}

// serveEcho opens a flow's echo socket, accepts the flow, and serves it to its end. An error means that the flow is not
// answered yet.
func (c *Connector) serveEcho(ctx context.Context, in incoming, start time.Time) error {
	t, err := parseTarget(in.Flow())
	if err != nil {
		return err
	}
	t.echo, t.port = true, anyPort
	to, err := c.locate(ctx, in, t)
	if err != nil {
		return err
	}
	sock, err := openEcho(to[0].Addr())
	if err != nil {
		if errors.Is(err, errEchoForbidden) {
			err = fmt.Errorf("%w; %s", err, echoRemedy)
		}
		return err
	}
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	f := &flow{target: t, to: to[0], cut: cut}
	if !c.flows.add(f, &c.allow) {
		return errors.Join(errDenied, sock.close())
	}
	defer c.flows.remove(f)
	c.metrics.observe(tunnel.ResultOK, time.Since(start))
	conn, err := in.AcceptPacket()
	if err != nil {
		c.log.Debug("flow was given up before it began", "vnet", t.vnet, "to", to[0].Addr(), "err", err)
		return sock.close()
	}
	e := &echoFlow{conn: conn, sock: sock, idle: newIdle(c.cfg.UDPIdle, cut), packets: c.metrics.icmp}
	err = e.carry(ctx)
	c.log.Debug("flow of echoes ended", "vnet", t.vnet, "to", to[0].Addr(), "dur", time.Since(start), "err", err)
	return nil
}

// An echoFlow carries requests from a flow to a socket and answers back.
type echoFlow struct {
	conn    tunnel.PacketConn
	sock    echoSocket
	idle    *idle
	packets *packetCounters
}

// carry returns when the flow has ended, and says why.
func (e *echoFlow) carry(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { e.conn.Close() })
	var wg sync.WaitGroup
	wg.Go(e.answers)
	err := e.requests()
	stop()
	e.idle.stop()
	e.sock.close() //nolint:errcheck // nothing to lose
	wg.Wait()
	e.conn.Close() //nolint:errcheck // nothing to lose
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (e *echoFlow) requests() error {
	for {
		b, err := tunnel.ReceivePacket(e.conn)
		if err != nil {
			return err
		}
		e.idle.touch()
		r, err := tunnel.ParseEchoRequest(b)
		if err != nil {
			e.packets.bad.Inc()
			continue
		}
		e.packets.out(len(b))
		if err := e.sock.send(r); err != nil {
			u := &tunnel.UnreachableError{Code: tunnel.UnreachableHost}
			errors.As(err, &u)
			e.conn.Unreachable(u.Code)
		}
	}
}

func (e *echoFlow) answers() {
	var buf []byte
	for {
		r, err := e.sock.receive()
		if err != nil {
			return
		}
		e.idle.touch()
		buf = tunnel.AppendEchoReply(buf[:0], r)
		e.packets.in(len(buf))
		if e.conn.WritePacket(buf) != nil {
			return
		}
	}
}
