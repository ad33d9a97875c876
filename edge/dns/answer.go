package dns

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// askTimeout bounds one question, from beginning to end.
	askTimeout = 5 * time.Second
	// udpTimeout is how long an answer over UDP is waited for before TCP is tried.
	udpTimeout = 2 * time.Second
	// offered is the longest answer over UDP that is asked for; flows carry it whole.
	offered = 4096
)

// A question is what the answers are remembered by.
type question struct {
	name  string // in lower case, with the final dot
	typ   uint16
	do    bool // DNSSEC records are wanted; RFC 4035, section 3.2.1
	cd    bool // unchecked answers too; section 3.2.2
	class uint16
}

// answer returns the reply to q.
func (s *Server) answer(ctx context.Context, q *mdns.Msg) *mdns.Msg {
	asked := q.Question[0]
	opt := q.IsEdns0()
	fail := func(rcode int) *mdns.Msg { return finish(new(mdns.Msg).SetRcode(q, rcode), opt) }
	switch {
	case opt != nil && opt.Version() != 0:
		return fail(mdns.RcodeBadVers)
	case asked.Qclass != mdns.ClassINET:
		return fail(mdns.RcodeRefused)
	}
	switch asked.Qtype {
	case mdns.TypeANY, mdns.TypeAXFR, mdns.TypeIXFR, mdns.TypeMAILA, mdns.TypeMAILB, mdns.TypeOPT, mdns.TypeTSIG, mdns.TypeTKEY:
		return fail(mdns.RcodeNotImplemented)
	}
	k := question{name: strings.ToLower(asked.Name), typ: asked.Qtype, do: opt != nil && opt.Do(), cd: q.CheckingDisabled, class: asked.Qclass}
	found, hit := s.cache.get(k, time.Now())
	if hit {
		s.metrics.cached.WithLabelValues("hit").Inc()
	} else {
		s.metrics.cached.WithLabelValues("miss").Inc()
		var err error
		if found, err = s.asking.do(ctx, k, s.askAndKeep); err != nil {
			return fail(s.rcodeOf(err, k))
		}
	}
	reply := new(mdns.Msg).SetRcode(q, found.Rcode)
	reply.Answer, reply.Ns, reply.Extra = found.Answer, found.Ns, found.Extra
	reply.AuthenticatedData = found.AuthenticatedData && (k.do || q.AuthenticatedData)
	return finish(reply, opt)
}

// finish sets what all replies have in common.
func finish(reply *mdns.Msg, opt *mdns.OPT) *mdns.Msg {
	reply.RecursionAvailable = true
	reply.Compress = true
	if opt != nil {
		reply.SetEdns0(maxUDPReply, opt.Do())
	}
	return reply
}

var errBusy = errors.New("too many questions at a time")

func (s *Server) rcodeOf(err error, k question) int {
	if outside(err) && len(s.cfg.Upstream) == 0 {
		return mdns.RcodeRefused
	}
	s.log.Debug("name not resolved", "op", mdns.TypeToString[k.typ], "err", err)
	return mdns.RcodeServerFailure
}

// askers asks each question once at a time, however many wait for it. The zero value is ready.
type askers struct {
	mu      sync.Mutex // guards the field below
	open    map[question]*asker
	running sync.WaitGroup
}

type asker struct {
	done  chan struct{}
	reply *mdns.Msg
	err   error
}

func (a *askers) do(ctx context.Context, k question, ask func(context.Context, question) (*mdns.Msg, error)) (*mdns.Msg, error) {
	a.mu.Lock()
	one := a.open[k]
	if one == nil {
		if len(a.open) >= maxAsking {
			a.mu.Unlock()
			return nil, errBusy
		}
		if a.open == nil {
			a.open = map[question]*asker{}
		}
		one = &asker{done: make(chan struct{})}
		a.open[k] = one
		a.running.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, askTimeout) // ctx is the server's, not the asker's
			defer cancel()
			one.reply, one.err = ask(ctx, k)
			a.mu.Lock()
			delete(a.open, k)
			a.mu.Unlock()
			close(one.done)
		})
	}
	a.mu.Unlock()
	<-one.done
	if one.err != nil {
		return nil, one.err
	}
	return one.reply.Copy(), nil
}

func (a *askers) wait() { a.running.Wait() }

// askAndKeep asks and puts the answer into the cache.
func (s *Server) askAndKeep(ctx context.Context, k question) (*mdns.Msg, error) {
	start := time.Now()
	reply, err := s.ask(ctx, k)
	if err != nil {
		return nil, err
	}
	s.metrics.seconds.Observe(time.Since(start).Seconds())
	s.cache.put(k, reply, time.Now())
	return reply, nil
}

// ask finds who knows the name and asks there: the site that the network's route for the name leads to, else the
// configured servers.
func (s *Server) ask(ctx context.Context, k question) (*mdns.Msg, error) {
	name := strings.TrimSuffix(k.name, ".")
	reply, err := s.exchange(ctx, k, control.Query{VNet: s.cfg.VNet, Host: name, Port: 53, Resolver: true})
	if !outside(err) || len(s.cfg.Upstream) == 0 {
		return reply, err
	}
	first := rand.IntN(len(s.cfg.Upstream))
	for i := range s.cfg.Upstream {
		to := s.cfg.Upstream[(first+i)%len(s.cfg.Upstream)]
		if reply, err = s.exchange(ctx, k, control.Query{VNet: s.cfg.VNet, Host: to.Addr().String(), Port: to.Port()}); err == nil {
			break
		}
	}
	return reply, err
}

// outside reports whether err says that the network has no route for the name, or that it is no name of a host.
func outside(err error) bool {
	return errors.Is(err, control.ErrNoRoute) || errors.Is(err, control.ErrInvalid)
}

// exchange asks one server, over UDP and, if the answer is cut short or does not come, over TCP.
func (s *Server) exchange(ctx context.Context, k question, to control.Query) (*mdns.Msg, error) {
	m := new(mdns.Msg).SetQuestion(k.name, k.typ)
	m.Id = uint16(rand.Uint32())
	m.CheckingDisabled = k.cd
	m.SetEdns0(offered, k.do)
	packed, err := m.Pack()
	if err != nil {
		return nil, fmt.Errorf("dns: pack: %w", err)
	}
	reply, err := s.overUDP(ctx, to, m, packed)
	if err == nil && !reply.Truncated {
		return reply, nil
	}
	if outside(err) || errors.Is(err, tunnel.ErrDenied) || ctx.Err() != nil {
		return nil, err
	}
	return s.overTCP(ctx, to, m)
}

func (s *Server) overUDP(ctx context.Context, to control.Query, m *mdns.Msg, packed []byte) (*mdns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, udpTimeout)
	defer cancel()
	c, err := s.cfg.Dialer.DialPacket(ctx, to)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) }) //nolint:errcheck // the flow has ended, then
	defer stop()
	if err := c.WritePacket(packed); err != nil {
		return nil, err
	}
	for {
		b, err := tunnel.ReceivePacket(c)
		if err != nil {
			return nil, err
		}
		reply := new(mdns.Msg)
		if reply.Unpack(b) == nil && answers(reply, m) {
			return reply, nil
		}
	}
}

func (s *Server) overTCP(ctx context.Context, to control.Query, m *mdns.Msg) (*mdns.Msg, error) {
	c, err := s.cfg.Dialer.Dial(ctx, to)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) }) //nolint:errcheck // the flow has ended, then
	defer stop()
	conn := &mdns.Conn{Conn: streamConn{c}}
	if err := conn.WriteMsg(m); err != nil {
		return nil, err
	}
	reply, err := conn.ReadMsg()
	if err != nil {
		return nil, err
	}
	if !answers(reply, m) {
		return nil, errors.New("dns: the answer is to another question")
	}
	return reply, nil
}

// streamConn is a flow that is no packet connection, whatever else it can do.
type streamConn struct{ net.Conn }

// answers reports whether reply is the answer to m.
func answers(reply, m *mdns.Msg) bool {
	return reply.Response && reply.Id == m.Id && len(reply.Question) == 1 && reply.Question[0].Qtype == m.Question[0].Qtype &&
		reply.Question[0].Qclass == m.Question[0].Qclass && strings.EqualFold(reply.Question[0].Name, m.Question[0].Name)
}
