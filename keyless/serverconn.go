package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

const (
	// keepWorkers is how many idle workers of one connection wait for more; those beyond it end.
	keepWorkers = 64
	// keepScratch is the largest buffer that a request keeps when it returns to the pool.
	keepScratch = 4 << 10
	// maxLarge is how many bytes the requests of one connection that are larger than keepScratch may hold while they are in
	// flight; beyond it the connection is not read.
	maxLarge = 4 << 20
)

// maxUnreadRefused bounds what is read of a peer whose handshake failed.
const maxUnreadRefused = 64 << 10

// Causes with which a connection's context ends.
var (
	errKilled    = errors.New("keyless: peer lost its permission")
	errDrainOver = errors.New("keyless: drain time is over")
	errConnEnded = errors.New("keyless: connection ended")
)

// A serverConn is one authenticated connection. One goroutine reads, one writes, and a worker runs for each operation
// in flight.
type serverConn struct {
	*serverLoop
	peer   Peer
	raw    net.Conn
	tls    *tls.Conn
	reader *frameReader
	writer *batchWriter

	ctx    context.Context // of the operations
	cancel context.CancelCauseFunc

	work    chan *request // unbuffered: a send finds a worker that waits, or none
	done    chan struct{} // closed when no more work comes
	workers sync.WaitGroup
	running atomic.Int32 // workers
	waiting atomic.Int32 // workers without work
	busy    atomic.Int32 // operations in the handler or waiting for their reply to be queued
	large   *semaphore.Weighted

	badPackets int // the reader's own; the first is logged
}

// A request is a Request on its way through a worker; scratch holds the bytes of its slices.
type request struct {
	Request
	id      uint32
	scratch []byte
	held    int64 // of serverConn.large
}

var requests = sync.Pool{New: func() any { return new(request) }}

// serve authenticates a connection and runs it to its end.
func (l *serverLoop) serve(ctx context.Context, raw net.Conn) {
	defer raw.Close()
	conn := tls.Server(raw, l.tls)
	hctx, cancel := context.WithTimeout(ctx, l.handshake)
	err := conn.HandshakeContext(hctx)
	cancel()
	if err != nil {
		l.refused("handshake")
		if ctx.Err() == nil { // else it is the server that ends
			l.onRefused(raw.RemoteAddr(), conn.ConnectionState(), err)
			hangUp(ctx, raw)
		}
		return
	}
	peer, err := l.identifyPeer(conn)
	if err != nil {
		l.refused("identity")
		l.onRefused(raw.RemoteAddr(), conn.ConnectionState(), err)
		return
	}
	c := &serverConn{
		serverLoop: l, peer: peer, raw: raw, tls: conn,
		reader: newFrameReader(conn),
		writer: newBatchWriter(conn, l.write, serverPending),
		large:  semaphore.NewWeighted(maxLarge),
		work:   make(chan *request),
		done:   make(chan struct{}),
	}
	c.reader.idle, c.reader.header, c.reader.body = l.idle, l.header, l.body
	c.ctx, c.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
	defer c.cancel(errConnEnded)
	if !l.server.admit(c, l.maxPerPeer) {
		l.refused("peer-limit")
		l.log.Warn("peer has too many connections", "peer", peer.ID, "conn", raw.RemoteAddr())
		return
	}
	defer l.server.dismiss(c)
	count(l.metrics.Connections, 1)
	defer count(l.metrics.Connections, -1)
	// The certificate that lets the peer in lets it stay no longer than it is valid: it then may come again with a newer one.
	ctx, cancel = context.WithDeadline(ctx, conn.ConnectionState().PeerCertificates[0].NotAfter)
	defer cancel()
	c.run(ctx)
}

// hangUp lets a peer whose handshake failed read why. In TLS 1.3 it writes on before it learns that its certificate is
// refused; closing over what it wrote would reset the connection, and the alert could be lost.
func hangUp(ctx context.Context, raw net.Conn) {
	half, ok := raw.(interface{ CloseWrite() error })
	if !ok {
		return
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	defer stop()
	raw.SetDeadline(time.Now().Add(lastWords))  //nolint:errcheck // it is closed, then
	half.CloseWrite()                           //nolint:errcheck // the peer has gone, then
	io.CopyN(io.Discard, raw, maxUnreadRefused) //nolint:errcheck // ends at the latest with the deadline
}

func (l *serverLoop) identifyPeer(conn *tls.Conn) (Peer, error) {
	cs := conn.ConnectionState()
	if len(cs.PeerCertificates) == 0 {
		return Peer{}, errors.New("keyless: no client certificate")
	}
	id, err := l.identify(cs)
	if err != nil {
		return Peer{}, err
	}
	if id == "" {
		return Peer{}, errors.New("keyless: client certificate names nobody")
	}
	return Peer{ID: id, Addr: addrPort(conn.RemoteAddr())}, nil
}

// addrPort is the zero value for addresses that are not IP and port, and has IPv4 addresses as such.
func addrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// run serves the connection until it ends, or drains it when ctx ends.
func (c *serverConn) run(ctx context.Context) {
	c.log.Debug("connection opened", "peer", c.peer.ID, "conn", c.peer.Addr)
	var helpers sync.WaitGroup
	helpers.Go(func() {
		if err := c.writer.run(); err != nil {
			c.raw.Close() // ends the reader too
		}
	})
	readerDone := make(chan struct{})
	helpers.Go(func() {
		select {
		case <-ctx.Done():
			c.reader.stop()
		case <-readerDone:
		}
	})

	err := c.readLoop(ctx)
	close(readerDone)
	close(c.done)
	graceful := err == nil
	if !graceful {
		c.cancel(errConnEnded)
		c.writer.fail(net.ErrClosed)
	}
	over := time.AfterFunc(c.drain, func() { c.cancel(errDrainOver) })
	c.workers.Wait()
	over.Stop()
	c.writer.close()
	helpers.Wait()
	if graceful {
		c.tls.Close()
	}
	c.log.Debug("connection closed", "peer", c.peer.ID, "conn", c.peer.Addr, "err", err)
}

// kill ends the connection at once. It is safe for concurrent use.
func (c *serverConn) kill() {
	c.raw.Close() // first, so that not even an error reply leaves
	c.cancel(errKilled)
}

// readLoop reads requests. It returns nil when the connection may end in peace: the peer was idle for too long, or ctx is
// over. A peer that ended its stream waits for no reply, and what it asked for is given up.
func (c *serverConn) readLoop(ctx context.Context) error {
	for {
		h, body, err := c.reader.next()
		switch {
		case err == nil:
		case errors.Is(err, errStopped):
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			if c.busy.Load() > 0 {
				continue
			}
			return nil
		default:
			return err
		}
		if ctx.Err() != nil {
			return nil // the client sends again elsewhere what was not answered
		}
		if err := c.receive(h, body); err != nil {
			return err
		}
	}
}

// receive answers one packet or passes it to a worker. Its error is that of the connection.
func (c *serverConn) receive(h Header, body []byte) error {
	if h.Major != major {
		c.badPacket("packet of another major version", fmt.Errorf("major version %d", h.Major))
		return c.answer(h.ID, &Operation{}, nil, ErrVersion, 0)
	}
	r := requests.Get().(*request)
	r.Operation = Operation{}
	if err := r.Operation.parse(body); err != nil {
		requests.Put(r)
		c.badPacket("malformed packet", err)
		return c.answer(h.ID, &Operation{}, nil, ErrFormat, 0)
	}
	op := &r.Operation
	if op.Opcode == OpPing {
		defer requests.Put(r)
		return c.answer(h.ID, op, op.Payload, nil, 0)
	}
	if err := check(op); err != nil {
		defer requests.Put(r)
		return c.answer(h.ID, op, nil, err, 0)
	}
	r.id, r.Peer = h.ID, c.peer
	if size := r.size(); size > keepScratch {
		if err := c.large.Acquire(c.ctx, int64(size)); err != nil {
			requests.Put(r)
			return context.Cause(c.ctx)
		}
		r.held = int64(size)
	}
	r.keep()
	c.dispatch(r)
	return nil
}

// check refuses what no handler could answer. See SPEC.md, "Requests".
func check(op *Operation) error {
	needsKey := op.Opcode.IsSign() || op.Opcode.IsDecrypt() || op.Opcode == OpCustom && op.CustomFunc == FuncTLSSign
	switch {
	case op.Opcode.IsReply():
		return ErrUnexpectedOpcode
	case !op.Opcode.Known():
		return ErrBadOpcode
	case op.Opcode == OpRPC:
		return ErrInternal
	case needsKey && op.SKI.IsZero() && op.Digest == [32]byte{}:
		return ErrFormat
	case op.Opcode.Hash() != 0 && len(op.Payload) != op.Opcode.Hash().Size():
		return ErrFormat
	}
	return nil
}

func (r *request) slices() [4]*[]byte {
	return [...]*[]byte{&r.Payload, &r.Extra, &r.TraceContext, &r.Context}
}

// size is how many bytes keep needs; the operation's texts count as well.
func (r *request) size() int {
	size := len(r.SNI) + len(r.CertID) + len(r.CustomFunc)
	for _, s := range r.slices() {
		size += len(*s)
	}
	return size
}

// keep moves the slices of the operation out of the read buffer.
func (r *request) keep() {
	slices := r.slices()
	size := r.size()
	if cap(r.scratch) < size {
		r.scratch = make([]byte, 0, max(size, 512))
	}
	buf := r.scratch[:0]
	for _, s := range slices {
		if *s == nil {
			continue
		}
		at := len(buf)
		buf = append(buf, *s...)
		*s = buf[at:len(buf):len(buf)]
	}
}

// dispatch hands r to a worker that waits, or to a new one; at MaxInFlight it waits for one, and nothing is read.
func (c *serverConn) dispatch(r *request) {
	c.busy.Add(1)
	count(c.metrics.InFlight, 1)
	select {
	case c.work <- r:
		return
	default:
	}
	if int(c.running.Load()) < c.maxInFlight {
		c.running.Add(1)
		c.workers.Go(func() { c.worker(r) })
		return
	}
	c.work <- r
}

// worker runs r and then what else comes, until there is no more work or enough others wait for it.
func (c *serverConn) worker(r *request) {
	defer c.running.Add(-1)
	for {
		c.handle(r)
		select {
		case r = <-c.work:
			continue
		default:
		}
		if c.waiting.Add(1) > keepWorkers {
			c.waiting.Add(-1)
			return
		}
		select {
		case r = <-c.work:
			c.waiting.Add(-1)
		case <-c.done:
			c.waiting.Add(-1)
			return
		}
	}
}

// handle runs one operation and queues its reply.
func (c *serverConn) handle(r *request) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(c.ctx, c.op)
	payload, err := c.safely(ctx, r)
	cancel()
	// A failed connection ends by itself; there is nobody to tell.
	_ = c.answer(r.id, &r.Operation, payload, err, time.Since(start))
	count(c.metrics.InFlight, -1)
	c.busy.Add(-1)
	if cap(r.scratch) > keepScratch {
		r.scratch = nil
	}
	if r.held > 0 {
		c.large.Release(r.held)
		r.held = 0
	}
	requests.Put(r)
}

// safely calls the handler and turns a panic into an error.
func (c *serverConn) safely(ctx context.Context, r *request) (payload []byte, err error) {
	defer func() {
		if v := recover(); v != nil {
			c.log.Error("handler panicked", "peer", c.peer.ID, "op", r.Opcode, "err", v, "stack", string(debug.Stack()))
			payload, err = nil, ErrInternal
		}
	}()
	return c.handler.Handle(ctx, &r.Request)
}

// answer queues the reply to a request: the payload, or the code of err. It waits while the peer does not read.
func (c *serverConn) answer(id uint32, op *Operation, payload []byte, err error, took time.Duration) error {
	reply := Packet{Major: major, Minor: minor, ID: id, Compact: compact(op)}
	code := codeOf(err)
	switch {
	case code != 0:
		reply.Opcode, reply.Payload = OpError, errorPayloads[code][:]
	case op.Opcode == OpPing:
		reply.Opcode, reply.Payload = OpPong, payload
	default:
		reply.Opcode, reply.Payload = OpResponse, payload
	}
	_, err = c.writer.add(&reply, true)
	if errors.Is(err, ErrFormat) {
		c.log.Error("reply does not fit a packet", "peer", c.peer.ID, "op", op.Opcode, "err", err)
		code = CodeInternal
		reply.Opcode, reply.Payload = OpError, errorPayloads[code][:]
		_, err = c.writer.add(&reply, true)
	}
	if c.metrics.Result != nil {
		c.metrics.Result(Result{Opcode: op.Opcode, Func: funcLabel(op), Code: code, Duration: took})
	}
	return err
}

// codeOf is what of an error crosses the wire.
func codeOf(err error) ErrorCode {
	if err == nil {
		return 0
	}
	var e *Error
	if errors.As(err, &e) && e.Code != 0 {
		return e.Code
	}
	return CodeInternal
}

// errorPayloads holds the payload of each error reply, so that sending one allocates nothing.
var errorPayloads = func() (p [256][1]byte) {
	for i := range p {
		p[i][0] = byte(i)
	}
	return p
}()

// funcLabel names the custom function without letting a peer choose the text.
func funcLabel(op *Operation) string {
	switch {
	case op.Opcode != OpCustom:
		return ""
	case op.CustomFunc == FuncTLSSign || op.CustomFunc == FuncRenew:
		return op.CustomFunc
	}
	return "other"
}

// badPacket logs the first bad packet of a connection as a warning, and the rest for debugging only.
func (c *serverConn) badPacket(msg string, err error) {
	if c.badPackets++; c.badPackets == 1 {
		c.log.Warn(msg, "peer", c.peer.ID, "err", err)
		return
	}
	c.log.Debug(msg, "peer", c.peer.ID, "err", err)
}

// logRefused stands in for Server.Refused.
func (l *serverLoop) logRefused(addr net.Addr, state tls.ConnectionState, err error) {
	level, msg := slog.LevelDebug, "TLS handshake failed"
	if state.HandshakeComplete {
		level, msg = slog.LevelWarn, "peer refused"
	}
	l.log.Log(context.Background(), level, msg, "conn", addr, "err", err)
}

func (l *serverLoop) refused(reason string) {
	if l.metrics.Refused != nil {
		l.metrics.Refused(reason)
	}
}

func count(hook func(int), delta int) {
	if hook != nil {
		hook(delta)
	}
}
