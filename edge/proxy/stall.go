package proxy

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// errBody ends a request whose body breaks off or is malformed.
var errBody = errors.New("proxy: the visitor's body")

// drainWait is how long a visitor over HTTP/1.1 has for the rest of a body that nobody wants any more, so that its
// connection can be used again.
const drainWait = 2 * time.Second

// aMomentAgo is a deadline that has passed.
var aMomentAgo = time.Unix(1, 0)

// A guard cuts what takes longer than limit between begin and done. The zero limit cuts nothing.
type guard struct {
	limit time.Duration
	cut   func() // called at most once for each begin, and never after done

	mu    sync.Mutex
	timer *time.Timer
	due   time.Time // zero unless between begin and done
}

func (g *guard) begin() {
	if g.limit <= 0 {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.due = time.Now().Add(g.limit)
	if g.timer == nil {
		g.timer = time.AfterFunc(g.limit, g.expire)
	} else {
		g.timer.Reset(g.limit)
	}
}

// done ends what began. After it nothing is cut before the next begin.
func (g *guard) done() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.due = time.Time{}
	if g.timer != nil {
		g.timer.Stop()
	}
}

func (g *guard) expire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.due.IsZero() || time.Now().Before(g.due) { // it fired while done or begin held the lock
		return
	}
	g.due = time.Time{}
	g.cut()
}

// A visitorBody is the body of a visitor's request. A Read that waits for too long ends the request, unless the body may
// stay open: see [visitorBody.relax].
type visitorBody struct {
	io.ReadCloser
	guard   guard
	control *http.ResponseController
	http1   bool
	stream  bool // its length is not known
	relaxed atomic.Bool
	stalled atomic.Bool // it was cut
	ended   atomic.Bool // its last byte was read
}

func newVisitorBody(w http.ResponseWriter, r *http.Request, limit time.Duration) *visitorBody {
	b := &visitorBody{ReadCloser: r.Body, control: http.NewResponseController(w), http1: r.ProtoMajor == 1, stream: r.ContentLength < 0}
	b.guard.limit = limit
	b.guard.cut = func() {
		if !b.relaxed.Load() {
			b.stalled.Store(true)
			_ = b.control.SetReadDeadline(aMomentAgo)
		}
	}
	if strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
		b.relax() // a call may begin with silence on both sides
	}
	return b
}

// relax lets a body of unknown length wait as long as it likes. It is called when the response begins: from then on the
// two sides talk, and either may be silent.
func (b *visitorBody) relax() {
	if b.stream {
		b.relaxed.Store(true)
	}
}

func (b *visitorBody) Read(p []byte) (int, error) {
	if b.relaxed.Load() {
		n, err := b.ReadCloser.Read(p)
		return n, b.note(err)
	}
	b.guard.begin()
	n, err := b.ReadCloser.Read(p)
	b.guard.done()
	return n, b.note(err)
}

// note remembers the end, and marks an error as the visitor's.
func (b *visitorBody) note(err error) error {
	switch {
	case err == io.EOF:
		b.ended.Store(true)
	case err != nil:
		err = fmt.Errorf("%w: %w", errBody, err)
	}
	return err
}

// Close gives the body up. Over HTTP/1.1 net/http reads the rest, if it is short, and waits for a Read under way.
func (b *visitorBody) Close() error {
	b.guard.done()
	if !b.http1 || b.ended.Load() {
		return b.ReadCloser.Close()
	}
	_ = b.control.SetReadDeadline(time.Now().Add(drainWait))
	err := b.ReadCloser.Close()
	_ = b.control.SetReadDeadline(time.Time{})
	return err
}

// settleEmpty finds out whether a request has a body at all where HTTP/3 does not say: one without a body may be repeated
// on another connection to the origin. It reads until the first byte or the end.
func (b *visitorBody) settleEmpty(r *http.Request) error {
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace:
	default:
		return nil
	}
	var first [1]byte
	n, err := io.ReadFull(b, first[:])
	switch {
	case n == 1:
		r.Body = struct {
			io.Reader
			io.Closer
		}{io.MultiReader(strings.NewReader(string(first[:])), b), b}
		return nil
	case err == io.EOF:
		r.Body, r.ContentLength = http.NoBody, 0
		return nil
	}
	return err
}
