package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// A Peer is the authenticated other end of a connection.
type Peer struct {
	ID   string // what Server.Identify returned, by default the URI SAN of the certificate
	Addr netip.AddrPort
}

// A Request is an operation with who asked for it. The slices of Operation are valid until Handle returns.
type Request struct {
	Operation
	Peer Peer
}

// A Handler answers requests. Handle is called from many goroutines at once. ctx ends with the operation's deadline or
// with the connection. The error decides the reply: an *Error in its chain sends that code, any other error sends
// CodeInternal; detail never crosses the wire and is the handler's to log. The payload is copied before Handle's
// caller goes on, and is at most about 64 KiB.
type Handler interface {
	Handle(ctx context.Context, req *Request) (payload []byte, err error)
}

// ServerMetrics are hooks for measuring. Any may be nil. They are called from many goroutines and must not block.
type ServerMetrics struct {
	Connections func(delta int)     // authenticated connections
	InFlight    func(delta int)     // operations in the handler
	Refused     func(reason string) // connections refused: "handshake", "identity", "limit", "peer-limit"
	Result      func(op Result)     // one operation, also those that the server itself answers
}

// A Result is one finished operation as a server saw it.
type Result struct {
	Opcode   Opcode
	Func     string    // CustomFunc of the request if it is a function of this project, "other" if not, "" without OpCustom
	Code     ErrorCode // 0 for success
	Duration time.Duration
}

// A Server answers keyless requests on TLS connections. The fields are read when Serve starts and not changed by it.
// Handler and TLS must be set; each other zero value stands for the default named beside it.
type Server struct {
	Handler Handler

	// TLS must require and verify client certificates (by ClientAuth, or by VerifyConnection or VerifyPeerCertificate
	// together with RequireAnyClientCert); Serve refuses to start with less.
	TLS *tls.Config
	// Identify names the peer or refuses it. If nil, the name is the only URI SAN of the leaf.
	Identify func(tls.ConnectionState) (string, error)

	HandshakeTimeout time.Duration // 5s
	IdleTimeout      time.Duration // 60s without a request; clients ping more often than each 30s
	HeaderTimeout    time.Duration // 5s from a packet's first byte to the end of its header
	BodyTimeout      time.Duration // 10s from the header to the end of the body
	WriteTimeout     time.Duration // 10s for one batch of replies
	OpTimeout        time.Duration // 10s for one operation
	DrainTimeout     time.Duration // 10s for the operations in flight when Serve's context ends

	MaxInFlight     int // 1024 operations of one connection; beyond it the connection is not read
	MaxConns        int // 1024 connections in all; beyond it new ones are closed
	MaxConnsPerPeer int // 64 connections of one peer; beyond it new ones are closed

	Logger  *slog.Logger // nil discards
	Metrics ServerMetrics
}

// Serve accepts connections from ln until ctx ends, then stops reading requests, finishes those in flight within
// DrainTimeout, closes everything and returns nil. It returns an error at once if the server lacks a part that security
// rests on, and when ln fails for good. ln is closed in every case, and nothing is left running.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	return errors.New("keyless: not yet")
}

// CloseIf closes the connections of the peers for which drop returns true, in the middle of whatever they do: for
// peers that lost their permission.
func (s *Server) CloseIf(drop func(Peer) bool) {}
