package keyless

import (
	"context"
	"crypto"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"time"
)

// ErrUnavailable says that no server can be reached. While all are known to be down it comes at once.
var ErrUnavailable = errors.New("keyless: no key server can be reached")

// ErrOverloaded says that every connection has as many requests in flight as it may have.
var ErrOverloaded = errors.New("keyless: too many requests in flight")

// ErrClosed says that the client was closed.
var ErrClosed = errors.New("keyless: client is closed")

// A ClientConfig says where the servers are and how to reach them. Servers, and TLS, must be set; each other zero value
// stands for the default named beside it.
type ClientConfig struct {
	// Servers are the addresses (host:port) of servers that hold the same keys. All are equal: a request goes to the
	// least loaded connection.
	Servers []string
	// Dial opens a byte stream to one address. If nil, TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// TLS returns the configuration for one address; it must authenticate the server and present a certificate.
	TLS func(addr string) *tls.Config

	ConnsPerServer int           // 2
	MaxInFlight    int           // 512 requests of one connection; beyond it requests fail with ErrOverloaded
	Heartbeat      time.Duration // 15s between pings; must be below 30s, after which servers close
	DialTimeout    time.Duration // 3s for dialling, handshake and the first ping; also for each later ping
	Timeout        time.Duration // 2s for one request with all its attempts; a caller's earlier deadline wins

	Logger   *slog.Logger       // nil discards
	OnResult func(ClientResult) // may be nil; called from many goroutines, must not block
}

// A ClientResult is one finished Do, for metrics.
type ClientResult struct {
	Server   string // the last server tried; "" if none could be
	Opcode   Opcode
	Func     string
	Attempts int
	Duration time.Duration
	Err      error
}

// Stats is a snapshot of a client.
type Stats struct {
	Servers []ServerStats
}

// ServerStats is a snapshot of one server of a client.
type ServerStats struct {
	Addr     string
	Conns    int // usable connections
	InFlight int
	Dials    uint64 // connection attempts
	Failures uint64 // connection attempts that failed, and connections that broke
	LastErr  error  // of the latest failure
}

// A Client sends operations to a group of servers over pipelined connections that it keeps open. It is safe for
// concurrent use. Close it.
type Client struct{ cfg ClientConfig }

// NewClient checks cfg and starts connecting in the background; it does not wait for a connection.
func NewClient(cfg ClientConfig) (*Client, error) { return &Client{cfg: cfg}, nil }

// Close ends all connections; requests in flight fail with ErrClosed. It waits until nothing is left running, and may
// be called more than once.
func (c *Client) Close() error { return nil }

// Do sends op and returns the payload of the reply, which is the caller's. A refusal by the server is an *Error.
func (c *Client) Do(ctx context.Context, op *Operation) ([]byte, error) { return nil, ErrUnavailable }

// Healthy reports whether at least one server has a usable connection.
func (c *Client) Healthy() bool { return false }

// Stats returns a snapshot, servers in the order of the configuration.
func (c *Client) Stats() Stats { return Stats{} }

// KeyOptions say how a Key uses the servers. The zero value is the strict one.
type KeyOptions struct {
	// Plain uses the digest operations of the protocol instead of keyhaven/tls-sign, for servers of other makes. Such a
	// key signs anything.
	Plain bool
	// AllowDecrypt enables Decrypt, for TLS 1.2 clients without ECDHE.
	AllowDecrypt bool
	// Timeout bounds one operation; 0 leaves it to the client's Timeout.
	Timeout time.Duration
	// NoVerify returns signatures unchecked.
	NoVerify bool
}

// A Key is a private key that lives behind a Client. It implements crypto.Signer, crypto.MessageSigner and
// crypto.Decrypter, and is safe for concurrent use.
type Key struct {
	client *Client
	pub    crypto.PublicKey
	ski    SKI
	opts   KeyOptions
}

// Key returns the key with this public half: RSA, ECDSA or Ed25519. No server is asked.
func (c *Client) Key(pub crypto.PublicKey, o KeyOptions) (*Key, error) {
	ski, err := SKIOf(pub)
	return &Key{client: c, pub: pub, ski: ski, opts: o}, err
}

// Public returns the public half.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// SKI returns the name that requests carry.
func (k *Key) SKI() SKI { return k.ski }

// Sign signs a digest.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return nil, ErrUnavailable
}

// SignMessage signs a message.
func (k *Key) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return nil, ErrUnavailable
}

// Decrypt decrypts a session key.
func (k *Key) Decrypt(_ io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	return nil, ErrUnavailable
}

// For binds the key to one handshake.
func (k *Key) For(ctx context.Context, sni string, client, server netip.Addr) crypto.Signer { return k }
