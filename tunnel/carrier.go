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
	// close ends the carrier and every stream of it, and waits until that is done and nothing that the carrier started is
	// running. Only the first call's reason counts.
	close(reason CloseReason)
	// abandon ends the carrier because of err, as far as this side can tell: the peer is not reached. It does not wait.
	abandon(err error)
	// done is closed when the carrier has ended; err then says how: a *SessionError or a *RefusedError.
	done() <-chan struct{}
	err() error
	tlsState() tls.ConnectionState
	rtt() time.Duration
	localAddr() net.Addr
	remoteAddr() net.Addr
	kind() Carrier

	// sendDatagram queues a datagram, which may be lost. It never waits and keeps no part of b. It returns
	// errDatagramTooLarge if b is larger than maxDatagram, and errDatagramDropped if the queue is full.
	sendDatagram(b []byte) error
	// receiveDatagram waits for the peer's next datagram. The caller may keep it.
	receiveDatagram(ctx context.Context) ([]byte, error)
	// maxDatagram is the size of the largest datagram that can be sent now, 0 if the peer takes none. It may change.
	maxDatagram() int
	// dropped counts the datagrams that queues of this side had no room for.
	dropped() uint64

	// heard returns a number that changes whenever something comes from the peer; what is written is acknowledged by
	// something.
	heard() uint64
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

var (
	errStreamLimit      = errors.New("the peer allows no more streams")
	errDatagramTooLarge = errors.New("the datagram is too large for the path")
	errDatagramDropped  = errors.New("the queue of datagrams is full")
)
