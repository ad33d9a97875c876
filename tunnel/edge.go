package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// renewTimeout bounds ListenConfig.Renew.
const renewTimeout = 30 * time.Second

// A Session is the edge's side of a session with one connector. Its methods may be called concurrently.
type Session struct {
	opener
	peer  mtls.Identity
	reg   Registration
	cert  *x509.Certificate
	renew func(ctx context.Context, peer mtls.Identity, csrDER []byte) ([][]byte, error)

	ownMinor  int // what this edge announces
	renewing  atomic.Bool
	answering sync.Mutex  // held while a renewal is answered, so that no more than two are under way
	expiry    *time.Timer // drains the session when its certificate ends
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

// Retired is closed when the session takes no new flows, for whatever reason: a drain of either side, or Retire.
func (s *Session) Retired() <-chan struct{} { return s.drainCh }

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

	defer s.finish()
	registered, err := appendRegistered(nil, s.ownMinor)
	if err == nil {
		err = s.writeFrame(registered) // before all other frames
	}
	if err != nil {
		s.Close(CloseProtocol)
		return
	}
	s.spawn(s.writeControl)
	s.spawn(func() { s.readControl(func(f frame) error { return s.handleFrame(ctx, f) }) })
	s.spawn(func() { s.watchStreams(ctx) })
	if handle != nil {
		s.spawn(func() {
			handle(ctx, s)
			s.Close(CloseShutdown)
		})
	}
	<-s.Done()
	cancel()
}

// watchStreams ends the session if the connector opens a second stream.
func (s *session) watchStreams(ctx context.Context) {
	if _, err := s.car.acceptStream(ctx); err == nil {
		s.log.Warn("the connector opened a stream")
		s.car.close(CloseProtocol)
	}
}

// handleFrame handles the frames that only a connector sends.
func (s *Session) handleFrame(ctx context.Context, f frame) error {
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
	started := s.spawn(func() {
		chain, err := s.renewChain(ctx, csr)
		if err != nil {
			s.log.Warn("certificate not renewed", "err", err)
		}
		s.answering.Lock()
		defer s.answering.Unlock()
		s.renewing.Store(false)              // who has the answer may ask again
		s.answerRenewal(ctx, id, chain, err) //nolint:errcheck // the session has ended, then
	})
	if !started {
		s.renewing.Store(false)
	}
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
