package proxy

import (
	"context"
	"errors"
	"io"
	"math"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxTries is how often a request is sent at most: once again after a failure, or twice where sessions die under it.
	maxTries = 3
	// headerPatience is how long a request waits for the response's header before its session is looked at; the look is
	// repeated at the interval.
	headerPatience = time.Second
	suspectLook    = 200 * time.Millisecond
	// dialPatience is how long a request waits for a connection to the first endpoint of a pool before another is tried.
	dialPatience = 2 * time.Second

	// bulkBody is from which size a request's body is bulk, and bulkResponse from which mean size an origin's responses are.
	bulkBody     = 1 << 20
	bulkResponse = 512 << 10
	// sizeSmoothing is the weight of the newest response in the mean.
	sizeSmoothing = 0.2
)

// errSuspect ends an attempt whose session may be dead.
var errSuspect = errors.New("proxy: nothing was heard of the session that carries the request")

// RoundTrip implements [http.RoundTripper]: it sends a request to a place of the origin, and to another where that is safe.
func (o *origin) RoundTrip(req *http.Request) (*http.Response, error) {
	v := visitOf(req.Context())
	req, body := hold(req)
	res, err := o.send(v, req, body)
	body.release()
	return res, err
}

func (o *origin) send(v *visit, req *http.Request, body *heldBody) (*http.Response, error) {
	var tried []*balance.Lease
	var failed error
	for try := 1; ; try++ {
		p, lease, err := o.next(req.Context(), v, tried)
		if err != nil && errors.Is(failed, errSuspect) && len(tried) > 0 { // there is no other endpoint, but there may be another session
			tried = nil
			p, lease, err = o.next(req.Context(), v, nil)
		}
		if err != nil {
			if failed == nil {
				failed = err
			}
			return nil, failed
		}
		a := attempt{o: o, v: v, p: p, lane: o.lane(req), lease: lease, began: time.Now(), impatient: o.pooled() && try == 1}
		res, err := a.send(req, repeatable(req))
		if err == nil {
			return a.answer(req, res), nil
		}
		failed = err
		if lease != nil {
			lease.Done(resultOf(req.Context(), err))
		}
		if try == maxTries || req.Context().Err() != nil || !again(req, body, err, try, o.pooled()) {
			return nil, failed
		}
		if lease != nil {
			tried = append(tried, lease)
		}
	}
}

// again decides whether a request may be sent once more: if nothing of it has left, or if doing it twice does no harm. A
// place without an alternative gets no second chance, but for a session that died on the way to it.
func again(req *http.Request, body *heldBody, err error, try int, alternatives bool) bool {
	if errors.Is(err, errSuspect) {
		return true // such an attempt was repeatable
	}
	if try > 1 || !alternatives && !errors.Is(err, tunnel.ErrSessionLost) {
		return false
	}
	if _, ok := errors.AsType[*dialError](err); ok {
		return body == nil || !body.touched.Load()
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return false // it has cost all the time there is
	}
	return repeatable(req)
}

// repeatable reports whether a request can be sent twice without harm: its method is idempotent (RFC 9110, section 9.2.2), and
// it has no body.
func repeatable(req *http.Request) bool {
	switch req.Method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodDelete, http.MethodPut:
		return req.Body == nil || req.Body == http.NoBody
	}
	return false
}

// resultOf blames the endpoint, unless the visitor has left.
func resultOf(ctx context.Context, err error) balance.Result {
	return balance.Result(ctx.Err() != nil || errors.Is(err, errBody))
}

// lane decides which class of sessions carries a request.
func (o *origin) lane(req *http.Request) int {
	switch {
	case o.up.Carrier == "tcp":
		return laneBulk
	case o.up.Carrier == "" && (req.ContentLength >= bulkBody || o.meanSize() >= bulkResponse):
		return laneBulk
	}
	return laneInteractive
}

func (o *origin) meanSize() float64 { return math.Float64frombits(o.size.Load()) }

// measure takes in the size of a response's body.
func (o *origin) measure(n int64) {
	for {
		old := o.size.Load()
		mean := math.Float64frombits(old)
		if old == 0 {
			mean = float64(n)
		}
		next := math.Float64bits(max(1, sizeSmoothing*float64(n)+(1-sizeSmoothing)*mean))
		if o.size.CompareAndSwap(old, next) {
			return
		}
	}
}

// An attempt is one sending of a request to one place.
type attempt struct {
	o     *origin
	v     *visit
	p     *place
	lane  int
	lease *balance.Lease // nil without a pool
	began time.Time
	// impatient attempts are given up too if there is no connection in time.
	impatient bool

	conn   atomic.Pointer[net.Conn]
	state  atomic.Int32 // attemptWaiting and so on
	cancel context.CancelFunc
	timer  *time.Timer
}

// States of an attempt.
const (
	attemptWaiting  = iota
	attemptGivenUp  // its session may be dead, or the endpoint's site away
	attemptAnswered // it has a response, or an error of its own
)

// send sends the request. One that is watched is given up when its session seems dead.
func (a *attempt) send(req *http.Request, watched bool) (*http.Response, error) {
	t := a.p.transportFor(a.v, a.lane)
	out := a.request(req)
	if watched {
		out = out.WithContext(a.watch(req.Context()))
		a.timer = time.AfterFunc(math.MaxInt64, a.look)
		a.timer.Reset(headerPatience) // not before a.timer is there
	}
	res, err := t.RoundTrip(out)
	if !watched {
		return res, err
	}
	answered := a.state.CompareAndSwap(attemptWaiting, attemptAnswered)
	a.timer.Stop()
	if answered {
		if err != nil {
			a.cancel()
		}
		return res, err
	}
	if err == nil { // it came at the very last moment
		_ = res.Body.Close()
	}
	a.p.renew(a.v.conn, a.lane, t)
	return nil, errSuspect
}

// watch returns a context in which the attempt learns of its connection, and can be given up.
func (a *attempt) watch(ctx context.Context) context.Context {
	trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) { a.conn.Store(&info.Conn) }}
	if old := httptrace.ContextClientTrace(ctx); old != nil { // httputil's, for informational responses
		// The net library would join the two by reflection, which costs more than the rest of an attempt.
		trace.Got1xxResponse = old.Got1xxResponse
		ctx = a.v.ctx
	}
	ctx, a.cancel = context.WithCancel(ctx)
	return httptrace.WithClientTrace(ctx, trace)
}

// look gives the attempt up if its session seems dead, or does not come up. It runs in a goroutine of its own.
func (a *attempt) look() {
	if a.state.Load() != attemptWaiting {
		return
	}
	conn := a.conn.Load()
	if conn != nil && suspect(*conn) || conn == nil && a.impatient && time.Since(a.began) >= dialPatience {
		if a.state.CompareAndSwap(attemptWaiting, attemptGivenUp) {
			a.cancel()
		}
		return
	}
	a.timer.Reset(suspectLook)
}

// request returns the request for the place.
func (a *attempt) request(req *http.Request) *http.Request {
	addr, host := a.p.addr, ""
	if a.lease != nil {
		host = a.lease.Endpoint().HostHeader
	}
	if a.p.addr == "" {
		addr = a.v.ingressAddr()
	}
	if host == "" && addr == req.URL.Host {
		return req
	}
	out := *req
	u := *req.URL
	u.Host = addr
	out.URL = &u
	if host != "" {
		out.Host = host
	}
	return &out
}

// answer returns the response such that its end is noticed.
func (a *attempt) answer(req *http.Request, res *http.Response) *http.Response {
	if a.lease != nil && a.lease.Cookie != nil {
		res.Header.Add("Set-Cookie", a.lease.Cookie.String())
	}
	b := &answerBody{ReadCloser: res.Body, a: a, ctx: req.Context()}
	if rw, ok := res.Body.(io.ReadWriteCloser); ok && res.StatusCode == http.StatusSwitchingProtocols {
		res.Body = &upgradedBody{answerBody: b, rw: rw}
		return res
	}
	if res.Body == http.NoBody {
		b.end(nil)
		return res
	}
	res.Body = b
	return res
}

// An answerBody is a response's body whose end ends the attempt.
type answerBody struct {
	io.ReadCloser
	a     *attempt
	ctx   context.Context
	n     int64
	err   error
	ended atomic.Bool
}

func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.n += int64(n); err != nil && err != io.EOF {
		b.err = err
	}
	return n, err
}

// Close implements [io.Closer].
func (b *answerBody) Close() error {
	err := b.ReadCloser.Close()
	if b.n > 0 {
		b.a.o.measure(b.n)
	}
	b.end(b.err)
	return err
}

func (b *answerBody) end(err error) {
	if b.ended.Swap(true) {
		return
	}
	if l := b.a.lease; l != nil {
		l.Done(balance.Result(err == nil || b.ctx.Err() != nil))
	}
	if b.a.cancel != nil {
		b.a.cancel()
	}
}

// An upgradedBody is the connection of a WebSocket.
type upgradedBody struct {
	*answerBody
	rw io.ReadWriteCloser
}

func (b *upgradedBody) Read(p []byte) (int, error)  { return b.rw.Read(p) }
func (b *upgradedBody) Write(p []byte) (int, error) { return b.rw.Write(p) }

// CloseWrite ends the direction to the origin.
func (b *upgradedBody) CloseWrite() error {
	if w, ok := b.rw.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close implements [io.Closer].
func (b *upgradedBody) Close() error {
	err := b.rw.Close()
	b.end(nil)
	return err
}

// A heldBody is a request's body that stays open over several attempts, as long as nothing of it was read.
type heldBody struct {
	io.ReadCloser
	touched atomic.Bool
	state   atomic.Int32 // heldOpen and so on
}

const (
	heldOpen = iota
	heldClosed
	heldReleased
)

// hold returns the request with a held body, which is nil if it has none.
func hold(req *http.Request) (*http.Request, *heldBody) {
	if req.Body == nil || req.Body == http.NoBody {
		return req, nil
	}
	b := &heldBody{ReadCloser: req.Body}
	out := *req
	out.Body = b
	return &out, b
}

func (b *heldBody) Read(p []byte) (int, error) {
	b.touched.Store(true)
	return b.ReadCloser.Read(p)
}

// Close closes the body, or notes that it is to be closed.
func (b *heldBody) Close() error {
	if b.state.CompareAndSwap(heldOpen, heldClosed) || b.state.Load() == heldClosed {
		return nil
	}
	return b.ReadCloser.Close()
}

// release lets Close take effect: there will be no other attempt.
func (b *heldBody) release() {
	if b != nil && b.state.Swap(heldReleased) == heldClosed {
		_ = b.ReadCloser.Close() // its error is nobody's
	}
}
