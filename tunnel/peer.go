package tunnel

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// A PeerSession is the dialling side of a session between two edges: it opens flows, which the other edge serves with
// ListenConfig.HandlePeer. Its methods may be called concurrently.
type PeerSession struct {
	opener
	peer mtls.Identity
	shut func()
}

// DialPeer connects to another edge of the installation and registers; cfg.Identity is this edge's. Of cfg, Handle and the
// On functions have no meaning, and Registration may be zero. Errors are those of [Dial]. The caller must call Close when it
// is done with the session, even if the session has ended by itself.
func DialPeer(ctx context.Context, cfg DialConfig) (*PeerSession, error) {
	if cfg.Identity == nil {
		return nil, errors.New("tunnel: dial peer: DialConfig needs Identity")
	}
	if cfg.Registration.Instance == "" {
		cfg.Registration.Instance = rand.Text()
	}
	cfg, err := cfg.withDefaults(edgeSessionWindow)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial peer %s: %w", cfg.Addr, err)
	}
	p := &PeerSession{opener: opener{forwards: true}}
	d := dialer{DialConfig: cfg, tls: cfg.tlsConfig(PeerALPN), register: func(ctx context.Context, car carrier) (err error) {
		p.session, p.peer, err = registerOver(ctx, car, cfg)
		return err
	}}
	shut, err := d.dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("tunnel: dial peer %s: %w", cfg.Addr, err)
	}
	p.shut = sync.OnceFunc(func() {
		p.finish()
		shut()
	})
	p.spawn(p.writeControl)
	p.spawn(func() { p.readControl(func(frame) error { return errUnknownFrame }) })
	p.spawn(p.keepAlive)
	return p, nil
}

// Peer is the other edge's identity.
func (p *PeerSession) Peer() mtls.Identity { return p.peer }

// Draining is closed when either side has begun to drain. It is the time to dial another session.
func (p *PeerSession) Draining() <-chan struct{} { return p.drainCh }

// Close ends the session at once, if it has not ended yet, waits for all of it and frees what it holds. It may be called
// more than once.
func (p *PeerSession) Close(reason CloseReason) {
	p.session.Close(reason)
	p.shut()
}

// A peerServer is the listening side of a session between two edges.
type peerServer struct {
	server
	notAfter time.Time // the end of the peer's certificate
	ownMinor int
}

// run serves the session until it has ended and everything it started has returned.
func (p *peerServer) run(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	expiry := time.AfterFunc(time.Until(p.notAfter), p.beginDrain)
	defer expiry.Stop()
	defer p.finish()
	registered, err := appendRegistered(nil, p.ownMinor)
	if err == nil {
		err = p.writeFrame(registered)
	}
	if err != nil {
		p.Close(CloseProtocol)
		return
	}
	p.spawn(p.writeControl)
	p.spawn(func() { p.readControl(func(frame) error { return errUnknownFrame }) })
	p.spawn(func() { p.acceptFlows(ctx) })
	<-p.Done()
	cancel()
}
