package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// bulk measures the bytes that n streams move in d, after a time in which they come up to speed, and the processor
// time of the contender's processes meanwhile.
func (c *contender) bulk(ctx context.Context, n int, up bool, d time.Duration) (bytes int64, cpu time.Duration, err error) {
	var got atomic.Int64
	var wg sync.WaitGroup
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
		wg.Wait()
	}()
	const endless = 1<<32 - 1
	for range n {
		conn, err := c.dial(ctx)
		if err != nil {
			return 0, 0, err
		}
		conns = append(conns, conn)
		head := make([]byte, 8)
		if up {
			binary.BigEndian.PutUint32(head, endless)
		} else {
			binary.BigEndian.PutUint32(head[4:], endless)
		}
		if _, err := conn.Write(head); err != nil {
			return 0, 0, err
		}
		wg.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				move := conn.Read
				if up {
					move = conn.Write
				}
				n, err := move(buf)
				if got.Add(int64(n)); err != nil {
					return // closed at the end
				}
			}
		})
	}
	count := got.Load
	if up {
		count = c.site.received.Load // what has arrived, not what is under way
	}
	if err := sleep(ctx, max(d/2, c.link.warmUp)); err != nil {
		return 0, 0, err
	}
	before, spent := count(), cpuTime(c.pids())
	if err := sleep(ctx, d); err != nil {
		return 0, 0, err
	}
	return count() - before, cpuTime(c.pids()) - spent, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// requests measures small HTTP requests on kept connections.
func (c *contender) requests(ctx context.Context, inFlight int, d time.Duration) (sample, error) {
	tr := &http.Transport{MaxIdleConnsPerHost: inFlight, DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) }}
	defer tr.CloseIdleConnections()
	one := func(ctx context.Context, _ int) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+c.tcp+"/", nil)
		if err != nil {
			return err
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != small {
			return fmt.Errorf("answer of %d bytes: %w", n, err)
		}
		return nil
	}
	if _, err := load(ctx, inFlight, d/4, nil, one); err != nil { // opens the connections
		return sample{}, err
	}
	return load(ctx, inFlight, d, c.pids(), one)
}

// setUps measures the time from the call to the first byte from the site, one connection after the other.
func (c *contender) setUps(ctx context.Context, d time.Duration) (s sample, err error) {
	var lats []time.Duration
	err = c.from.Do(func() error { // one thread in the namespace for all, so that entering it costs nothing
		for end := time.Now().Add(d); time.Now().Before(end); {
			began := time.Now()
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.tcp)
			if err != nil {
				return err
			}
			err = exchange(conn, 1, 1)
			conn.Close()
			if err != nil {
				return err
			}
			lats = append(lats, time.Since(began))
		}
		return nil
	})
	return sampleOf(lats, d), err
}

// packets measures the echo of UDP packets: inFlight of them are under way at any time, and one that has not come back
// after a while is lost and another sent in its place.
func (c *contender) packets(ctx context.Context, inFlight int, d time.Duration) (perSecond, lost float64, err error) {
	var conn net.Conn
	if err := c.from.Do(func() (err error) { conn, err = net.Dial("udp", c.udp); return err }); err != nil {
		return 0, 0, err
	}
	defer conn.Close()
	conn.(*net.UDPConn).SetReadBuffer(4 << 20)
	const patience = 300 * time.Millisecond
	due := make([]time.Time, inFlight) // of the slot's newest packet; a packet carries its slot and its number
	newest := make([]uint32, inFlight)
	buf := make([]byte, 2048)
	send := func(slot int) error {
		newest[slot]++
		due[slot] = time.Now().Add(patience)
		binary.BigEndian.PutUint32(buf, uint32(slot))
		binary.BigEndian.PutUint32(buf[4:], newest[slot])
		_, err := conn.Write(buf[:2*small])
		if err != nil && ctx.Err() == nil && !isRefused(err) {
			return err
		}
		return nil
	}
	for slot := range inFlight {
		if err := send(slot); err != nil {
			return 0, 0, err
		}
	}
	warm := time.Now().Add(d / 4)
	end := warm.Add(d)
	var back, missing int
	swept := time.Now()
	for now := time.Now(); now.Before(end) && ctx.Err() == nil; now = time.Now() {
		if now.Sub(swept) > patience/10 {
			swept = now
			for slot := range due {
				if now.After(due[slot]) {
					if now.After(warm) {
						missing++
					}
					if err := send(slot); err != nil {
						return 0, 0, err
					}
				}
			}
		}
		conn.SetReadDeadline(now.Add(patience / 10))
		n, err := conn.Read(buf)
		if err != nil || n != 2*small {
			continue // nothing came, or a refusal
		}
		slot := int(binary.BigEndian.Uint32(buf))
		if slot >= inFlight || binary.BigEndian.Uint32(buf[4:]) != newest[slot] {
			continue // given up before it came
		}
		if now.After(warm) {
			back++
		}
		if err := send(slot); err != nil {
			return 0, 0, err
		}
	}
	if back == 0 {
		return 0, 1, fmt.Errorf("no packet of %d came back", missing)
	}
	return float64(back) / d.Seconds(), float64(missing) / float64(back+missing), ctx.Err()
}

func isRefused(err error) bool { return strings.Contains(err.Error(), "refused") }

// resident returns the resident memory of the contender's processes in MiB, idle and with so many streams open.
func (c *contender) resident(ctx context.Context, streams int) (idle, busy float64, err error) {
	idle = rss(c.pids())
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for range streams {
		conn, err := c.dial(ctx)
		if err != nil {
			return 0, 0, err
		}
		conns = append(conns, conn)
		if err := exchange(conn, 1, 1); err != nil {
			return 0, 0, err
		}
	}
	return idle, rss(c.pids()), nil
}

// rss is the resident memory of processes in MiB.
func rss(pids []int) (sum float64) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
		if err != nil {
			continue
		}
		if f := strings.Fields(string(b)); len(f) > 1 {
			pages, _ := strconv.Atoi(f[1])
			sum += float64(pages*os.Getpagesize()) / (1 << 20)
		}
	}
	return sum
}
