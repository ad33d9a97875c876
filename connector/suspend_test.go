package connector

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// TestSuspend has a connector make no session while another process may take its place, and replace all once that failed.
func TestSuspend(t *testing.T) {
	d := alwaysUp()
	bubble(t, d, Config{}, func(c *Connector, stop func()) {
		time.Sleep(time.Second)
		before := d.living()
		if len(before) != SessionsPerEdge {
			t.Fatalf("got %d sessions, want %d", len(before), SessionsPerEdge)
		}
		c.Suspend()
		before[0].s.lose(&tunnel.SessionError{Err: tunnel.ErrPeerLost})
		time.Sleep(time.Minute)
		if n := len(d.all()); n != SessionsPerEdge {
			t.Errorf("got %d attempts, want those before the suspension: %d", n, SessionsPerEdge)
		}
		c.Resume()
		time.Sleep(10 * time.Second)
		d.wantPerAddr(t, map[string]int{"192.0.2.1:7844": SessionsPerEdge})
		if n := len(d.all()); n != 2*SessionsPerEdge {
			t.Errorf("got %d attempts, want one for each session and one for each that replaces it", n)
		}
		for _, a := range before {
			if a.s.alive() {
				t.Errorf("session %d, which an edge may have retired, still stands", a.reg.Index)
			}
		}
		c.Suspend() // and ends all the same
		stop()
	})
}

// TestSuspendCutsAttempts has one end that was under way, and go on afterwards.
func TestSuspendCutsAttempts(t *testing.T) {
	var up atomic.Bool
	d := &dials{answer: func(tunnel.DialConfig) (session, error) {
		if !up.Load() {
			return nil, errHang
		}
		return newFake(), nil
	}}
	bubble(t, d, Config{}, func(c *Connector, _ func()) {
		synctest.Wait()
		start := time.Now()
		c.Suspend()
		if waited := time.Since(start); waited != 0 {
			t.Errorf("attempts went on for %v", waited)
		}
		tried := len(d.all())
		time.Sleep(time.Minute)
		if n := len(d.all()); n != tried {
			t.Errorf("%d attempts while suspended", n-tried)
		}
		up.Store(true)
		c.Resume()
		time.Sleep(10 * time.Second)
		d.wantPerAddr(t, map[string]int{"192.0.2.1:7844": SessionsPerEdge})
	})
}
