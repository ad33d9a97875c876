package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"time"
)

// A carrier is one connection between a connector and an edge that gives sessions what SPEC.md, "Carrier", asks for.
// Its methods may be called concurrently.
type carrier interface {
	// openStream opens a stream without waiting. It returns errStreamLimit if the peer allows no more.
	openStream() (stream, error)
	// acceptStream waits for the peer's next stream.
	acceptStream(ctx context.Context) (stream, error)
	// close ends the carrier and every stream of it, and waits until that is done. Only the first call counts.
	close(reason CloseReason)
	// done is closed when the carrier has ended; err then says how: a *SessionError or a *RefusedError.
	done() <-chan struct{}
	err() error
	tlsState() tls.ConnectionState
	rtt() time.Duration
	localAddr() net.Addr
	remoteAddr() net.Addr
}

// A stream is one byte stream of a carrier. Read returns io.EOF only if the peer ended it cleanly. Errors are
// *FlowError, net.ErrClosed after a local close or abort, and os.ErrDeadlineExceeded.
type stream interface {
	io.Reader
	io.Writer
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
	// closeWrite ends the sending direction cleanly. It must not run beside a Write that goes on.
	closeWrite()
	// abortRead and abortWrite end one direction with a code that the peer sees. After its end they do nothing.
	abortRead(code Result)
	abortWrite(code Result)
	// writeOver is done when the sending direction has ended, on either side's wish.
	writeOver() context.Context
}

var errStreamLimit = errors.New("the peer allows no more streams")
