package edge

import (
	"context"
	"crypto/tls"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
)

// A ticketCache says when a ticket has come.
type ticketCache struct {
	tls.ClientSessionCache
	came chan struct{}
}

func (c *ticketCache) Put(key string, cs *tls.ClientSessionState) {
	c.ClientSessionCache.Put(key, cs)
	if cs != nil {
		select {
		case c.came <- struct{}{}:
		default:
		}
	}
}

// 0-RTT can be replayed: a visitor who offers it resumes, and waits for the handshake.
func TestNoEarlyData(t *testing.T) {
	w := newWorld(t)
	w.addZone("a", "p256", echoOrigin(t), "a.test")
	w.start()
	cfg := w.tlsConfig("a.test")
	cfg.NextProtos = []string{"h3"}
	cache := &ticketCache{tls.NewLRUClientSessionCache(1), make(chan struct{}, 1)}
	cfg.ClientSessionCache = cache
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, resumed := range []bool{false, true} {
		q, err := quic.DialAddrEarly(ctx, w.addr(), cfg, nil)
		must(t, err)
		select {
		case <-q.HandshakeComplete():
		case <-ctx.Done():
			t.Fatal("no handshake")
		}
		if s := q.ConnectionState(); s.Used0RTT || s.TLS.DidResume != resumed {
			t.Errorf("0-RTT %v, resumed %v; want false, %v", s.Used0RTT, s.TLS.DidResume, resumed)
		}
		select {
		case <-cache.came:
		case <-ctx.Done():
			t.Fatal("no ticket")
		}
		_ = q.CloseWithError(0, "")
	}
}
