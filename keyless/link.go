package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Back-off between connection attempts: full jitter below a limit that doubles from minBackoff to maxBackoff.
const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 3 * time.Second
	// provenAfter is how long a connection must have lived for its end to be answered by an attempt without delay.
	provenAfter = time.Second
)

// A link keeps one connection to a server: it connects, watches, and connects again until the client is closed. While
// it is in its first attempt, requests may wait for it. Once that failed it is a half-open breaker: it goes on trying
// in the background and nobody waits.
type link struct {
	client  *Client
	remote  *remote
	session *session // set while the link is in client.live; guarded by client.mu
	first   bool     // counted in client.trying; only run's goroutine uses it
}

// run is the link's goroutine. The link starts counted in client.trying.
func (l *link) run() {
	c, ctx := l.client, l.remote.ctx
	l.first = true
	defer l.giveUp()
	backoff := minBackoff
	for ctx.Err() == nil {
		s, err := l.connect()
		if err == nil {
			born := time.Now()
			l.up(s)
			err = s.watch(ctx, c.cfg.Heartbeat, c.cfg.DialTimeout, c.pingAll)
			l.down()
			if ctx.Err() != nil {
				l.giveUp() // the server was taken out, or the client closed
			}
			if errors.Is(err, errDraining) || ctx.Err() != nil {
				s.quiesce(c.ctx, c.cfg.Timeout)
			}
			s.end(err)
			if ctx.Err() != nil {
				return
			}
			c.log.Info("key server connection ended", "peer", l.remote.addr, "err", err)
			if errors.Is(err, errDraining) {
				backoff = minBackoff // no failure, however young the connection is
			} else {
				l.remote.failed(err)
			}
			if time.Since(born) >= provenAfter {
				backoff = minBackoff
				continue
			}
			if backoff > minBackoff {
				l.giveUp() // it comes and goes: not worth waiting for
			}
		} else {
			if ctx.Err() != nil {
				return
			}
			l.remote.failed(err)
			if l.first {
				c.log.Warn("key server cannot be reached, trying again in the background", "peer", l.remote.addr, "err", err)
			}
			l.giveUp()
		}
		sleep(ctx, rand.N(backoff))
		backoff = min(2*backoff, maxBackoff)
	}
}

// pingAll has all servers pinged, so that connections whose path has died are known before a request is sent over them.
func (c *Client) pingAll() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.live {
		l.session.pingSoon()
	}
}

// up makes the link usable.
func (l *link) up(s *session) {
	l.client.log.Info("key server connected", "peer", l.remote.addr)
	l.change(func(c *Client) {
		l.session = s
		if l.remote.ctx.Err() == nil { // not taken out meanwhile
			c.live = append(c.live, l)
		}
		if l.first {
			c.trying--
		}
	})
	l.first = false
}

// down takes the link out of use. It is at once in a first attempt again.
func (l *link) down() {
	l.first = true
	l.change(func(c *Client) {
		for i, other := range c.live {
			if other == l {
				c.live = append(c.live[:i:i], c.live[i+1:]...)
				break
			}
		}
		l.session = nil
		c.trying++
	})
}

// giveUp ends the first attempt.
func (l *link) giveUp() {
	if !l.first {
		return
	}
	l.first = false
	l.change(func(c *Client) { c.trying-- })
}

// change runs f under the client's lock and wakes whoever waits in acquire.
func (l *link) change(f func(*Client)) {
	c := l.client
	c.mu.Lock()
	defer c.mu.Unlock()
	f(c)
	close(c.changed)
	c.changed = make(chan struct{})
}

// connect dials, shakes hands and waits for the answer to a first ping: with TLS 1.3 only that shows that the server
// has accepted the client's certificate.
func (l *link) connect() (*session, error) {
	cfg := &l.client.cfg
	l.remote.dials.Add(1)
	ctx, cancel := context.WithTimeout(l.remote.ctx, cfg.DialTimeout)
	defer cancel()
	raw, err := cfg.Dial(ctx, l.remote.addr)
	if err != nil {
		return nil, fmt.Errorf("keyless: dial %s: %w", l.remote.addr, err)
	}
	tlsConfig := cfg.TLS(l.remote.addr)
	if !authenticates(tlsConfig) {
		raw.Close()
		return nil, fmt.Errorf("keyless: the TLS configuration for %s does not authenticate the server", l.remote.addr)
	}
	tlsConfig = tlsConfig.Clone()
	tlsConfig.DynamicRecordSizingDisabled = true
	conn := tls.Client(raw, tlsConfig)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, fmt.Errorf("keyless: TLS handshake with %s: %w", l.remote.addr, err)
	}
	s := newSession(conn, raw, cfg.MaxInFlight)
	if err := s.ping(ctx); err != nil {
		s.end(err)
		return nil, fmt.Errorf("keyless: first ping of %s: %w", l.remote.addr, err)
	}
	return s, nil
}

// authenticates reports whether a handshake with cfg can fail because of who the server is.
func authenticates(cfg *tls.Config) bool {
	return cfg != nil && (!cfg.InsecureSkipVerify || cfg.VerifyConnection != nil || cfg.VerifyPeerCertificate != nil)
}
