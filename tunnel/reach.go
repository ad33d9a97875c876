package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// reachSettle is the least time that an edge has to refuse the certificate after the handshake.
const reachSettle = 250 * time.Millisecond

// A Reached is an edge that answered.
type Reached struct {
	// Peer is the edge's identity, Leaf its certificate.
	Peer mtls.Identity
	Leaf *x509.Certificate
	// Took is how long the handshake took, the edge's name resolved.
	Took time.Duration
}

var errReached = errors.New("reached")

// Reach makes a connection to an edge as [Dial] does, over cfg.Carrier or whichever answers first, sees whether the edge
// refuses the connector's certificate, and gives the connection up without registering: the sessions of a connector that
// runs with the same identity are left alone. Of cfg, Addr, LocalAddr, Identity, Carrier, Proxy, SmallPackets and Limits
// count. Its errors are Dial's.
func Reach(ctx context.Context, cfg DialConfig) (Reached, error) {
	if cfg.Identity == nil {
		return Reached{}, errors.New("tunnel: reach: DialConfig needs Identity")
	}
	cfg.Registration = Registration{Instance: "reach"}
	cfg, err := cfg.withDefaults(defaultSessionWindow)
	if err != nil {
		return Reached{}, fmt.Errorf("tunnel: reach %s: %w", cfg.Addr, err)
	}
	var r Reached
	start := time.Now()
	d := dialer{DialConfig: cfg, tls: cfg.tlsConfig(ALPN), register: func(ctx context.Context, car carrier) (err error) {
		r.Took = time.Since(start)
		st := car.tlsState()
		if r.Peer, err = mtls.PeerIdentity(st); err != nil {
			return err
		}
		r.Leaf = st.PeerCertificates[0]
		settle := time.NewTimer(reachSettle + 2*r.Took)
		defer settle.Stop()
		select {
		case <-car.done(): // in TLS 1.3 a refusal comes after the client's handshake
			return car.err()
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-settle.C:
			return errReached
		}
	}}
	if _, err = d.dial(ctx); errors.Is(err, errReached) {
		return r, nil
	}
	return Reached{}, fmt.Errorf("tunnel: reach %s: %w", cfg.Addr, err)
}
