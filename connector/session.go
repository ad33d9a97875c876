package connector

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// edgeDialTimeout bounds one attempt to reach one address of an edge.
	edgeDialTimeout = 10 * time.Second
	// edgeResolveTimeout bounds the resolution of an edge's name.
	edgeResolveTimeout = 10 * time.Second
	// maxEdgeAddrs bounds how many addresses of an edge's name one try goes through.
	maxEdgeAddrs = 8
)

// A line is one of the sessions to one edge: it is dialled again whenever it is lost.
type line struct {
	c    *Connector
	edge string
	host string
	port uint16
	reg  tunnel.Registration

	mu     sync.Mutex // guards the field below
	status SessionStatus
}

func (l *line) snapshot() SessionStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := l.status
	s.Edge, s.Index = l.edge, l.reg.Index
	if s.State == "" {
		s.State = StateConnecting
	}
	return s
}

func (l *line) set(s SessionState, remote netip.AddrPort, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status = SessionStatus{State: s, Since: time.Now(), Remote: remote, Err: err}
}

// keep dials the edge until ctx ends, each time the session is lost or its edge drains. The sessions themselves run in
// lives, and outlast keep.
func (l *line) keep(ctx, lives context.Context) {
	var b backoff
	var r reporter
	defer l.set(StateStopped, netip.AddrPort{}, nil)
	for try, sessions := 0, 0; ; try++ {
		s, remote, err := l.connect(ctx, try)
		if err == nil {
			if sessions++; sessions > 1 {
				l.c.metrics.reconnects.WithLabelValues(l.edge).Inc()
			}
			r = reporter{}
			started := time.Now()
			err = l.serve(ctx, lives, s, remote)
			if time.Since(started) > steady {
				b.reset()
			}
		}
		if ctx.Err() != nil {
			return
		}
		l.set(StateConnecting, netip.AddrPort{}, err)
		advice := l.c.remedy(err)
		if advice != "" {
			b.max()
		}
		r.report(l, err, advice)
		if !sleep(ctx, b.next()) {
			return
		}
	}
}

// serve runs a session and returns when it has ended or takes no more flows, so that another should be dialled.
func (l *line) serve(ctx, lives context.Context, s session, remote netip.AddrPort) error {
	c := l.c
	c.enter(s)
	l.set(StateConnected, remote, nil)
	gauge := c.metrics.sessions.WithLabelValues(l.edge)
	gauge.Inc()
	c.refusals.forget(l.edge)
	c.log.Info("session up", "edge", l.edge, "peer", remote, "index", l.reg.Index)
	c.running.Go(func() {
		err := s.Run(lives)
		c.leave(s)
		gauge.Dec()
		if err != nil {
			c.log.Info("session ended", "edge", l.edge, "peer", remote, "index", l.reg.Index, "err", err)
		}
	})
	select {
	case <-ctx.Done():
		return nil
	case <-s.Draining():
		select {
		case <-s.Done(): // lost; the drain is only part of that
		default:
			return errEdgeDrains
		}
	case <-s.Done():
	}
	if err := s.Err(); err != nil {
		return err
	}
	return errSessionEnded
}

var (
	errEdgeDrains   = errors.New("the edge drains the session")
	errSessionEnded = errors.New("the session ended")
)

// connect resolves the edge anew and tries its addresses, beginning with another one for each index and each try.
func (l *line) connect(ctx context.Context, try int) (session, netip.AddrPort, error) {
	addrs, err := l.resolve(ctx)
	if err != nil {
		return nil, netip.AddrPort{}, err
	}
	var errs []error
	for i := range min(len(addrs), maxEdgeAddrs) {
		to := netip.AddrPortFrom(addrs[(l.reg.Index+try+i)%len(addrs)], l.port)
		dialCtx, cancel := context.WithTimeout(ctx, edgeDialTimeout)
		s, err := l.c.dial(dialCtx, tunnel.DialConfig{
			Addr: to.String(), Identity: l.c.cfg.Identity, Registration: l.reg, Logger: l.c.log,
			Handle: func(ctx context.Context, in *tunnel.Incoming) { l.c.handle(ctx, in) },
		})
		cancel()
		if err == nil {
			l.c.metrics.attempts.WithLabelValues(l.edge, "ok").Inc()
			return s, to, nil
		}
		if ctx.Err() != nil {
			return nil, to, ctx.Err()
		}
		l.c.metrics.attempts.WithLabelValues(l.edge, "failed").Inc()
		errs = append(errs, fmt.Errorf("%s: %w", to, err))
	}
	return nil, netip.AddrPort{}, errors.Join(errs...)
}

// resolve returns the edge's addresses in an order of their own, so that the sessions' indexes spread over them.
func (l *line) resolve(ctx context.Context) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(l.host); err == nil {
		return []netip.Addr{a}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, edgeResolveTimeout)
	defer cancel()
	addrs, err := l.c.cfg.Resolver.LookupNetIP(ctx, "ip", l.host)
	if err != nil {
		return nil, fmt.Errorf("resolve edge: %w", err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	slices.SortFunc(addrs, netip.Addr.Compare)
	addrs = slices.Compact(addrs)
	if len(addrs) == 0 {
		return nil, fmt.Errorf("resolve edge: %q has no address", l.host)
	}
	return addrs, nil
}

// remedy returns what a person has to do before an attempt can succeed, or "" if another attempt may.
func (c *Connector) remedy(err error) string {
	const rejoin = "ask the edge's operator for a new join token and join into a new directory"
	if expired := c.cfg.Identity.Check(); expired != nil {
		return fmt.Sprintf("%v (valid until %s); check this host's clock, else %s",
			expired, c.cfg.Identity.NotAfter().UTC().Format(time.RFC3339), rejoin)
	}
	switch {
	case errors.Is(err, tunnel.ErrRevoked), errors.Is(err, &tunnel.SessionError{Reason: tunnel.CloseRevoked, Remote: true}):
		return "this connector was revoked; if that was a mistake, " + rejoin
	case errors.Is(err, tunnel.ErrUnknown):
		return "the edge does not know this connector; " + rejoin
	case errors.Is(err, tunnel.ErrCertificate):
		return "the edge does not accept this connector's certificate; is this the right edge? If so, " + rejoin
	case errors.Is(err, tunnel.ErrNotAllowed):
		return "the edge does not admit this connector; ask its operator"
	case errors.Is(err, tunnel.ErrVersion):
		return "connector and edge speak different versions; update the older one"
	case errors.Is(err, &tunnel.SessionError{Reason: tunnel.CloseReplaced, Remote: true}):
		return "another process runs with the same identity; let each join with a token of its own"
	}
	return ""
}

// reporter logs failures of one line: the first of its kind and then ever fewer, so that an outage of a day does not
// fill a disk. What a person must mend is counted over all lines instead; see refusals.
type reporter struct {
	last string
	n    int
}

func (r *reporter) report(l *line, err error, advice string) {
	// Some errors name the local port, which is another one each time.
	kind := strings.Map(func(c rune) rune {
		if '0' <= c && c <= '9' {
			return -1
		}
		return c
	}, err.Error()+advice)
	if kind != r.last {
		r.last, r.n = kind, 0
	}
	r.n++
	log := l.c.log.Debug
	switch {
	case advice != "":
		if l.c.refusals.aloud(l.edge, advice) {
			log = l.c.log.Error
		}
	case r.n&(r.n-1) == 0:
		log = l.c.log.Warn
	}
	args := []any{"edge", l.edge, "index", l.reg.Index, "failures", r.n, "err", err}
	if advice != "" {
		args = append(args, "remedy", advice)
	}
	log("no session to the edge, will try again", args...)
}

// sleep waits and reports whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
