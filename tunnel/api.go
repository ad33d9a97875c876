package tunnel

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/vnet"
)

// A FlowKind says what a flow carries.
type FlowKind byte

// Flow kinds; see SPEC.md.
const (
	// KindTCP is a byte stream in both directions with half-close.
	KindTCP FlowKind = 1
	// KindUDP carries packets of one UDP association.
	KindUDP FlowKind = 2
	// KindICMP carries echo requests and their answers.
	KindICMP FlowKind = 3
	// KindIP is reserved.
	KindIP FlowKind = 4
	// KindIngress is a byte stream to a service that the connector's own rules choose. Host is the name that the visitor
	// asked for, Port the one that he came to, and VNet has no meaning.
	KindIngress FlowKind = 5

	kindConfig FlowKind = 6 // see Session.Configure
	kindDevice FlowKind = 7 // see Session.Device

	// KindIngressUDP is KindIngress for packets instead of bytes.
	KindIngressUDP FlowKind = 8
)

// A FlowClass says what a flow is like, for the choice of the session that carries it.
type FlowClass byte

// Flow classes.
const (
	// ClassAuto leaves the choice to whoever chooses.
	ClassAuto FlowClass = iota
	// ClassInteractive is for small requests and their answers.
	ClassInteractive
	// ClassBulk is for many bytes.
	ClassBulk
)

// A Carrier is what a session runs over.
type Carrier string

// Carriers.
const (
	CarrierQUIC Carrier = "quic"
	CarrierTCP  Carrier = "tcp"
)

// A Role says what a session is for.
type Role byte

// Roles.
const (
	// RoleMain sessions carry everything, and are what a connector's presence is judged by.
	RoleMain Role = 0
	// RoleBulk sessions carry flows of many bytes, one each as far as they last, so that it has a TCP connection of its own.
	RoleBulk Role = 1
)

// String returns the role's name.
func (r Role) String() string {
	if r == RoleBulk {
		return "bulk"
	}
	return "main"
}

// A Flow describes what the edge wants to reach.
type Flow struct {
	// Kind is what the flow carries; zero means KindTCP.
	Kind FlowKind
	// VNet is the virtual network in which Host has its meaning.
	VNet vnet.ID
	// Host is an IP address or a host name.
	Host string
	// Port is the destination's port, not zero.
	Port uint16
	// Visitor is the address on whose behalf the flow is opened. The zero value: none or not told.
	Visitor netip.AddrPort
	// Deadline is how long the connector may take to answer. Zero leaves it to the connector.
	Deadline time.Duration
	// ID names an association of KindUDP or KindIngressUDP, so that it can be moved to another session. Zero: none.
	ID [16]byte
	// Service is what KindIngress wants: "http" or "tcp"; KindIngressUDP wants "udp".
	Service string
	// Class is told to peer edges only.
	Class FlowClass
	// Tunnel and Connector say, to peer edges only, which tunnel's ingress is meant and which connector alone may serve.
	Tunnel, Connector string
	// Forwarded is set by the package for flows that came from a peer edge: they are served here or refused.
	Forwarded bool

	context uint32 // names a flow of packets in its session's datagrams; see SPEC.md, "Packets"
}

// A Conn is an open flow: a net.Conn with half-close. Close gives up both directions: what was written is still
// delivered, as with TCP, what was not read is discarded. The connections of this package are also [Resetter]s.
type Conn interface {
	net.Conn
	// CloseWrite ends the sending direction; the peer reads io.EOF after the last byte.
	CloseWrite() error
}

// A Resetter can be cut so that the peer cannot take the end for a clean one: after an error in the middle of a body, for
// one. The peer's reads and writes fail with a *FlowError; bytes that are on their way may be lost.
type Resetter interface{ Reset(Result) }

// A Drainer is a flow that knows when its session wants to end. Whoever keeps flows open without need, in a pool or for
// requests to come, should move to another session then: a drain waits for them. Every [Conn] of [Session.Open] is one.
type Drainer interface {
	// Draining is closed when the session takes no new flows.
	Draining() <-chan struct{}
}

// A Registration is what a connector tells of itself when it starts a session.
type Registration struct {
	// Instance is random and the same for all sessions of one process.
	Instance string
	// Index numbers the sessions of one process, 0 to 255.
	Index int
	// Version is the connector's program version.
	Version string
	// Hostname and Arch are for people.
	Hostname, Arch string
	// Role is what the session is for.
	Role Role
	// Connections is how many main sessions the process keeps to this edge, at most 255. If zero, 4.
	Connections int
	// Minor is the connector's minor version of the protocol. The package fills it in.
	Minor int
}

// Limits bound a session. The zero value of each field means the default.
type Limits struct {
	// IdleTimeout is how long a silent peer is believed to live. If zero, 12s.
	IdleTimeout time.Duration
	// KeepAlive is how often the connector sends something, so that idle sessions stay and an edge that was killed and is
	// up again is noticed. If zero, 5s. Edges do not send any.
	KeepAlive time.Duration
	// MaxFlows is how many flows a session carries at a time. If zero, 16384.
	MaxFlows int
	// SetupTimeout bounds the registration, the reading of a flow's header, and a join. If zero, 5s.
	SetupTimeout time.Duration
	// SessionWindow is how many received bytes a session holds for all its slow readers together. If zero, 256 MiB at
	// the edge, 64 MiB at the connector.
	SessionWindow int
	// FlowWindow is how many received bytes one flow holds for its reader at most. If zero, 4 MiB.
	FlowWindow int
}

// A ListenConfig is the edge's side.
type ListenConfig struct {
	// Addr is the address to listen on, for QUIC over UDP. If empty, ":7844".
	Addr string
	// TCPAddr is the address to listen on for TLS over TCP. If empty, Addr's host and port; if "-", none.
	TCPAddr string
	// ListenTCP binds that address. If nil, net.Listen does.
	ListenTCP func(network, addr string) (net.Listener, error)
	// Identity is the edge's certificate. Required.
	Identity *mtls.Source
	// Admit decides whether a connector whose certificate is valid gets a session. It must return nil to admit; a
	// *RefusedError chooses the code that the connector gets. If Admit is nil, nobody is admitted.
	Admit func(ctx context.Context, peer mtls.Identity, cert *x509.Certificate, reg Registration) error
	// Handle runs while an admitted session lives; ctx ends with the session. The session is closed when Handle
	// returns. If nil, sessions just live.
	Handle func(ctx context.Context, s *Session)
	// Join redeems a join token. If nil, joining is refused.
	Join func(ctx context.Context, r JoinRequest) (JoinReply, error)
	// Renew answers a session's request for a new certificate, leaf first. If nil, renewals are refused.
	Renew func(ctx context.Context, peer mtls.Identity, csrDER []byte) ([][]byte, error)
	// Peer decides whether a peer edge whose certificate is valid may forward flows; nil admits. If Peer is nil, nobody may.
	Peer func(ctx context.Context, peer mtls.Identity, cert *x509.Certificate) error
	// HandlePeer answers one flow that a peer edge forwarded, as DialConfig.Handle does for connectors. If nil, none is
	// served.
	HandlePeer func(ctx context.Context, in *Incoming)
	// Logger gets what happens to sessions. If nil, nothing is logged.
	Logger *slog.Logger
	// DrainTimeout is how long Serve waits for open flows when its context ends. If zero, 30s.
	DrainTimeout time.Duration
	// MaxPending bounds the connections that are not admitted yet; more are refused. Above a quarter of it, clients
	// have to prove their address first. If zero, 1024.
	MaxPending int
	// JoinRate is how many joins one source (an IPv4 address or an IPv6 /64) may try per minute. If zero, 10.
	JoinRate int
	// Drops counts the packets of flows that were dropped. If nil, nobody does.
	Drops *PacketDrops
	// Limits bound each session.
	Limits Limits

	minor0 bool // for tests: behave as before minor version 1
}

// A JoinRequest is a connector's request to be enrolled. It redacts itself when it is formatted or logged.
type JoinRequest struct {
	// TokenID and Secret are from the join token; see mtls.JoinRecord.
	TokenID string
	Secret  []byte
	// CSR is the certificate request of the connector's own key, in DER.
	CSR []byte
	// Name is the name that the connector proposes. It may be empty.
	Name string
	// Remote is where the request came from.
	Remote netip.AddrPort
}

// Format implements fmt.Formatter for every verb and shows nothing but the token's id.
func (r JoinRequest) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "join request with token %q, secret redacted", r.TokenID)
}

// LogValue implements slog.LogValuer.
func (r JoinRequest) LogValue() slog.Value { return slog.StringValue(fmt.Sprint(r)) }

// MarshalText implements encoding.TextMarshaler.
func (r JoinRequest) MarshalText() ([]byte, error) { return []byte(fmt.Sprint(r)), nil }

// A JoinReply is the answer to a successful join.
type JoinReply struct {
	// Chain is the new certificate and its intermediates in DER, leaf first.
	Chain [][]byte
	// Roots are the edge operator's root certificates in PEM.
	Roots []byte
	// Identity is the name that the connector now has.
	Identity mtls.Identity
	// Tunnel is the tunnel that the connector serves.
	Tunnel string
	// Edges are the addresses to dial.
	Edges []string
}

// A DialConfig is the connector's side.
type DialConfig struct {
	// Addr is the edge's host and port. A name is resolved at each Dial, and its addresses are tried in order.
	Addr string
	// LocalAddr is the address to send from. The zero value: any.
	LocalAddr netip.Addr
	// Identity is the connector's certificate. Required.
	Identity *mtls.Source
	// Registration is what to tell the edge.
	Registration Registration
	// Handle answers one flow with Accept or Reject and serves it; ctx ends with the session. It runs in a goroutine
	// of its own; what is still open of the flow when it returns is cut. Required, but not for DialPeer.
	Handle func(ctx context.Context, in *Incoming)
	// Carrier is what the session shall run over. If empty, QUIC and TCP are raced: TCP starts after RaceDelay, or as soon
	// as QUIC has failed. The first that can register does; the other is given up and never registers.
	Carrier Carrier
	// RaceDelay is QUIC's head start. If zero, 300ms.
	RaceDelay time.Duration
	// Proxy returns the HTTP proxy that TCP goes through, or nil for none. It is called for each attempt. QUIC does not use
	// it. If Proxy is nil, there is none.
	Proxy func() (*ProxyConfig, error)
	// SmallPackets keeps QUIC's packets at 1,200 bytes, for paths that lose larger ones.
	SmallPackets bool
	// SmallSegments keeps TCP's packets at about 1,050 bytes, in both directions, for paths that lose larger ones without
	// a word. Only Linux needs that and does it; other systems find out by themselves.
	SmallSegments bool
	// OnConfig applies a remote configuration that the edge pushed; its error's text goes back to the edge. One runs at a
	// time. If nil, configurations are refused as unsupported.
	OnConfig func(ctx context.Context, version uint64, body []byte) error
	// OnDevice is told what the edge wants of the device that the connector runs on, and returns what is known of that
	// device, at most 4 KiB. It must not block; several may run at a time. If nil, edges are told that there is none.
	OnDevice func(directive []byte) (report []byte)
	// OnEdges is told the addresses of all edges of the installation. It must not block. It may be nil.
	OnEdges func(addrs []string)
	// OnBulk is told how many bulk sessions the edge wants now. It must not block. It may be nil.
	OnBulk func(n int)
	// Logger gets what happens to the session. If nil, nothing is logged.
	Logger *slog.Logger
	// Drops counts the packets of flows that were dropped. If nil, nobody does.
	Drops *PacketDrops
	// Limits bound the session.
	Limits Limits

	minor0 bool // for tests: behave as before minor version 1
}

// A ProxyConfig is an HTTP proxy that opens TCP connections with CONNECT. See RFC 9110, section 9.3.6.
type ProxyConfig struct {
	// URL is http://host:port or https://host:port. It must not hold a password.
	URL string
	// User is the name for Basic authentication. If empty, none is sent.
	User string
	// PasswordFile holds the user's password; one line end after it is ignored. It is read for each connection.
	PasswordFile string
}
