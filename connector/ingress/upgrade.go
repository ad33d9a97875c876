package ingress

import (
	"errors"
	"io"
	"net"

	"github.com/keyhaven/keyhaven/internal/httprelay"
	"github.com/keyhaven/keyhaven/tunnel"
)

// switched is the origin's side after an upgrade. If it breaks, so does the flow. httputil copies by its ReadFrom and
// WriteTo, which hold little memory while nothing comes: most WebSockets are idle.
type switched struct {
	io.ReadWriteCloser
	conn *flowConn
}

// Read implements io.Reader.
func (s *switched) Read(p []byte) (int, error) {
	n, err := s.ReadWriteCloser.Read(p)
	if err != nil && err != io.EOF && !errors.Is(err, net.ErrClosed) {
		s.conn.reset(tunnel.ResultReset)
	}
	return n, err
}

// WriteTo implements io.WriterTo.
func (s *switched) WriteTo(w io.Writer) (int64, error) { return lightCopy(w, s.Read) }

// ReadFrom implements io.ReaderFrom.
func (s *switched) ReadFrom(r io.Reader) (int64, error) { return lightCopy(s.ReadWriteCloser, r.Read) }

// CloseWrite passes on the visitor's half-close where the origin's connection has one.
func (s *switched) CloseWrite() error {
	if c, ok := s.ReadWriteCloser.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return s.Close()
}

// lightBuffer is what one direction of an idle connection holds.
const lightBuffer = 2 << 10

// lightCopy copies until the end. It waits with a small buffer, and takes a large one while reads fill what they are given.
func lightCopy(w io.Writer, read func([]byte) (int, error)) (total int64, err error) {
	small := make([]byte, lightBuffer)
	buf := small
	defer func() {
		if len(buf) > lightBuffer {
			httprelay.Buffers.Put(buf)
		}
	}()
	for {
		n, err := read(buf)
		if n > 0 {
			m, werr := w.Write(buf[:n])
			total += int64(m)
			if werr != nil {
				return total, werr
			}
		}
		switch {
		case err == io.EOF:
			return total, nil
		case err != nil:
			return total, err
		case n == lightBuffer && len(buf) == lightBuffer:
			buf = httprelay.Buffers.Get()
		case n < lightBuffer && len(buf) > lightBuffer:
			httprelay.Buffers.Put(buf)
			buf = small
		}
	}
}
