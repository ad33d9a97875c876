package tunnel

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// A ClientSession is the connector's side of a session. Its methods may be called concurrently.
type ClientSession struct {
	server
	shut    func() // frees the socket
	onEdges func([]string)
	onBulk  func(int)

	ran     atomic.Bool
	renewMu sync.Mutex // one renewal at a time

	answerMu sync.Mutex // guards the fields below
	renewID  uint32
	answer   chan renewAnswer // where the answer to renewID goes; nil if nobody waits
}

type renewAnswer struct {
	code  RefusalCode
	chain [][]byte
}

// newClientSession registers over a fresh carrier.
func newClientSession(ctx context.Context, car carrier, cfg DialConfig) (*ClientSession, error) {
	s, peer, err := registerOver(ctx, car, cfg)
	if err != nil {
		return nil, err
	}
	return &ClientSession{
		server:  server{session: s, peer: peer, handle: cfg.Handle, onConfig: cfg.OnConfig, onDevice: cfg.OnDevice},
		onEdges: cfg.OnEdges, onBulk: cfg.OnBulk,
	}, nil
}

// registerOver registers the dialling side over a fresh carrier. cfg has its defaults.
func registerOver(ctx context.Context, car carrier, cfg DialConfig) (*session, mtls.Identity, error) {
	peer, err := mtls.PeerIdentity(car.tlsState())
	if err != nil {
		return nil, peer, err
	}
	register, err := appendRegister(nil, cfg.Registration)
	if err != nil {
		return nil, peer, err
	}
	control, err := car.openStream()
	if err != nil {
		return nil, peer, err
	}
	stop := context.AfterFunc(ctx, func() {
		control.abortRead(ResultCancelled)
		control.abortWrite(ResultCancelled)
	})
	minor, err := exchangeRegister(control, register, 2*cfg.Limits.SetupTimeout)
	if !stop() {
		return nil, peer, context.Cause(ctx)
	}
	if err != nil {
		if lost := (*FlowError)(nil); errors.As(err, &lost) && lost.Err != nil {
			err = lost.Err // the session's end says more: a TLS alert, for one
		}
		return nil, peer, fmt.Errorf("register: %w", err)
	}
	log := cfg.Logger.With("peer", peer.String(), "conn", cfg.Registration.Index)
	s := newSession(car, control, cfg.Limits, log, min(minor, cfg.Registration.Minor), cfg.Registration.Role)
	s.packets.drops = cfg.Drops
	return s, peer, nil
}

// exchangeRegister sends the registration, reads the answer and returns the edge's minor version.
func exchangeRegister(control stream, register []byte, timeout time.Duration) (minor int, err error) {
	if err := control.SetDeadline(time.Now().Add(timeout)); err != nil {
		return 0, err
	}
	if _, err := control.Write(register); err != nil {
		return 0, err
	}
	f, err := readFrame(control, 0)
	if err != nil {
		return 0, unexpectedEOF(err)
	}
	if err := control.SetDeadline(time.Time{}); err != nil {
		return 0, err
	}
	switch f.typ {
	case frameRegistered:
		return parseRegistered(f.payload)
	case frameRefused:
		return 0, parseRefused(f.payload)
	}
	return 0, malformed("control frame 0x%02x in answer to register", byte(f.typ))
}

func parseRefused(p []byte) error {
	if len(p) != 1 {
		return malformed("refused of %d bytes", len(p))
	}
	return &RefusedError{RefusalCode(p[0])}
}

// Peer is the edge's identity.
func (c *ClientSession) Peer() mtls.Identity { return c.peer }

// Draining is closed when either side has begun to drain. It is the time to dial another session.
func (c *ClientSession) Draining() <-chan struct{} { return c.drainCh }

// Close ends the session at once; see Session.Close. If Run was called, Run frees what the session holds.
func (c *ClientSession) Close(reason CloseReason) {
	c.session.Close(reason)
	if !c.ran.Load() {
		c.shut()
	}
}

// Run serves the session: it takes flows and control frames until the session ends or ctx does, and returns when every
// handler has returned. It returns nil after a drain of either side, the context's cause if ctx ended it, and otherwise the
// session's error. It must be called once.
func (c *ClientSession) Run(ctx context.Context) error {
	if !c.ran.CompareAndSwap(false, true) {
		return errors.New("tunnel: Run called twice")
	}
	defer c.shut()
	c.spawn(c.writeControl)
	c.spawn(func() { c.readControl(c.handleFrame) })
	c.spawn(c.keepAlive)
	flowCtx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // handlers see the session end first
	c.spawn(func() { c.acceptFlows(flowCtx) })

	var cause error
	select {
	case <-c.Done():
	case <-ctx.Done():
		c.session.Close(CloseShutdown)
		if c.ended() != nil {
			cause = context.Cause(ctx)
		}
	}
	cancel()
	c.finish()
	if cause != nil {
		return cause
	}
	return c.ended()
}

// Renew asks the edge to sign a certificate request and returns the new chain, leaf first, in DER. Run must be running.
// The error is a *RefusedError (wrapped) if the edge refuses.
func (c *ClientSession) Renew(ctx context.Context, csrDER []byte) ([][]byte, error) {
	c.renewMu.Lock()
	defer c.renewMu.Unlock()
	answer := make(chan renewAnswer, 1)
	c.answerMu.Lock()
	c.renewID++
	id := c.renewID
	c.answer = answer
	c.answerMu.Unlock()
	defer func() {
		c.answerMu.Lock()
		c.answer = nil
		c.answerMu.Unlock()
	}()

	b, err := appendRenew(nil, id, csrDER)
	if err == nil {
		err = c.send(ctx, b)
	}
	if err != nil {
		return nil, fmt.Errorf("tunnel: renew: %w", err)
	}
	select {
	case a := <-answer:
		if a.code != 0 {
			return nil, fmt.Errorf("tunnel: renew: %w", &RefusedError{a.code})
		}
		return a.chain, nil
	case <-c.Done():
		return nil, fmt.Errorf("tunnel: renew: %w", c.Err())
	case <-ctx.Done():
		return nil, fmt.Errorf("tunnel: renew: %w", context.Cause(ctx))
	}
}

// handleFrame handles the frames that only an edge sends.
func (c *ClientSession) handleFrame(f frame) error {
	switch f.typ {
	case frameRenewed:
		return c.handleRenewed(f)
	case frameBulk:
		if c.minor < 1 {
			break
		}
		if len(f.payload) != 1 {
			return malformed("bulk of %d bytes", len(f.payload))
		}
		if c.onBulk != nil {
			c.onBulk(int(f.payload[0]))
		}
		return nil
	case frameEdges:
		if c.minor < 1 {
			break
		}
		edges, err := parseEdges(f.payload)
		if err == nil && c.onEdges != nil && len(edges) > 0 {
			c.onEdges(edges)
		}
		return err
	}
	return errUnknownFrame
}

func (c *ClientSession) handleRenewed(f frame) error {
	id, code, chain, err := parseRenewed(f.payload)
	if err != nil {
		return err
	}
	c.answerMu.Lock()
	defer c.answerMu.Unlock()
	if c.answer != nil && id == c.renewID { // else the caller gave up
		c.answer <- renewAnswer{code, chain}
		c.answer = nil
	}
	return nil
}
