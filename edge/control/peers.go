package control

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxPeerSessions bounds the sessions with one other edge, and busyPeerSession is how many flows on each call for
	// another one.
	maxPeerSessions = 4
	busyPeerSession = 64
	// peerDialTimeout bounds one attempt to reach another edge; flows that wait for it may give up earlier.
	peerDialTimeout = 5 * time.Second
	// peerRest is how long an edge that could not be reached is left alone, at first and at most.
	peerRest    = 500 * time.Millisecond
	maxPeerRest = 10 * time.Second
)

// A peerEdge is another edge of the installation, with the sessions that this one has opened to it. Sessions are opened
// when a flow needs them and stay.
type peerEdge struct {
	name  string
	peers *peers

	mu       sync.Mutex // guards the fields below
	addrs    []string
	instance string                // of its process
	open     []*tunnel.PeerSession // that take flows
	attempt  *peerAttempt          // under way, or nil
	failures int                   // in a row
	restedAt time.Time             // when it may be tried again
	err      error                 // of the last attempt
}

// A peerAttempt is a dial that flows wait for. Its fields are set when done is closed.
type peerAttempt struct {
	done chan struct{}
	s    *tunnel.PeerSession
	err  error
}

// session returns a session with the edge, which it opens if there is none.
func (e *peerEdge) session(ctx context.Context) (*tunnel.PeerSession, error) {
	e.mu.Lock()
	s := e.bestLocked()
	if s != nil && (s.Flows() < busyPeerSession || len(e.open) >= maxPeerSessions) {
		e.mu.Unlock()
		return s, nil
	}
	if err := e.tryLocked(); err != nil && s == nil {
		e.mu.Unlock()
		return nil, err
	}
	a := e.attempt
	e.mu.Unlock()
	if s != nil {
		return s, nil
	}
	select {
	case <-a.done:
		return a.s, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// bestLocked is the session with the least flows, one that is not suspect if there is any.
func (e *peerEdge) bestLocked() (best *tunnel.PeerSession) {
	for _, s := range e.open {
		if best == nil || best.Suspect() && !s.Suspect() || best.Suspect() == s.Suspect() && s.Flows() < best.Flows() {
			best = s
		}
	}
	return best
}

// tryLocked sees to it that an attempt is under way, unless the edge is left alone for now.
func (e *peerEdge) tryLocked() error {
	if e.attempt != nil {
		return nil
	}
	if time.Now().Before(e.restedAt) {
		return e.err
	}
	a := &peerAttempt{done: make(chan struct{})}
	if !e.peers.spawn(func(ctx context.Context) { e.dial(ctx, a) }) {
		return errors.New("control: this edge is stopping")
	}
	e.attempt = a
	return nil
}

// dial makes one attempt, and keeps the session until it ends.
func (e *peerEdge) dial(ctx context.Context, a *peerAttempt) {
	e.mu.Lock()
	addrs := e.addrs
	e.mu.Unlock()
	a.s, a.err = e.peers.connect(ctx, e.name, addrs)
	e.mu.Lock()
	e.attempt, e.err = nil, a.err
	if a.err != nil {
		e.restedAt = time.Now().Add(min(peerRest<<min(e.failures, 10), maxPeerRest))
		e.failures++
	} else {
		e.failures = 0
		e.open = append(e.open, a.s)
	}
	e.mu.Unlock()
	close(a.done)
	if a.err != nil {
		e.peers.log.Warn("another edge cannot be reached", "edge", e.name, "err", a.err)
		return
	}
	e.peers.log.Info("session with another edge opened", "edge", e.name, "carrier", string(a.s.Carrier()))
	select {
	case <-a.s.Draining():
	case <-a.s.Done():
	case <-ctx.Done():
	}
	e.mu.Lock()
	for i, s := range e.open {
		if s == a.s {
			e.open = append(e.open[:i:i], e.open[i+1:]...)
			break
		}
	}
	e.mu.Unlock()
	select {
	case <-a.s.Done(): // when the flows on it have ended
	case <-ctx.Done():
	}
	e.peers.log.Info("session with another edge ended", "edge", e.name, "err", a.s.Err())
	a.s.Close(tunnel.CloseShutdown)
}

// connect dials an edge by its addresses, one after the other, and checks that it is the one that is meant.
func (p *peers) connect(ctx context.Context, name string, addrs []string) (*tunnel.PeerSession, error) {
	ctx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	errs := []error{fmt.Errorf("control: reach edge %q", name)}
	for _, addr := range addrs {
		s, err := tunnel.DialPeer(ctx, tunnel.DialConfig{Addr: addr, Identity: p.identity, Logger: p.log,
			Registration: tunnel.Registration{Instance: p.instance}})
		if err != nil {
			errs = append(errs, err)
			continue
		}
		want := mtls.Identity{TrustDomain: p.identity.Identity().TrustDomain, Kind: mtls.KindEdge, Name: name}
		if got := s.Peer(); got != want {
			s.Close(tunnel.CloseShutdown)
			errs = append(errs, fmt.Errorf("%s is %s, want %s", addr, got, want))
			continue
		}
		return s, nil
	}
	if len(addrs) == 0 {
		errs = append(errs, errors.New("it advertises no address"))
	}
	return nil, errors.Join(errs...)
}

// resting reports whether the edge could not be reached a moment ago.
func (e *peerEdge) resting() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.open) == 0 && time.Now().Before(e.restedAt)
}

func (e *peerEdge) best() *tunnel.PeerSession {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.bestLocked()
}

func (e *peerEdge) rtt() time.Duration {
	if s := e.best(); s != nil {
		return s.RTT()
	}
	return 0
}

func (e *peerEdge) suspect() bool {
	s := e.best()
	return s != nil && s.Suspect()
}

func (e *peerEdge) carrier() tunnel.Carrier {
	if s := e.best(); s != nil {
		return s.Carrier()
	}
	return ""
}

// AdmitPeer decides whether another edge may forward flows to this one: it must be of this installation and have told
// the store of itself. It is made for [tunnel.ListenConfig].
func (c *Control) AdmitPeer(_ context.Context, peer mtls.Identity, _ *x509.Certificate) error {
	if peer.Kind != mtls.KindEdge || peer.TrustDomain != c.cfg.Authority.TrustDomain() {
		return fmt.Errorf("control: %s is no edge of %s: %w", peer, c.cfg.Authority.TrustDomain(), tunnel.ErrNotAllowed)
	}
	if c.peers.alone() || peer.Name == c.peers.name {
		return fmt.Errorf("control: %s has the name of this edge, or this edge has no others: %w", peer, tunnel.ErrNotAllowed)
	}
	if c.peers.away(peer.Name) {
		return fmt.Errorf("control: %s was removed: %w", peer, tunnel.ErrRevoked)
	}
	if !c.peers.knows(peer.Name) {
		return fmt.Errorf("control: %s is not among the edges of the store: %w", peer, tunnel.ErrUnknown)
	}
	return nil
}

// HandlePeer serves a flow that another edge forwarded, with the sessions of this edge alone. It is made for
// [tunnel.ListenConfig].
func (c *Control) HandlePeer(ctx context.Context, in *tunnel.Incoming) {
	life, ok := c.peers.leash(in.Peer().Name)
	if !ok {
		in.Reject(tunnel.ResultDenied) //nolint:errcheck // it has no business here
		return
	}
	ctx, end := context.WithCancel(ctx)
	defer end()
	defer context.AfterFunc(life, end)()
	f := in.Flow()
	if !forwardable(f) {
		in.Reject(tunnel.ResultMalformed) //nolint:errcheck // the other edge sees what comes of it
		return
	}
	q := Query{VNet: string(f.VNet), Host: f.Host, Port: f.Port, Visitor: f.Visitor, Class: f.Class, Tunnel: f.Tunnel,
		Service: f.Service, Connector: f.Connector, Local: true, Resolver: f.Host == resolverHost && f.Tunnel != ""}
	dial, cancel := ctx, context.CancelFunc(func() {})
	if f.Deadline > 0 {
		dial, cancel = context.WithTimeout(ctx, f.Deadline)
	}
	defer cancel()
	switch f.Kind {
	case tunnel.KindTCP, tunnel.KindIngress:
		c.relay(ctx, dial, in, q)
	default:
		c.relayPackets(ctx, dial, in, q)
	}
}

// forwardable reports whether f is a flow as edges forward them: into a network, named by its id, or to a tunnel's ingress or
// name server. Where it goes is for this edge's routes to say.
func forwardable(f tunnel.Flow) bool {
	ingress := f.Kind == tunnel.KindIngress || f.Kind == tunnel.KindIngressUDP
	if f.Tunnel != "" {
		return ingress || f.Host == resolverHost
	}
	return !ingress && f.VNet != ""
}

// relay joins a forwarded flow of bytes with one of this edge.
func (c *Control) relay(ctx, dial context.Context, in *tunnel.Incoming, q Query) {
	up, err := c.Dial(dial, q)
	if err != nil {
		in.Reject(peerResult(err)) //nolint:errcheck // the other edge sees what comes of it
		return
	}
	down, err := in.Accept()
	if err != nil {
		up.Close() //nolint:errcheck // nothing was sent
		return
	}
	tunnel.Splice(ctx, down, up.(tunnel.Conn)) //nolint:errcheck // each side has seen how it ended
}

// peerResult is what the other edge is told of a flow that could not be opened. Where this edge has no session after all,
// it may try another edge.
func peerResult(err error) tunnel.Result {
	if e, ok := errors.AsType[*tunnel.FlowError](err); ok {
		if e.Result == tunnel.ResultSessionLost || e.Result == tunnel.ResultCancelled {
			return tunnel.ResultDraining
		}
		return e.Result
	}
	switch {
	case errors.Is(err, ErrTunnelDown), errors.Is(err, ErrNotFound):
		return tunnel.ResultDraining
	case errors.Is(err, ErrNoRoute):
		return tunnel.ResultNoRoute
	case errors.Is(err, context.DeadlineExceeded):
		return tunnel.ResultTimedOut
	}
	return tunnel.ResultInternal
}
