package connector

import (
	"cmp"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

// What Config.Carrier and SessionStatus.Carrier can be.
const (
	// CarrierAuto races QUIC and TCP, prefers QUIC, and goes back to it when it works again.
	CarrierAuto = "auto"
	// CarrierQUIC is QUIC alone, over UDP.
	CarrierQUIC = "quic"
	// CarrierTCP is TLS 1.3 over TCP alone.
	CarrierTCP = "tcp"
)

// What SessionStatus.Role can be.
const (
	// RoleMain is a session that the connector keeps, for all kinds of flows.
	RoleMain = "main"
	// RoleBulk is a session that the edge asked for, for one bulk flow at a time.
	RoleBulk = "bulk"
)

const (
	// settled is how long a session must have lived for its way to be taken for good.
	settled = 5 * time.Minute
	// silentDeaths is how many young QUIC sessions in a row may die of silence before the next remedy is tried.
	silentDeaths = 2
	// quicFirst and quicMost are the pauses before QUIC is tried again from TCP: the first, and the longest.
	quicFirst = 30 * time.Second
	quicMost  = 5 * time.Minute
)

// A path is what one line has learnt about the way to its edge. The zero value knows nothing.
type path struct {
	silent int           // young QUIC sessions that died of silence, in a row
	small  bool          // QUIC with small packets
	avoid  bool          // TCP without a race
	first  time.Duration // pause before QUIC is tried from TCP; 0 is quicFirst
	pause  time.Duration // the next such pause; 0 is first
}

// carrier returns what the next session shall go over, empty for a race.
func (p *path) carrier(configured string) tunnel.Carrier {
	switch {
	case configured == CarrierQUIC:
		return tunnel.CarrierQUIC
	case configured == CarrierTCP, p.avoid:
		return tunnel.CarrierTCP
	}
	return ""
}

// ended learns from the end of a session.
func (p *path) ended(carrier tunnel.Carrier, lived time.Duration, silent bool) {
	switch {
	case carrier != tunnel.CarrierQUIC:
	case lived >= settled:
		p.silent, p.pause = 0, 0
	case silent:
		if p.silent++; p.silent < silentDeaths {
			return
		}
		// First as if large packets were lost, then as if all were in the end.
		p.silent = 0
		if p.small {
			p.avoid = true
		}
		p.small = true
	}
}

// failed learns from an attempt that came to nothing: without QUIC there was no way, so that it deserves another try.
func (p *path) failed() { p.avoid = false }

// wait is how long a session over TCP goes on before QUIC is tried.
func (p *path) wait() time.Duration {
	if p.pause == 0 {
		p.pause = cmp.Or(p.first, quicFirst)
	}
	return p.pause
}

// postpone is called when QUIC did not work in place of TCP: the next wait is longer, and the next attempt is with packets
// of the other size.
func (p *path) postpone() {
	p.pause = min(2*p.wait(), quicMost)
	p.small = !p.small
}

// back is called when a session went from TCP to QUIC. The pause stays long until QUIC has lasted.
func (p *path) back() {
	p.avoid = false
	p.pause = min(2*p.wait(), quicMost)
}

// forget starts anew, on another network.
func (p *path) forget() { *p = path{first: p.first} }

// isNarrow reports whether TCP to the edge is to use small segments.
func (e *endpoint) isNarrow() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.narrow
}

// stalled learns that nothing came over a TCP connection with small or with large segments: the next one is with the
// others. Several attempts at a time are of one mind.
func (e *endpoint) stalled(small bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.narrow == small {
		e.narrow = !small
		e.c.log.Info("nothing comes over TCP, trying segments of another size", "edge", e.name, "small", e.narrow)
	}
}
