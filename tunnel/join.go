package tunnel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// joinLimits are for a connection with one small exchange.
var joinLimits = Limits{SessionWindow: 64 << 10, FlowWindow: 64 << 10}

// Join enrols a connector: it connects to an edge, checks it by the token's pin alone, and has csrDER signed. addr is the
// edge's host and port, one of tok.Edges as a rule. The answer's chain is checked against the pin and the request's
// key. The error is a *RefusedError (wrapped) if the edge refuses the token, and ErrNoAnswer if nothing answers. A token
// must not be tried again unless the error is one of ErrNoAnswer or a *RefusedError with Retriable.
func Join(ctx context.Context, addr string, tok mtls.JoinToken, csrDER []byte, name string) (JoinReply, error) {
	return JoinWith(ctx, DialConfig{Addr: addr}, tok, csrDER, name)
}

// JoinWith is Join with a choice of the way: of cfg, Addr, LocalAddr, Carrier, RaceDelay, Proxy and SmallPackets count. As
// [Dial] does, it races the carriers if cfg.Carrier is empty; the token is sent over one of them only.
func JoinWith(ctx context.Context, cfg DialConfig, tok mtls.JoinToken, csrDER []byte, name string) (JoinReply, error) {
	reply, err := join(ctx, cfg, tok, csrDER, name)
	if err != nil {
		return JoinReply{}, fmt.Errorf("tunnel: join %s: %w", cfg.Addr, err)
	}
	return reply, nil
}

func join(ctx context.Context, cfg DialConfig, tok mtls.JoinToken, csrDER []byte, name string) (JoinReply, error) {
	request, err := appendJoin(nil, certItems{CSR: csrDER, TokenID: tok.ID, Secret: tok.Secret.Reveal(), Name: name})
	if err != nil {
		return JoinReply{}, err
	}
	cfg.Handle, cfg.Logger = nil, slog.New(slog.DiscardHandler)
	cfg.Limits = joinLimits.withDefaults(0)
	setDefault(&cfg.RaceDelay, defaultRaceDelay)
	var reply JoinReply
	d := dialer{DialConfig: cfg, tls: mtls.PinnedClientConfig(tok.Pin, JoinALPN), register: func(ctx context.Context, car carrier) (err error) {
		if reply, err = joinOver(ctx, car, request); err != nil {
			return &joinError{err}
		}
		car.close(CloseDone)
		return nil
	}}
	shut, err := d.dial(ctx)
	if err != nil {
		return JoinReply{}, err
	}
	shut()
	return reply, checkJoined(reply, tok, csrDER)
}

// A joinError is that of a join whose token may have been sent: it must not be sent again.
type joinError struct{ error }

func (e *joinError) Unwrap() error { return e.error }

func joinOver(ctx context.Context, car carrier, request []byte) (JoinReply, error) {
	st, err := car.openStream()
	if err != nil {
		return JoinReply{}, err
	}
	stop := context.AfterFunc(ctx, func() {
		st.abortWrite(ResultCancelled)
		st.abortRead(ResultCancelled)
	})
	reply, err := exchangeJoin(st, request, renewTimeout)
	if !stop() {
		return JoinReply{}, context.Cause(ctx)
	}
	return reply, err
}

func exchangeJoin(st stream, request []byte, timeout time.Duration) (JoinReply, error) {
	if err := st.SetDeadline(time.Now().Add(timeout)); err != nil {
		return JoinReply{}, err
	}
	if _, err := st.Write(request); err != nil {
		return JoinReply{}, err
	}
	st.closeWrite()
	f, err := readFrame(st, 0)
	if err != nil {
		return JoinReply{}, unexpectedEOF(err)
	}
	switch f.typ {
	case frameJoined:
		return parseJoined(f.payload)
	case frameRefused:
		return JoinReply{}, parseRefused(f.payload)
	}
	return JoinReply{}, malformed("control frame 0x%02x in answer to join", byte(f.typ))
}

// checkJoined checks that the chain is for the request's key and the identity told, under the pinned root.
func checkJoined(r JoinReply, tok mtls.JoinToken, csrDER []byte) error {
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(r.Chain[0])
	if err != nil {
		return err
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, csr.RawSubjectPublicKeyInfo) {
		return errors.New("the certificate is not for the key of the request")
	}
	if id, err := mtls.IdentityOf(leaf); err != nil || id != r.Identity || id.Kind != mtls.KindConnector {
		return fmt.Errorf("the certificate does not name the connector %s", r.Identity)
	}
	opts := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, der := range r.Chain[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		opts.Intermediates.AddCert(c)
	}
	for rest := r.Roots; ; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return err
		}
		if sha256.Sum256(c.RawSubjectPublicKeyInfo) != tok.Pin {
			return errors.New("the edge sent a root that the token does not pin")
		}
		opts.Roots.AddCert(c)
	}
	if _, err := leaf.Verify(opts); err != nil {
		return fmt.Errorf("the certificate does not verify: %w", err)
	}
	return nil
}

// serveJoin answers one join and closes the connection.
func (l *Listener) serveJoin(ctx context.Context, car carrier) error {
	wait := l.cfg.Limits.SetupTimeout
	setup, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	st, err := car.acceptStream(setup)
	if err != nil {
		car.close(CloseProtocol)
		return fmt.Errorf("wait for the request: %w", err)
	}
	reply, err := l.answerJoin(ctx, car, st)
	if err == nil {
		var b []byte
		if b, err = appendJoined(nil, reply); err == nil {
			finish(car, st, b, CloseDone, wait)
			return nil
		}
	}
	refuse(car, st, joinRefusalOf(err), CloseDone, wait)
	return err
}

func (l *Listener) answerJoin(ctx context.Context, car carrier, st stream) (JoinReply, error) {
	if l.cfg.Join == nil {
		return JoinReply{}, ErrNotAllowed
	}
	remote := addrPortOf(car.remoteAddr())
	if !l.joinRate.allow(remote.Addr(), time.Now()) {
		return JoinReply{}, fmt.Errorf("too many joins from this source: %w", ErrBusy)
	}
	select {
	case l.join <- struct{}{}:
		defer func() { <-l.join }()
	default:
		return JoinReply{}, fmt.Errorf("too many joins at a time: %w", ErrBusy)
	}
	request, err := readJoin(st, l.cfg.Limits.SetupTimeout)
	if err != nil {
		return JoinReply{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	return l.cfg.Join(ctx, JoinRequest{
		TokenID: request.TokenID, Secret: request.Secret, CSR: request.CSR, Name: request.Name, Remote: remote,
	})
}

// readJoin reads the one request and makes sure that nothing follows it.
func readJoin(st stream, timeout time.Duration) (certItems, error) {
	st.SetReadDeadline(time.Now().Add(timeout)) //nolint:errcheck // Read would fail too
	f, err := readFrame(st, 0)
	if err == nil && f.typ != frameJoin {
		err = malformed("control frame 0x%02x in place of join", byte(f.typ))
	}
	if err == nil {
		if n, end := st.Read(make([]byte, 1)); n > 0 || end != io.EOF {
			err = malformed("something follows the join")
		}
	}
	if err != nil {
		return certItems{}, fmt.Errorf("%w: %w", ErrBadRequest, unexpectedEOF(err))
	}
	c, err := parseJoin(f.payload)
	if errors.Is(err, errMalformed) {
		err = fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	return c, err
}

// joinRefusalOf is refusalOf that knows the errors of mtls.JoinRecord.
func joinRefusalOf(err error) RefusalCode {
	switch {
	case errors.Is(err, mtls.ErrTokenUnknown):
		return RefusalTokenUnknown
	case errors.Is(err, mtls.ErrTokenUsed):
		return RefusalTokenUsed
	case errors.Is(err, mtls.ErrTokenExpired):
		return RefusalTokenExpired
	}
	return refusalOf(err)
}

func addrPortOf(a net.Addr) netip.AddrPort {
	if u, ok := a.(interface{ AddrPort() netip.AddrPort }); ok { // UDP and TCP
		ap := u.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
