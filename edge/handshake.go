package edge

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/edge/ticket"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/keyless"
)

// A handshake is what becomes known of one handshake while it runs. It travels in the handshake's context.
type handshake struct {
	zone    atomic.Pointer[zone.Zone] // nil until one is selected
	counted atomic.Bool
}

// zoneName returns the name of the zone, "" if none was selected.
func (h *handshake) zoneName() string {
	if z := h.zone.Load(); z != nil {
		return z.Name
	}
	return ""
}

// count reports true once: to the one that has the result to count.
func (h *handshake) count() bool { return !h.counted.Swap(true) }

type handshakeKey struct{}

func withHandshake(ctx context.Context) (context.Context, *handshake) {
	h := new(handshake)
	return context.WithValue(ctx, handshakeKey{}, h), h
}

// handshakeOf never returns nil.
func handshakeOf(ctx context.Context) *handshake {
	if h, ok := ctx.Value(handshakeKey{}).(*handshake); ok {
		return h
	}
	return new(handshake)
}

// A visitorTLS holds the TLS configurations of the zones for one transport.
type visitorTLS struct {
	transport string // "tcp" or "quic"
	refusal   *tls.Config
	zones     map[*zone.Zone][]*identity // those offered over the transport, in the order of their certificates
}

// An identity is a certificate of a zone with its key behind a key server.
type identity struct {
	*certificateKey
	config *tls.Config
}

// A certificateKey is shared by the identities of all transports.
type certificateKey struct {
	cert *zone.Certificate
	key  *keyless.Key
	ill  atomic.Int64 // until when its signatures are taken to fail, Unix nanoseconds
}

// illTime is how long a certificate whose key did not sign is passed over where another one fits.
const illTime = 5 * time.Second

// usable reports whether the certificate is in force and its key known to sign.
func (k *certificateKey) usable(now time.Time) bool {
	return now.UnixNano() >= k.ill.Load() && k.cert.InForce(now)
}

// fits reports whether the visitor can verify a signature of the certificate's key.
func (k *certificateKey) fits(hello *tls.ClientHelloInfo) bool {
	c := tls.Certificate{Certificate: k.cert.Chain, Leaf: k.cert.Leaf, PrivateKey: k.key, SupportedSignatureAlgorithms: k.cert.Schemes}
	return hello.SupportsCertificate(&c) == nil
}

// choose returns the index of the first identity that fits the visitor and is usable, or else of the first that fits, or else 0:
// the handshake then ends with the alert that says why.
func choose(ids []*identity, hello *tls.ClientHelloInfo, now time.Time) int {
	if len(ids) == 1 {
		return 0
	}
	first := -1
	for i, id := range ids {
		if !id.fits(hello) {
			continue
		}
		if id.usable(now) {
			return i
		}
		if first < 0 {
			first = i
		}
	}
	return max(first, 0)
}

// configFor selects the zone by the name that the visitor asks for. Without one, the handshake ends with
// unrecognized_name: there is no default certificate.
func (s *Server) configFor(hello *tls.ClientHelloInfo, of func(*snapshot) *visitorTLS) (*tls.Config, error) {
	now := s.now.Load()
	v := of(now)
	if name, err := zone.Canonical(hello.ServerName); err == nil {
		if z, ok := now.table.Lookup(name); ok && v.zones[z] != nil {
			handshakeOf(hello.Context()).zone.Store(z)
			return s.configOf(z, v.zones[z], hello), nil
		}
	}
	handshakeOf(hello.Context()).count()
	s.metrics.handshake("", v.transport, resultNoZone, false)
	return v.refusal, nil
}

// configOf chooses the certificate for a visitor of the zone.
func (s *Server) configOf(z *zone.Zone, ids []*identity, hello *tls.ClientHelloInfo) *tls.Config {
	i := choose(ids, hello, time.Now())
	if len(ids) == 1 {
		return ids[i].config
	}
	cfg := ids[i].config.Clone()
	s.tickets.BindOnce(cfg, ticket.BindingsOf(z), i)
	return cfg
}

// tlsFor makes the configurations of a snapshot for one transport.
func (s *Server) tlsFor(transport string, zones []*zone.Zone, keys map[*zone.Zone][]*certificateKey, protos func(*zone.Zone) []string, all ...string) *visitorTLS {
	v := &visitorTLS{transport: transport, refusal: zone.Refusal(all...), zones: make(map[*zone.Zone][]*identity)}
	for _, z := range zones {
		offered := protos(z)
		if len(offered) == 0 {
			continue
		}
		bindings := ticket.BindingsOf(z)
		for i, key := range keys[z] {
			cfg := z.TLSConfig(key.cert, s.signerFor(transport, z, key), offered...)
			s.tickets.Bind(cfg, bindings[i])
			v.zones[z] = append(v.zones[z], &identity{key, cfg})
		}
	}
	return v
}

// signerFor returns what binds the certificate's key to one handshake, and measures it.
func (s *Server) signerFor(transport string, z *zone.Zone, key *certificateKey) zone.SignerFunc {
	return func(hello *tls.ClientHelloInfo, sni string) crypto.Signer {
		m := measured{s: s, transport: transport, zone: z.Name, key: key, handshake: handshakeOf(hello.Context()),
			ctx: hello.Context(), sni: sni, visitor: addrOf(hello.Conn.RemoteAddr()), local: addrOf(hello.Conn.LocalAddr())}
		if _, ok := m.bound(m.ctx).(crypto.Decrypter); ok {
			return measuredDecrypter{m}
		}
		return m
	}
}

// measured is the certificate's key bound to one handshake. Its calls are timed, its failures counted.
type measured struct {
	s         *Server
	transport string
	zone      string
	key       *certificateKey
	handshake *handshake

	ctx            context.Context // of the handshake
	sni            string          // canonical
	visitor, local netip.Addr
}

// bound returns the key for a call below ctx.
func (m measured) bound(ctx context.Context) crypto.Signer {
	return m.key.key.For(ctx, m.sni, m.visitor, m.local)
}

// Public implements [crypto.Signer].
func (m measured) Public() crypto.PublicKey { return m.key.key.Public() }

// Sign implements [crypto.Signer].
func (m measured) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return m.call("sign", func(k crypto.Signer) ([]byte, error) { return k.Sign(rand, digest, opts) })
}

// SignMessage implements [crypto.MessageSigner], which crypto/tls prefers: the key server sees the whole message.
func (m measured) SignMessage(rand io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return m.call("sign", func(k crypto.Signer) ([]byte, error) { return crypto.SignMessage(k, rand, msg, opts) })
}

// call has the key server do something, within a span of its own if there are spans.
func (m measured) call(what string, do func(crypto.Signer) ([]byte, error)) ([]byte, error) {
	began, ctx := time.Now(), m.ctx
	var span trace.Span
	if m.s.deps.Tracer != nil {
		ctx, span = m.s.deps.Tracer.Start(ctx, "keyless "+what, trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(
			attribute.String("keyhaven.zone", m.zone), attribute.String("keyhaven.sni", m.sni), attribute.String("network.transport", m.transport)))
	}
	out, err := do(m.bound(ctx))
	if span != nil {
		if err != nil {
			span.SetStatus(codes.Error, err.Error())
		}
		span.End()
	}
	m.done(began, err)
	return out, err
}

func (m measured) done(began time.Time, err error) {
	m.s.metrics.signature(m.zone, began, err)
	if err == nil {
		return
	}
	if !errors.Is(err, context.Canceled) { // which is the visitor's doing
		m.key.ill.Store(time.Now().Add(illTime).UnixNano())
	}
	m.handshake.count()
	m.s.metrics.handshake(m.zone, m.transport, resultSigner, false)
	if m.s.signerFaults.allow(time.Now()) {
		m.s.log.Warn("no signature for a visitor", "zone", m.zone, "dur", time.Since(began), "err", err)
	}
}

// measuredDecrypter is measured for a zone that allows RSA key exchange.
type measuredDecrypter struct{ measured }

// Decrypt implements [crypto.Decrypter].
func (m measuredDecrypter) Decrypt(rand io.Reader, msg []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	return m.call("decrypt", func(k crypto.Signer) ([]byte, error) { return k.(crypto.Decrypter).Decrypt(rand, msg, opts) })
}

// addrOf returns the IP address of a TCP or UDP address, and the zero Addr of any other.
func addrOf(a net.Addr) netip.Addr {
	var ap netip.AddrPort
	switch a := a.(type) {
	case *net.TCPAddr:
		ap = a.AddrPort()
	case *net.UDPAddr:
		ap = a.AddrPort()
	}
	return ap.Addr().Unmap().WithZone("")
}
