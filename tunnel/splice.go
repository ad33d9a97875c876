package tunnel

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

const (
	spliceBufferSize = 64 << 10
	// spliceLinger is how long one direction may go on after nobody wants the other's bytes any more.
	spliceLinger = 10 * time.Second
)

var spliceBuffers = sync.Pool{New: func() any { return new([spliceBufferSize]byte) }}

// Splice copies between a and b in both directions until both have ended, passing on each direction's clean end with
// CloseWrite, and closes both. If a direction fails, or ctx ends, both are cut: reset where they can be (flows of this
// package, TCP), so that nobody takes a part for the whole. A peer that closed its flow without reading to the end
// is no failure of the other direction, which may still finish.
//
// ab and ba are the bytes written to b and to a. err is the first failure, nil if both directions ended cleanly; it is
// ErrClosed if a side closed its flow before the other had ended.
func Splice(ctx context.Context, a, b Conn) (ab, ba int64, err error) {
	s := &splice{a: a, b: b}
	stopCtx := context.AfterFunc(ctx, func() { s.fail(context.Cause(ctx)) })
	stopA := s.watchReader(a)
	stopB := s.watchReader(b)
	var wg sync.WaitGroup
	wg.Go(func() { ab = s.pipe(b, a) })
	ba = s.pipe(a, b)
	wg.Wait()
	stopCtx()
	stopA()
	stopB()
	return ab, ba, s.finish()
}

type splice struct {
	a, b Conn

	mu     sync.Mutex // guards the fields below
	ended  int        // directions that ended
	lonely bool       // a side reads no more
	err    error
	linger *time.Timer
	over   bool
}

// pipe copies one direction until it ends.
func (s *splice) pipe(dst, src Conn) int64 {
	n, readErr, writeErr := transfer(dst, src)
	switch {
	case readErr != nil:
		s.fail(readErr)
	case writeErr != nil && errors.Is(writeErr, ErrClosed):
		s.noReader()
	case writeErr != nil:
		s.fail(writeErr)
	default:
		if err := dst.CloseWrite(); err != nil && !errors.Is(err, net.ErrClosed) {
			// The peer has gone already; if it mattered, the other direction says so.
			s.noReader()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended++
	if s.lonely {
		s.endLocked(ErrClosed, closeBoth)
	}
	return n
}

// noReader is called when a side reads no more: once the other direction has ended, or after a while, all is over.
func (s *splice) noReader() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over || s.lonely || s.ended == 2 {
		return
	}
	s.lonely = true
	if s.ended > 0 {
		s.endLocked(ErrClosed, closeBoth)
		return
	}
	s.linger = time.AfterFunc(spliceLinger, func() { s.fail(ErrClosed) })
}

func (s *splice) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endLocked(err, cutBoth)
}

// endLocked ends both sides with end, which makes the directions that go on fail. Only the first call counts.
func (s *splice) endLocked(err error, end func(a, b Conn)) {
	if s.over || s.ended == 2 && !s.lonely {
		return
	}
	s.over = true
	s.err = err
	end(s.a, s.b)
}

// closeBoth leaves alone what was written already.
func closeBoth(a, b Conn) {
	a.Close() //nolint:errcheck // nothing to save
	b.Close() //nolint:errcheck // nothing to save
}

func cutBoth(a, b Conn) {
	cut(a)
	cut(b)
}

func (s *splice) finish() error {
	s.mu.Lock()
	s.over = true
	if s.linger != nil {
		s.linger.Stop()
	}
	err := s.err
	s.mu.Unlock()
	closeBoth(s.a, s.b)
	return err
}

// cut closes c so that its peer sees a failure.
func cut(c Conn) {
	switch c := c.(type) {
	case Resetter:
		c.Reset(ResultReset)
		return
	case interface{ SetLinger(int) error }:
		c.SetLinger(0) //nolint:errcheck // then it is a clean close, the best that is left
	}
	c.Close() //nolint:errcheck // nothing to save
}

// watchReader sees a flow's peer stop reading or cut the flow even if nobody reads or writes it now, as when the other
// side takes no more bytes. It returns how to stop that.
func (s *splice) watchReader(c Conn) (stop func() bool) {
	if w, ok := c.(interface{ Unwrap() Conn }); ok { // one that counts bytes, say
		c = w.Unwrap()
	}
	f, ok := c.(*flowConn)
	if !ok {
		return func() bool { return true }
	}
	over := f.writeOver()
	return context.AfterFunc(over, func() {
		switch e, ok := errors.AsType[*FlowError](streamErrorOf(context.Cause(over))); {
		case !ok || !e.Remote: // this side's wish, or the session's end
		case e.Result == ResultClosed:
			s.noReader()
		default:
			s.fail(e)
		}
	})
}

// transfer copies from src to dst until src's clean end or a failure of either.
func transfer(dst, src Conn) (n int64, readErr, writeErr error) {
	if d, ok := dst.(*net.TCPConn); ok {
		if s, ok := src.(*net.TCPConn); ok { // the kernel does it
			n, err := d.ReadFrom(s)
			return n, err, nil
		}
	}
	buf := spliceBuffers.Get().(*[spliceBufferSize]byte)
	defer spliceBuffers.Put(buf)
	for {
		r, err := src.Read(buf[:])
		if r > 0 {
			w, werr := dst.Write(buf[:r])
			n += int64(w)
			if werr != nil {
				return n, nil, werr
			}
		}
		if err == io.EOF {
			return n, nil, nil
		}
		if err != nil {
			return n, err, nil
		}
	}
}
