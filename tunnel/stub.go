package tunnel

import (
	"context"
	"crypto/x509"
	"errors"
	"net"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// The bodies follow; signatures stand.

var errNotBuilt = errors.New("tunnel: not built yet")

type Listener struct{}

func Listen(cfg ListenConfig) (*Listener, error)    { return nil, errNotBuilt }
func (l *Listener) Addr() net.Addr                  { return nil }
func (l *Listener) Serve(ctx context.Context) error { return errNotBuilt }

type Session struct{}

func (s *Session) Peer() mtls.Identity                            { return mtls.Identity{} }
func (s *Session) Registration() Registration                     { return Registration{} }
func (s *Session) Cert() *x509.Certificate                        { return nil }
func (s *Session) LocalAddr() net.Addr                            { return nil }
func (s *Session) RemoteAddr() net.Addr                           { return nil }
func (s *Session) RTT() time.Duration                             { return 0 }
func (s *Session) Open(ctx context.Context, f Flow) (Conn, error) { return nil, errNotBuilt }
func (s *Session) Draining() bool                                 { return false }
func (s *Session) Drain(ctx context.Context) error                { return errNotBuilt }
func (s *Session) Flows() int                                     { return 0 }
func (s *Session) Done() <-chan struct{}                          { return nil }
func (s *Session) Err() error                                     { return nil }
func (s *Session) Close(reason CloseReason)                       {}

type ClientSession struct{}

func Dial(ctx context.Context, cfg DialConfig) (*ClientSession, error) { return nil, errNotBuilt }

// Run blocks until the session has ended, however, and its handlers with it. nil after a drain of either side.
func (c *ClientSession) Run(ctx context.Context) error { return errNotBuilt }

// Drain takes no new flows, waits for the open ones, and ends the session; when ctx ends first, it cuts them.
func (c *ClientSession) Drain(ctx context.Context) error { return errNotBuilt }

// Renew asks the edge to sign a certificate request.
func (c *ClientSession) Renew(ctx context.Context, csrDER []byte) ([][]byte, error) {
	return nil, errNotBuilt
}
func (c *ClientSession) Peer() mtls.Identity       { return mtls.Identity{} }
func (c *ClientSession) LocalAddr() net.Addr       { return nil }
func (c *ClientSession) RemoteAddr() net.Addr      { return nil }
func (c *ClientSession) RTT() time.Duration        { return 0 }
func (c *ClientSession) Flows() int                { return 0 }
func (c *ClientSession) Draining() <-chan struct{} { return nil } // closed when either side drains: dial a replacement
func (c *ClientSession) Done() <-chan struct{}     { return nil }
func (c *ClientSession) Err() error                { return nil }
func (c *ClientSession) Close(reason CloseReason)  {}

type Incoming struct{}

func (in *Incoming) Flow() Flow            { return Flow{} }
func (in *Incoming) Accept() (Conn, error) { return nil, errNotBuilt }
func (in *Incoming) Reject(r Result) error { return errNotBuilt }

func Join(ctx context.Context, addr string, tok mtls.JoinToken, csrDER []byte, name string) (JoinReply, error) {
	return JoinReply{}, errNotBuilt
}

func Splice(ctx context.Context, a, b Conn) (ab, ba int64, err error) { return 0, 0, errNotBuilt }
