package forward

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/proxyproto"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	tcpIdle     = 10 * time.Minute
	acceptPause = 50 * time.Millisecond // after a failed accept, such as for want of descriptors
)

// openTCP listens and serves until the listener is closed. The caller holds f.mu.
func (p *port) openTCP(ctx context.Context) error {
	ln, err := p.f.listen("tcp", p.listen)
	if err != nil {
		return err
	}
	p.closer, p.addr = ln, ln.Addr()
	p.pause = func() { _ = ln.Close() }
	p.f.running.Go(func() { p.accept(ctx, ln.(*net.TCPListener)) })
	return nil
}

func (p *port) accept(ctx context.Context, ln *net.TCPListener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for {
		conn, err := ln.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.f.log.Warn("accept failed", "port", p.name, "err", err)
			sleep(ctx, acceptPause)
			continue
		}
		visitor := plain(conn.RemoteAddr())
		fctx, cut := context.WithCancelCause(ctx)
		o, cfg, refusal := p.enter(visitor.Addr(), cut)
		if refusal != "" {
			cut(nil)
			p.count.refused(refusal)
			_ = conn.SetLinger(0)
			_ = conn.Close()
			continue
		}
		wg.Go(func() {
			defer cut(nil)
			defer p.leave(o)
			p.count.begin()
			defer p.count.end()
			p.serve(fctx, cut, conn, visitor, &cfg)
		})
	}
}

// serve carries one connection from its first byte to its last.
func (p *port) serve(ctx context.Context, cut context.CancelCauseFunc, conn *net.TCPConn, visitor netip.AddrPort, cfg *spec.PortConfig) {
	service, lease, err := p.dial(ctx, cfg, visitor, plain(conn.LocalAddr()))
	if err != nil {
		p.count.failed()
		p.f.log.Debug("port's service cannot be reached", "port", p.name, "err", err)
		_ = conn.SetLinger(0) // the visitor sees a reset, not a service that had nothing to say
		_ = conn.Close()
		return
	}
	if lease != nil {
		closed := lease.Open()
		defer closed()
	}
	visit := &busyConn{TCPConn: conn}
	idle := watchIdle(cfg.IdleTimeout.D(tcpIdle), &visit.last, func() { cut(errIdle) })
	in, out, err := tunnel.Splice(ctx, visit, service)
	idle()
	p.count.bytes(in, out)
	if lease != nil {
		lease.Done(balance.OK)
	}
	if err != nil {
		p.f.log.Debug("port's connection cut", "port", p.name, "err", err)
	}
}

// dial reaches the service, or another endpoint of its pool if the first cannot be reached.
func (p *port) dial(ctx context.Context, cfg *spec.PortConfig, visitor, local netip.AddrPort) (tunnel.Conn, *balance.Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	var tried []*balance.Lease
	for {
		q, version, lease, err := p.target(ctx, cfg, visitor, tried)
		if err != nil {
			return nil, nil, err
		}
		conn, err := p.f.cfg.Dialer.Dial(ctx, q)
		if err == nil && version != "" {
			if err = proxyproto.Announce(ctx, conn, version, visitor, local); err != nil {
				_ = conn.Close()
			}
		}
		if err == nil {
			if flow, ok := conn.(tunnel.Conn); ok {
				return flow, lease, nil
			}
			_ = conn.Close()
			err = errors.New("forward: the connection has no half-close")
		}
		if lease == nil {
			return nil, nil, err
		}
		lease.Done(balance.Result(errors.Is(ctx.Err(), context.Canceled)))
		if tried = append(tried, lease); len(tried) > 1 || ctx.Err() != nil {
			return nil, nil, err
		}
	}
}

// A busyConn notes when it was last of use.
type busyConn struct {
	*net.TCPConn
	last atomic.Int64 // since an arbitrary moment, in nanoseconds
}

var epoch = time.Now()

func (c *busyConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	c.last.Store(int64(time.Since(epoch)))
	return n, err
}

func (c *busyConn) Write(p []byte) (int, error) {
	n, err := c.TCPConn.Write(p)
	c.last.Store(int64(time.Since(epoch)))
	return n, err
}

// watchIdle calls cut once nothing has happened for the limit. It returns what ends the watch.
func watchIdle(limit time.Duration, last *atomic.Int64, cut func()) (stop func()) {
	last.Store(int64(time.Since(epoch)))
	var mu sync.Mutex
	var timer *time.Timer
	over := false
	check := func() {
		mu.Lock()
		defer mu.Unlock()
		if over {
			return
		}
		if left := limit - (time.Since(epoch) - time.Duration(last.Load())); left > 0 {
			timer.Reset(left)
			return
		}
		cut()
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(limit, check)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

func plain(a net.Addr) netip.AddrPort {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
