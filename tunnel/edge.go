package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// renewTimeout bounds ListenConfig.Renew.
const renewTimeout = 30 * time.Second

// A Session is the edge's side of a session with one connector. Its methods may be called concurrently.
type Session struct {
	*session
	peer  mtls.Identity
	reg   Registration
	cert  *x509.Certificate
	renew func(ctx context.Context, peer mtls.Identity, csrDER []byte) ([][]byte, error)

	renewing atomic.Bool
	expiry   *time.Timer // drains the session when its certificate ends
}

// Peer is the connector's identity.
func (s *Session) Peer() mtls.Identity { return s.peer }

// Registration is what the connector told of itself.
func (s *Session) Registration() Registration { return s.reg }

// Cert is the certificate with which the connector came.
func (s *Session) Cert() *x509.Certificate { return s.cert }

// Draining reports whether the session takes no new flows. It stays true.
func (s *Session) Draining() bool {
	select {
	case <-s.drainCh:
		return true
	default:
		return false
	}
}

// Retire lets no new flow begin and does not tell the connector: for a session that most likely is dead already, such as
// that of a process whose successor has registered. Flows that are open go on. See [Drainer].
func (s *Session) Retire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drainLocked()
}

// run serves the session until it has ended and everything it started has returned.
func (s *Session) run(ctx context.Context, handle func(context.Context, *Session)) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	// A certificate admits for as long as it is valid. Then the connector, told by the drain, dials anew.
	s.expiry = time.AfterFunc(time.Until(s.cert.NotAfter), s.beginDrain)
	defer s.expiry.Stop()

	var wg sync.WaitGroup
	defer wg.Wait()
	if err := s.writeFrame(byteFrame(frameRegistered, protocolVersion)); err != nil { // before all other frames
		s.Close(CloseProtocol)
		return
	}
	wg.Go(s.writeControl)
	wg.Go(func() { s.readControl(func(f frame) error { return s.handleFrame(ctx, &wg, f) }) })
	if handle != nil {
		wg.Go(func() {
			handle(ctx, s)
			s.Close(CloseShutdown)
		})
	}
	<-s.Done()
	cancel()
}

// handleFrame handles the frames that only a connector sends.
func (s *Session) handleFrame(ctx context.Context, wg *sync.WaitGroup, f frame) error {
	if f.typ != frameRenew {
		return errUnknownFrame
	}
	id, csr, err := parseRenew(f.payload)
	if err != nil {
		return err
	}
	if !s.renewing.CompareAndSwap(false, true) {
		return s.answerRenewal(ctx, id, nil, ErrBusy)
	}
	wg.Go(func() {
		defer s.renewing.Store(false)
		chain, err := s.renewChain(ctx, csr)
		if err != nil {
			s.log.Warn("certificate not renewed", "err", err)
		}
		s.answerRenewal(ctx, id, chain, err) //nolint:errcheck // the session has ended, then
	})
	return nil
}

func (s *Session) renewChain(ctx context.Context, csr []byte) ([][]byte, error) {
	if s.renew == nil {
		return nil, ErrNotAllowed
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	chain, err := s.renew(ctx, s.peer, csr)
	if err != nil {
		return nil, err
	}
	if len(chain) == 0 {
		return nil, errors.New("renewal gave no certificate")
	}
	leaf, err := x509.ParseCertificate(chain[0])
	if err != nil {
		return nil, err
	}
	if id, err := mtls.IdentityOf(leaf); err == nil && id == s.peer {
		s.expiry.Reset(time.Until(leaf.NotAfter)) // admitted anew
	}
	return chain, nil
}

func (s *Session) answerRenewal(ctx context.Context, id uint32, chain [][]byte, err error) error {
	var code RefusalCode
	if err != nil {
		code, chain = refusalOf(err), nil
	}
	b, err := appendRenewed(nil, id, code, chain)
	if err != nil { // a chain that is too long for a frame
		s.log.Error("renewed certificate not sent", "err", err)
		b, err = appendRenewed(nil, id, RefusalInternal, nil)
	}
	if err != nil {
		return err
	}
	return s.send(ctx, b)
}

// Open opens a flow and waits for the connector's answer, or until ctx ends. If f.Deadline is zero and ctx has a deadline, the
// connector is told to keep it. The error is a *FlowError.
func (s *Session) Open(ctx context.Context, f Flow) (Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, cancelledError(ctx)
	}
	if s.Err() != nil {
		return nil, &FlowError{Result: ResultSessionLost, Err: s.Err()}
	}
	if r := s.beginFlow(); r != ResultOK {
		return nil, &FlowError{Result: r}
	}
	conn, err := s.open(ctx, f)
	if err != nil {
		s.endFlow()
		return nil, err
	}
	return conn, nil
}

func (s *Session) open(ctx context.Context, f Flow) (Conn, error) {
	if deadline, ok := ctx.Deadline(); ok && f.Deadline <= 0 {
		f.Deadline = max(time.Until(deadline), time.Millisecond)
	}
	buf := headerBuffers.Get().(*[flowHeaderLen + maxFlowItemsLen]byte)
	defer headerBuffers.Put(buf)
	header, err := appendFlow(buf[:0], f)
	if err != nil {
		return nil, &FlowError{Result: ResultMalformed, Err: err}
	}
	st, err := s.car.openStream()
	if err != nil {
		if errors.Is(err, errStreamLimit) {
			return nil, &FlowError{Result: ResultLimit, Err: err}
		}
		return nil, &FlowError{Result: ResultSessionLost, Err: err}
	}
	abort := func() {
		st.abortWrite(ResultCancelled)
		st.abortRead(ResultCancelled)
	}
	stop := context.AfterFunc(ctx, abort)
	r, err := exchangeHeader(st, header, buf[:1])
	if !stop() {
		return nil, cancelledError(ctx)
	}
	if err == nil && r == ResultOK {
		host := canonicalHost(f.Host)
		return &flowConn{stream: st, local: s.LocalAddr(), remote: flowAddr{host, f.Port}, draining: s.drainCh, ended: s.endFlow}, nil
	}
	abort()
	if err == nil {
		return nil, &FlowError{Result: r, Remote: true}
	}
	return nil, flowErrorOf(err)
}

// exchangeHeader sends a flow's header and reads the result into b, which may share the header's memory.
func exchangeHeader(st stream, header, b []byte) (Result, error) {
	if _, err := st.Write(header); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(st, b); err != nil {
		return 0, err
	}
	return Result(b[0]), nil
}

// cancelledError is the error of a flow whose context ended before it was open.
func cancelledError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &FlowError{Result: ResultTimedOut, Err: context.Cause(ctx)}
	}
	return &FlowError{Result: ResultCancelled, Err: context.Cause(ctx)}
}

// flowErrorOf makes a stream's failure before the result a *FlowError.
func flowErrorOf(err error) error {
	if _, ok := errors.AsType[*FlowError](err); ok {
		return err
	}
	if err == io.EOF {
		return &FlowError{Result: ResultInternal, Remote: true, Err: io.ErrUnexpectedEOF}
	}
	return &FlowError{Result: ResultReset, Err: err}
}
