package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"
)

// The small request and reply, in bytes, and what one bulk operation moves; its processor time is that of one chunk.
const (
	small = 100
	chunk = 1 << 20
)

// flows measures the tunnel against plain loopback: bulk in both directions, and small requests on open flows.
func (b *bench) flows(ctx context.Context) error {
	ln, err := net.Listen("tcp", b.lab.Plan.Sites[0].Origin)
	if err != nil {
		return err
	}
	done := make(chan struct{})
	go func() { defer close(done); serveFlows(ln) }()
	defer func() { ln.Close(); <-done }()
	var bulk, requests []*measured
	direct := func(ctx context.Context, addr string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", addr)
	}
	for _, w := range []way{{"loopback", direct}, {"tunnel", b.throughTunnel}} {
		conns := make([]net.Conn, 64)
		for i := range conns {
			if conns[i], err = w.dial(ctx, ln.Addr().String()); err != nil {
				return err
			}
			defer conns[i].Close()
		}
		for _, n := range []int{1, 16} {
			bulk = append(bulk, &measured{name: "to the visitor, " + w.name, callers: n, op: func(_ context.Context, i int) error { return exchange(conns[i], 1, chunk) }},
				&measured{name: "to the origin, " + w.name, callers: n, op: func(_ context.Context, i int) error { return exchange(conns[i], chunk, 1) }})
		}
		for _, n := range []int{1, 64} {
			requests = append(requests, &measured{name: "100 B and 100 B back, " + w.name, callers: n, op: func(_ context.Context, i int) error { return exchange(conns[i], small, small) }})
		}
	}
	if err := b.measure(ctx, "bulk", bulk); err != nil {
		return err
	}
	for i := range b.report.rows {
		if r := &b.report.rows[i]; r.Group == "bulk" {
			r.Rate, r.Unit, r.P50, r.P99 = r.Rate*chunk*8/1e6, "Mb/s", 0, 0
		}
	}
	if err := b.measure(ctx, "request", requests); err != nil {
		return err
	}
	for _, n := range []int{1, 16} {
		for _, dir := range []string{"to the visitor, ", "to the origin, "} {
			b.report.compare(fmt.Sprintf("bulk %s%d flows: tunnel / loopback", dir, n), b.report.rate("bulk", "", dir+"tunnel", n), b.report.rate("bulk", "", dir+"loopback", n), 0)
		}
	}
	for _, n := range []int{1, 64} {
		b.report.compare(fmt.Sprintf("small requests, %d at a time: tunnel / loopback", n),
			b.report.rate("request", "", "100 B and 100 B back, tunnel", n), b.report.rate("request", "", "100 B and 100 B back, loopback", n), 0)
	}
	return nil
}

// exchange sends a header with both sizes, then up bytes, and reads down bytes.
func exchange(c net.Conn, up, down int) error {
	c.SetDeadline(time.Now().Add(30 * time.Second))
	buf := buffers.get()
	defer buffers.put(buf)
	binary.BigEndian.PutUint32(buf, uint32(up))
	binary.BigEndian.PutUint32(buf[4:], uint32(down))
	for left := 8 + up; left > 0; {
		n, err := c.Write(buf[:min(left, len(buf))])
		if err != nil {
			return err
		}
		left -= n
	}
	return discard(c, buf, down)
}

func discard(r io.Reader, buf []byte, n int) error {
	for n > 0 {
		m, err := r.Read(buf[:min(n, len(buf))])
		n -= m
		if err != nil && n > 0 {
			return err
		}
	}
	return nil
}

// serveFlows answers exchanges until the listener is closed.
func serveFlows(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() { // ends with its connection, which the bench closes
			defer c.Close()
			buf, head := make([]byte, 64<<10), make([]byte, 8)
			for {
				if _, err := io.ReadFull(c, head); err != nil {
					return
				}
				up, down := int(binary.BigEndian.Uint32(head)), int(binary.BigEndian.Uint32(head[4:]))
				if discard(c, buf, up) != nil {
					return
				}
				for down > 0 {
					n, err := c.Write(buf[:min(down, len(buf))])
					if err != nil {
						return
					}
					down -= n
				}
			}
		}()
	}
}

// buffers is a free list of what exchanges use.
var buffers = make(pool, 64)

type pool chan []byte

func (p pool) get() []byte {
	select {
	case b := <-p:
		return b
	default:
		return make([]byte, 64<<10)
	}
}

func (p pool) put(b []byte) {
	select {
	case p <- b:
	default:
	}
}
