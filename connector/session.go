package connector

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// SessionsPerEdge is how many main sessions are kept to one edge at most.
	SessionsPerEdge = 4
	// firstTurn and firstBulk are where the second index of each line and the indexes of bulk sessions begin.
	firstTurn = maxSlots * SessionsPerEdge
	firstBulk = 2 * firstTurn

	// tryTimeout bounds one attempt to reach an edge once its name is resolved, over all of its addresses. With the
	// resolution and the longest pause it stays below 30 s, so that sessions are back by then after any outage.
	tryTimeout = 6 * time.Second
	// addrTimeout is the least that one of several addresses has of it.
	addrTimeout = 2 * time.Second
	// resolveTimeout bounds the resolution of an edge's name, and resolveAgain that of one whose addresses are known.
	resolveTimeout = 9 * time.Second
	resolveAgain   = 3 * time.Second
	// maxEdgeAddrs bounds how many addresses of an edge's name one attempt goes through.
	maxEdgeAddrs = 8
	// failedFor is how long an address that failed is tried after the others.
	failedFor = time.Minute
	// moveTimeout bounds an attempt to move a session that works.
	moveTimeout = 5 * time.Second
)

// session is what a Connector needs of a *tunnel.ClientSession.
type session interface {
	Run(ctx context.Context) error
	Drain(ctx context.Context) error
	Close(reason tunnel.CloseReason)
	Renew(ctx context.Context, csrDER []byte) ([][]byte, error)
	Probe(ctx context.Context) (time.Duration, error)
	Draining() <-chan struct{}
	Done() <-chan struct{}
	Err() error
	Carrier() tunnel.Carrier
	Peer() mtls.Identity
	RemoteAddr() net.Addr
	RTT() time.Duration
	Flows() int
}

// Why a session takes another's place, as the metric of reconnects says it.
const (
	becauseLost    = "lost"    // the edge fell silent, or the carrier broke
	becauseClosed  = "closed"  // the edge ended it
	becauseDrained = "drained" // the edge drains
	becauseRefused = "refused" // the edge ended it for what a person must mend
	becauseNetwork = "network" // this host's network changed, and the edge did not answer over it
	becauseCarrier = "carrier" // back to QUIC
	becauseSpread  = "spread"  // the number of sessions to the edge changed
)

var reasons = []string{becauseLost, becauseClosed, becauseDrained, becauseRefused, becauseNetwork, becauseCarrier, becauseSpread}

var (
	errEdgeDrains   = errors.New("the edge drains the session")
	errSessionEnded = errors.New("the session ended")
	errNoProbe      = errors.New("the network changed, and the edge does not answer over this session")
	errWoken        = errors.New("the network changed during the attempt")
)

// A line is one of the main sessions to one edge: it is dialled again whenever it is lost, and replaced by a better one
// without a gap.
type line struct {
	c     *Connector
	e     *endpoint
	i     int    // among those of the endpoint
	leave func() // ends it: its session drains

	wake     chan struct{} // holds a value when the network may be another one
	announce chan struct{} // holds a value when the session tells the edge a wrong number of connections

	// turn says which of the line's two indexes its session has: a session that takes the place of one that works must not
	// have that one's index, as the edge would end it.
	turn int
	path path // used by keep alone

	mu     sync.Mutex // guards the fields below
	status SessionStatus
	per    int // the connections that were announced
	s      session
}

func (l *line) index(turn int) int { return turn*firstTurn + l.e.slot*SessionsPerEdge + l.i }

func (l *line) state() SessionState {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status.State
}

func (l *line) snapshot() SessionStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	st := l.status
	st.Edge, st.Role = l.e.name, RoleMain
	if st.State == "" {
		st.State = StateConnecting
	}
	if l.s == nil {
		st.Index = l.index(0)
		return st
	}
	describe(&st, l.s)
	return st
}

// describe fills in what a living session says.
func describe(st *SessionStatus, s session) {
	st.Carrier, st.Peer, st.RTT, st.Flows = string(s.Carrier()), s.Peer().String(), s.RTT(), s.Flows()
	if a, err := netip.ParseAddrPort(s.RemoteAddr().String()); err == nil {
		st.Remote = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	}
}

// set notes where the line stands.
func (l *line) set(state SessionState, s session, err error, advice string) {
	l.mu.Lock()
	l.status = SessionStatus{State: state, Since: time.Now(), Err: err, Remedy: advice}
	if err != nil {
		l.status.Error = err.Error()
	}
	if l.s = s; s != nil {
		l.status.Index = l.index(l.turn)
	}
	l.mu.Unlock()
	l.c.edges.kick()
}

// reannounce has the session replaced by one that announces another number of connections, if it announced a wrong one.
func (l *line) reannounce(per int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.s != nil && l.per != per {
		signal(l.announce)
	}
}

func (l *line) announcesWrong() bool {
	l.c.mu.Lock()
	per := l.e.per
	l.c.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.per != per
}

// keep keeps a session to the edge until ctx ends. The sessions themselves run in lives, and outlast keep; the last one
// drains.
func (l *line) keep(ctx, lives context.Context) {
	var b backoff
	var r reporter
	defer l.set(StateStopped, nil, nil, "")
	why := ""
	for try := 0; ; try++ {
		s, err := l.connect(ctx, try, l.path.carrier(l.c.cfg.Carrier), l.turn)
		switch {
		case err == nil:
			l.begin(s, lives)
			if why != "" {
				l.c.metrics.reconnected(l.e.name, why)
			}
			r = reporter{}
			started := time.Now()
			why, err = l.serve(ctx, lives, s)
			if time.Since(started) > steady || why == becauseNetwork {
				b.reset()
			}
		case errors.Is(err, errWoken):
			b.reset()
			continue
		default:
			l.path.failed()
		}
		if ctx.Err() != nil {
			return
		}
		advice := l.c.remedy(err)
		if advice != "" {
			b.max()
		}
		l.set(StateConnecting, nil, err, advice)
		r.report(l, err, advice)
		if l.pause(ctx, b.next()) {
			b.reset()
			l.path.forget()
		}
	}
}

// pause waits, and reports whether it was woken up.
func (l *line) pause(ctx context.Context, d time.Duration) (woken bool) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	case <-l.wake:
		return true
	}
	return false
}

// begin starts to serve a session's flows.
func (l *line) begin(s session, lives context.Context) {
	l.c.refusals.forget(l.e.name)
	l.c.begin(s, lives, l.e.name, RoleMain, l.index(l.turn))
}

// begin starts to serve a session's flows.
func (c *Connector) begin(s session, lives context.Context, edge, role string, index int) {
	c.enter(s, role)
	carrier := string(s.Carrier())
	c.log.Info("session up", "edge", edge, "peer", s.RemoteAddr(), "index", index, "carrier", carrier, "role", role)
	gauge := c.metrics.sessions.WithLabelValues(edge, carrier, role)
	gauge.Inc()
	started := time.Now()
	c.running.Go(func() {
		err := s.Run(lives)
		c.leave(s, role)
		gauge.Dec()
		if err != nil {
			c.log.Info("session ended", "edge", edge, "peer", s.RemoteAddr(), "index", index, "carrier", carrier, "role", role, "dur", time.Since(started), "err", err)
		}
	})
}

// retire lets the flows of a session end and then the session.
func (c *Connector) retire(s session, lives context.Context) {
	c.running.Go(func() {
		if err := s.Drain(lives); err != nil && lives.Err() == nil {
			c.log.Debug("a session that was replaced did not drain", "peer", s.RemoteAddr(), "err", err)
		}
	})
}

// serve keeps a session, and those that take its place while it lives, until the last is lost or takes no more flows.
func (l *line) serve(ctx, lives context.Context, s session) (why string, err error) {
	for {
		started := time.Now()
		l.set(StateConnected, s, nil, "")
		next, why, err := l.guard(ctx, lives, s)
		l.path.ended(s.Carrier(), time.Since(started), why == becauseLost && silent(err))
		switch {
		case next != nil:
			l.c.metrics.reconnected(l.e.name, why)
			l.c.retire(s, lives)
			s = next
		case why == "": // ctx has ended
			l.c.retire(s, lives)
			return "", nil
		default:
			return why, err
		}
	}
}

// guard watches over a session until it is over, or next takes its place, or ctx ends.
func (l *line) guard(ctx, lives context.Context, s session) (next session, why string, err error) {
	move := time.NewTimer(l.path.wait())
	defer move.Stop()
	best := l.c.cfg.Carrier != CarrierAuto || s.Carrier() == tunnel.CarrierQUIC
	if best {
		move.Stop()
	}
	for {
		select {
		case <-ctx.Done():
			return nil, "", nil
		case <-s.Done():
			return nil, l.whyEnded(s), endOf(s)
		case <-s.Draining():
			select {
			case <-s.Done(): // the drain is only part of that
				return nil, l.whyEnded(s), endOf(s)
			default:
			}
			// Its flows go on; Run's end or the edge's ends it.
			return nil, becauseDrained, errEdgeDrains
		case <-l.wake:
			l.path.forget()
			if !l.proves(ctx, s) {
				if ctx.Err() != nil || s.Err() != nil {
					continue
				}
				s.Close(tunnel.CloseInternal)
				return nil, becauseNetwork, errNoProbe
			}
			if !best {
				move.Reset(l.path.wait()) // UDP may pass on this network
			}
		case <-l.announce:
			if !l.announcesWrong() {
				continue // it was told twice; the index of the session before may still be in use
			}
			if next := l.successor(ctx, lives, s, l.path.carrier(l.c.cfg.Carrier)); next != nil {
				return next, becauseSpread, nil
			}
		case <-move.C:
			if next := l.successor(ctx, lives, s, tunnel.CarrierQUIC); next != nil {
				l.path.back()
				return next, becauseCarrier, nil
			}
			l.path.postpone()
			move.Reset(l.path.wait())
		}
	}
}

// proves reports whether the edge answers over the session.
func (l *line) proves(ctx context.Context, s session) bool {
	ctx, cancel := while(ctx, s.Done())
	defer cancel()
	return answers(ctx, s)
}

// successor makes a session that takes the place of s, which works, or nil if there can be none now. It has proved that
// it carries packets of full size.
func (l *line) successor(ctx, lives context.Context, s session, carrier tunnel.Carrier) session {
	ctx, cancel := while(ctx, s.Done())
	defer cancel()
	ctx, stop := context.WithTimeout(ctx, moveTimeout)
	defer stop()
	turn := 1 - l.turn
	next, err := l.connect(ctx, 0, carrier, turn)
	if err != nil {
		l.c.log.Debug("no session to take the place of one that works", "edge", l.e.name, "carrier", carrier, "err", err)
		return nil
	}
	l.turn = turn
	l.begin(next, lives)
	if !answers(ctx, next) {
		next.Close(tunnel.CloseShutdown)
		l.turn = 1 - turn
		return nil
	}
	return next
}

// whyEnded says why a session ended, as the metric has it.
func (l *line) whyEnded(s session) string {
	err := endOf(s)
	if l.c.remedy(err) != "" {
		return becauseRefused
	}
	if se, ok := errors.AsType[*tunnel.SessionError](err); ok && se.Remote {
		if se.Reason == tunnel.CloseDrained {
			return becauseDrained
		}
		return becauseClosed
	}
	return becauseLost
}

// endOf is a session's end as an error.
func endOf(s session) error {
	if err := s.Err(); err != nil {
		return err
	}
	return errSessionEnded
}

// silent reports whether a session ended because nothing came any more. A stateless reset is no silence: it is the answer
// of an edge that was started anew.
func silent(err error) bool {
	if !errors.Is(err, tunnel.ErrPeerLost) {
		return false
	}
	if se, ok := errors.AsType[*tunnel.SessionError](err); ok {
		err = se.Err // beside net.ErrClosed
	}
	ne, ok := errors.AsType[net.Error](err)
	return !ok || ne.Timeout()
}

// while returns a context that also ends when done is closed.
func while(ctx context.Context, done <-chan struct{}) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	over := make(chan struct{})
	go func() {
		defer close(over)
		select {
		case <-done:
			cancel()
		case <-ctx.Done():
		}
	}()
	return ctx, func() {
		cancel()
		<-over
	}
}

// connect makes one attempt: it resolves the edge anew and tries its addresses. If the line is woken up meanwhile the
// error is errWoken.
func (l *line) connect(ctx context.Context, try int, carrier tunnel.Carrier, turn int) (session, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	over := make(chan struct{})
	woken := false
	wg.Go(func() {
		select {
		case <-l.wake:
			woken = true
			cancel(errWoken)
		case <-over:
		}
	})
	s, err := l.dial(ctx, try, carrier, turn)
	close(over)
	wg.Wait()
	cancel(nil)
	if err != nil && woken {
		l.path.forget()
		return nil, errWoken
	}
	if woken { // the session is of the old network, perhaps
		signal(l.wake)
	}
	return s, err
}

func (l *line) dial(ctx context.Context, try int, carrier tunnel.Carrier, turn int) (session, error) {
	addrs, err := l.e.resolve(ctx)
	if err != nil {
		return nil, err
	}
	per, share := l.share(len(addrs))
	reg := l.c.registration
	reg.Index, reg.Connections = l.index(turn), share
	s, err := l.e.dial(ctx, addrs, l.i+try, tunnel.DialConfig{
		Registration: reg, Carrier: carrier, SmallPackets: l.path.small,
		OnConfig: l.c.cfg.OnConfig, OnDevice: l.c.onDevice(),
		OnEdges: func(addrs []string) { l.c.edges.tell(l.e.key, addrs) },
		OnBulk:  l.e.bulk.set,
	})
	if err == nil {
		l.mu.Lock()
		l.per = per
		l.mu.Unlock()
	}
	return s, err
}

// share returns how many sessions are kept to the endpoint, and how many of those go to the same address as this one's
// when there are n, since each may be another edge's.
func (l *line) share(n int) (per, share int) {
	l.c.mu.Lock()
	per = l.e.per
	l.c.mu.Unlock()
	for i := range max(per, l.i+1) {
		if i%n == l.i%n {
			share++
		}
	}
	return per, share
}

// attempt tries the addresses once, beginning with another one for each from.
func (e *endpoint) attempt(ctx context.Context, addrs []string, from int, cfg tunnel.DialConfig) (session, error) {
	c := e.c
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	cfg.Identity, cfg.Logger, cfg.Proxy, cfg.Drops = c.cfg.Identity, c.log, c.cfg.Proxy, &c.metrics.drops
	cfg.Handle = func(ctx context.Context, in *tunnel.Incoming) { c.handle(ctx, in) }
	order := e.order(addrs, from)
	var errs []error
	for _, addr := range order {
		cfg.Addr, cfg.SmallSegments = addr, e.isNarrow()
		dialCtx, cancel := context.WithTimeout(ctx, max(addrTimeout, tryTimeout/time.Duration(len(order))))
		s, err := c.dial(dialCtx, cfg)
		cancel()
		e.note(addr, err)
		if errors.Is(err, tunnel.ErrStalled) {
			e.stalled(cfg.SmallSegments)
		}
		if err == nil {
			c.metrics.attempts.WithLabelValues(e.name, "ok").Inc()
			return s, nil
		}
		if cause := context.Cause(ctx); errors.Is(cause, context.Canceled) || errors.Is(cause, errWoken) || errors.Is(cause, errSuspended) {
			return nil, cause
		}
		c.metrics.attempts.WithLabelValues(e.name, "failed").Inc()
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(errs...)
}

// order returns the addresses in the order in which to try them: those that failed lately last.
func (e *endpoint) order(addrs []string, from int) []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var first, last []string
	for i := range min(len(addrs), maxEdgeAddrs) {
		addr := addrs[(from+i)%len(addrs)]
		if at, ok := e.failed[addr]; ok && time.Since(at) < failedFor {
			last = append(last, addr)
		} else {
			first = append(first, addr)
		}
	}
	return append(first, last...)
}

// note remembers whether an address works.
func (e *endpoint) note(addr string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err == nil {
		delete(e.failed, addr)
	} else {
		e.failed[addr] = time.Now()
	}
}

// forget drops what was learnt on another network.
func (e *endpoint) forget() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.narrow = false
	clear(e.failed)
	e.addrs = nil
}

// resolve returns the edge's addresses, as host:port, in an order of their own, so that the sessions spread over them. When
// resolvers fail it gives what they said last, or the name itself if a proxy can resolve it.
func (e *endpoint) resolve(ctx context.Context) ([]string, error) {
	port := strconv.Itoa(int(e.port))
	if _, err := netip.ParseAddr(e.host); err == nil {
		return []string{net.JoinHostPort(e.host, port)}, nil
	}
	e.mu.Lock()
	known := e.addrs
	e.mu.Unlock()
	limit := resolveTimeout
	if len(known) > 0 {
		limit = resolveAgain
	}
	lookup, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	addrs, err := e.c.cfg.Resolver.LookupNetIP(lookup, "ip", e.host)
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case len(addrs) > 0 && err == nil:
		known = make([]string, len(addrs))
		for i, a := range addrs {
			known[i] = net.JoinHostPort(a.String(), port)
		}
		e.mu.Lock()
		e.addrs = known
		e.mu.Unlock()
	case len(known) > 0:
		e.c.log.Debug("edge cannot be resolved, its last addresses are used", "edge", e.name, "err", err)
	case e.c.cfg.Proxy != nil:
		known = []string{net.JoinHostPort(e.host, port)}
	case err != nil:
		return nil, fmt.Errorf("resolve edge: %w", err)
	default:
		return nil, fmt.Errorf("resolve edge: %q has no address", e.host)
	}
	return known, nil
}
