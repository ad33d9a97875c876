package tunnel

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// Each benchmark runs over plain TCP and TLS on loopback too, so that one run gives ratios. The tunnel's flows end at the
// connector's handler; nothing else is in between.

// benchVias are the ways that benchmarks compare: raw connections, and flows over each carrier.
var benchVias = []string{"rawtcp", "rawtls", "tcp", "quic"}

// benchDialers opens connections to a server that serves each with serve.
func benchDialers(b *testing.B, serve func(Conn)) map[string]func() Conn {
	p := newPKI(b)
	client := connectorTLS(p.source(mtls.KindConnector, "bench", 0))
	server := p.source(mtls.KindEdge, "bench", 0).ServerConfig(mtls.ServerOptions{ALPN: []string{ALPN}, Accept: mtls.AcceptKinds(mtls.KindConnector)})
	dialers := map[string]func() Conn{
		"rawtcp": benchRaw(b, serve, func(c *net.TCPConn) Conn { return c }, func(c *net.TCPConn) Conn { return c }),
		"rawtls": benchRaw(b, serve, func(c *net.TCPConn) Conn { return tls.Client(c, client) }, func(c *net.TCPConn) Conn { return tls.Server(c, server) }),
	}
	for _, via := range []Carrier{CarrierTCP, CarrierQUIC} {
		_, _, s := pairOver(b, via, accept(serve))
		dialers[string(via)] = func() Conn {
			c, err := s.Open(context.Background(), testFlow)
			if err != nil {
				b.Error(err)
				return nil
			}
			return c
		}
	}
	return dialers
}

// benchRaw serves connections and returns how to make one.
func benchRaw(b *testing.B, serve func(Conn), client, server func(*net.TCPConn) Conn) func() Conn {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				serve(server(c.(*net.TCPConn)))
			})
		}
	})
	b.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
	return func() Conn {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			b.Error(err)
			return nil
		}
		return client(c.(*net.TCPConn))
	}
}

// BenchmarkBulk sends from the connector to the edge, as downloads go, over so many flows at a time.
func BenchmarkBulk(b *testing.B) {
	const chunk = 64 << 10
	dialers := benchDialers(b, func(c Conn) {
		buf := make([]byte, chunk)
		for {
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	for _, via := range benchVias {
		for _, flows := range []int{1, 16} {
			b.Run(fmt.Sprintf("%s/%d", via, flows), func(b *testing.B) {
				conns := make([]Conn, flows)
				for i := range conns {
					conns[i] = dialers[via]()
					conns[i].Write(nil) // TLS shakes hands
				}
				b.SetBytes(chunk)
				b.ReportAllocs()
				b.ResetTimer()
				var wg sync.WaitGroup
				for i, c := range conns {
					n := b.N / flows
					if i < b.N%flows {
						n++
					}
					wg.Go(func() {
						buf := make([]byte, chunk)
						for range n {
							if _, err := io.ReadFull(c, buf); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.StopTimer()
				for _, c := range conns {
					c.Close()
				}
			})
		}
	}
}

// BenchmarkSmall sends 100 bytes and waits for 100 bytes: on a flow of each caller's own ("held"), and on a fresh flow each
// time ("fresh").
func BenchmarkSmall(b *testing.B) {
	dialers := benchDialers(b, func(c Conn) {
		buf := make([]byte, 100)
		for {
			if _, err := io.ReadFull(c, buf); err != nil {
				return
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	})
	for _, kind := range []string{"held", "fresh"} {
		for _, via := range benchVias {
			for _, callers := range []int{1, 64} {
				b.Run(fmt.Sprintf("%s/%s/%d", kind, via, callers), func(b *testing.B) {
					benchSmall(b, dialers[via], kind == "fresh", callers)
				})
			}
		}
	}
}

func benchSmall(b *testing.B, dial func() Conn, fresh bool, callers int) {
	b.ReportAllocs()
	took := make([][]time.Duration, callers)
	var wg sync.WaitGroup
	for i := range callers {
		n := b.N / callers
		if i < b.N%callers {
			n++
		}
		wg.Go(func() {
			buf := make([]byte, 100)
			var c Conn
			for range n {
				start := time.Now()
				if c == nil {
					if c = dial(); c == nil {
						return
					}
				}
				if _, err := c.Write(buf); err != nil {
					b.Error(err)
					return
				}
				if _, err := io.ReadFull(c, buf); err != nil {
					b.Error(err)
					return
				}
				if fresh {
					c.Close()
					c = nil
				}
				took[i] = append(took[i], time.Since(start))
			}
			if c != nil {
				c.Close()
			}
		})
	}
	wg.Wait()
	all := slices.Concat(took...)
	if len(all) == 0 {
		return
	}
	slices.Sort(all)
	b.ReportMetric(float64(all[len(all)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(all[len(all)*99/100].Microseconds()), "p99-µs")
}

// BenchmarkDistant is BenchmarkBulk with 20 ms of round-trip time, which an ordinary process in between makes; so it is the
// windows that it measures, not the machine. Each iteration is one transfer of 16 MiB over a session that is warm.
func BenchmarkDistant(b *testing.B) {
	const size, delay = 16 << 20, 10 * time.Millisecond
	for _, flows := range []int{1, 4} {
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			p := newPKI(b)
			e := startEdge(b, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll})
			dc := dialOver(e, CarrierQUIC, p.source(mtls.KindConnector, "c1", 0), accept(func(c Conn) { c.Write(make([]byte, size/flows)) }))
			dc.Addr = newRelay(b, e.ln.Addr().String(), delay).addr()
			startConnector(b, dc)
			s := e.session()
			b.SetBytes(size)
			for b.Loop() {
				var wg sync.WaitGroup
				for range flows {
					wg.Go(func() {
						c := open(b, s, testFlow)
						defer c.Close()
						if n, err := io.Copy(io.Discard, c); err != nil || n != int64(size/flows) {
							b.Errorf("read %d bytes, %v", n, err)
						}
					})
				}
				wg.Wait()
			}
			b.ReportMetric(float64(s.RTT().Microseconds())/1000, "rtt-ms")
		})
	}
}
