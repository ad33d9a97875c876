package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A site is the service behind the tunnels that are compared: on one TCP port small HTTP requests and exchanges of bytes
// (an 8-byte header with how many come and how many to send), on one UDP port an echo.
type site struct {
	addr     string       // host:port for both
	received atomic.Int64 // bytes that came with exchanges
	tcp      net.Listener
	udp      net.PacketConn
	http     *http.Server
	web      handover
	wg       sync.WaitGroup

	mu    sync.Mutex // guards conns
	conns map[net.Conn]struct{}
}

// startSite serves in a namespace until stop.
func startSite(ns *testnet.Namespace, addr string) (*site, error) {
	s := &site{addr: addr, web: handover{conns: make(chan net.Conn), done: make(chan struct{})}, conns: map[net.Conn]struct{}{}}
	err := ns.Do(func() (err error) {
		if s.tcp, err = net.Listen("tcp", addr); err != nil {
			return err
		}
		s.udp, err = net.ListenPacket("udp", addr)
		return err
	})
	if err != nil {
		if s.tcp != nil {
			s.tcp.Close()
		}
		return nil, err
	}
	s.udp.(*net.UDPConn).SetReadBuffer(4 << 20)
	body := make([]byte, small)
	s.http = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write(body) })}
	s.web.addr = s.tcp.Addr()
	s.wg.Go(func() { s.http.Serve(&s.web) })
	s.wg.Go(s.accept)
	s.wg.Go(s.echo)
	return s, nil
}

func (s *site) stop() error {
	err := errors.Join(s.tcp.Close(), s.udp.Close(), s.http.Close())
	s.web.Close()
	s.mu.Lock()
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return err
}

func (s *site) accept() {
	for {
		c, err := s.tcp.Accept()
		if err != nil {
			return
		}
		s.mu.Lock()
		s.conns[c] = struct{}{}
		s.mu.Unlock()
		s.wg.Go(func() { s.serve(c) })
	}
}

// serve tells HTTP from exchanges by the first bytes.
func (s *site) serve(c net.Conn) {
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	r := bufio.NewReaderSize(c, 64<<10)
	if head, err := r.Peek(4); err == nil && string(head) == "GET " {
		s.web.give(&peeked{c, r})
		return
	}
	defer c.Close()
	head, buf := make([]byte, 8), make([]byte, 64<<10)
	for {
		if _, err := io.ReadFull(r, head); err != nil {
			return
		}
		up, down := int(binary.BigEndian.Uint32(head)), int(binary.BigEndian.Uint32(head[4:]))
		for up > 0 {
			n, err := r.Read(buf[:min(up, len(buf))])
			s.received.Add(int64(n))
			up -= n
			if err != nil {
				return
			}
		}
		for down > 0 {
			n, err := c.Write(buf[:min(down, len(buf))])
			if err != nil {
				return
			}
			down -= n
		}
	}
}

func (s *site) echo() {
	buf := make([]byte, 2048)
	for {
		n, from, err := s.udp.ReadFrom(buf)
		if err != nil {
			return
		}
		s.udp.WriteTo(buf[:n], from) // lost if the buffer is full, as packets are
	}
}

// handover is a listener of connections that somebody else has accepted.
type handover struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
	addr  net.Addr
}

func (h *handover) give(c net.Conn) {
	select {
	case h.conns <- c:
	case <-h.done:
		c.Close()
	}
}

func (h *handover) Accept() (net.Conn, error) {
	select {
	case c := <-h.conns:
		return c, nil
	case <-h.done:
		return nil, net.ErrClosed
	}
}

func (h *handover) Close() error { h.once.Do(func() { close(h.done) }); return nil }

func (h *handover) Addr() net.Addr { return h.addr }

// peeked is a connection of which a part has been read ahead.
type peeked struct {
	net.Conn
	r io.Reader
}

func (p *peeked) Read(b []byte) (int, error) { return p.r.Read(b) }

// dialIn opens a TCP connection from a namespace.
func dialIn(ctx context.Context, ns *testnet.Namespace, addr string) (c net.Conn, err error) {
	err = ns.Do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, "tcp", addr)
		return err
	})
	return c, err
}
