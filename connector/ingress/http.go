package ingress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/httprelay"
	"github.com/keyhaven/keyhaven/internal/reqtarget"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	headerTimeout = 30 * time.Second  // for a request's header
	idleTimeout   = 120 * time.Second // of a flow between requests; edges give theirs up earlier
	headerBytes   = 1 << 20           // of a request's header
	streams       = 1000              // requests at a time on one HTTP/2 flow
	maxCollected  = 1 << 20           // bytes of a body that is collected to learn its length
)

func (h *Handler) newServer() *http.Server {
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler: h, Protocols: &p, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: headerBytes,
		HTTP2:    &http.HTTP2Config{MaxConcurrentStreams: streams, SendPingTimeout: originPing, PingTimeout: originPingTimeout},
		ErrorLog: slog.NewLogLogger(h.log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c.(*flowConn))
		},
	}
}

// A visit is one request on its way.
type visit struct {
	in      *http.Request // as it came: its trailers are filled in while its body is read
	origin  *origin
	url     *url.URL // for the origin
	visitor netip.AddrPort
	conn    *flowConn
}

type visitKey struct{}

func visitOf(ctx context.Context) *visit { return ctx.Value(visitKey{}).(*visit) }

// ServeHTTP implements [http.Handler] for the requests of flows.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn := r.Context().Value(connKey{}).(*flowConn)
	defer func() {
		if e := recover(); e != nil {
			if r.ProtoMajor == 1 { // a response that broke off must not look like one that ended; HTTP/2 resets the stream
				conn.reset(tunnel.ResultReset)
			}
			panic(e)
		}
	}()
	v := &visit{in: r, conn: conn}
	t, f, ok := h.route(v, r)
	if !ok {
		h.answer(w, r, f, "")
		return
	}
	switch t.Service.Scheme {
	case ingressconf.HTTPStatus:
		h.answer(w, r, fault{status: t.Service.Status}, "")
		return
	case ingressconf.HelloWorld:
		h.answer(w, r, hello, "")
		return
	}
	if r.ProtoMajor == 1 {
		// Without this net/http swallows the rest of a request's body once a response begins.
		_ = http.NewResponseController(w).EnableFullDuplex()
	}
	defer func() {
		if v.origin.retired.Load() {
			v.origin.closeIdle() // that of this request has become idle, or soon will
		}
	}()
	v.origin.proxy.ServeHTTP(&promptWriter{ResponseWriter: w}, r.WithContext(context.WithValue(r.Context(), visitKey{}, v)))
}

// route finds the rule for a request, or why there is none. What it looks at is what is forwarded.
func (h *Handler) route(v *visit, r *http.Request) (*ingressconf.Target, fault, bool) {
	host, err := ingressconf.CanonicalHost(r.Host)
	if err != nil {
		return nil, faultHost, false
	}
	if r.Method == http.MethodConnect {
		return nil, faultMethod, false
	}
	target, err := reqtarget.Of(r)
	if err != nil {
		return nil, faultTarget, false
	}
	now := h.rules.Load()
	if now.config.Ambiguous(host, target) {
		return nil, faultTarget, false
	}
	i, t := now.config.Match(host, target.Path)
	switch {
	case t == nil:
		return nil, faultNoRule, false
	case t.Service.Scheme == ingressconf.TCP, t.Service.Scheme == ingressconf.UDP:
		return nil, faultBytes, false
	}
	if strings.Contains(httprelay.UpgradeOf(r.Header), "h2c") {
		return nil, faultUpgrade, false // it would carry requests past the rules
	}
	if v.origin = now.origins[i]; v.origin == nil {
		return t, fault{}, true
	}
	if v.url, err = target.URL(v.origin.scheme, v.origin.addr()); err != nil {
		return nil, faultTarget, false
	}
	v.visitor = visitorOf(r.Header, v.conn.flow.Visitor)
	return t, fault{}, true
}

// visitorOf returns who asks: the address that the edge has written into the request, since a flow carries requests of
// several visitors, with the port if the flow is his alone.
func visitorOf(h http.Header, flow netip.AddrPort) netip.AddrPort {
	if ff := h["X-Forwarded-For"]; len(ff) == 1 {
		if a, err := netip.ParseAddr(strings.TrimSpace(ff[0])); err == nil {
			a = a.Unmap().WithZone("")
			if flow.Addr().Unmap() == a {
				return netip.AddrPortFrom(a, flow.Port())
			}
			return netip.AddrPortFrom(a, 0)
		}
	}
	return flow
}

// forwarding are the headers by which the edge tells of the visitor. httputil takes them away; they are trusted, since
// only the edge speaks here, and it has removed those of visitors.
var forwarding = []string{"Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto"}

// rewrite turns the edge's request into the origin's. httputil has removed the hop-by-hop headers already.
func rewrite(pr *httputil.ProxyRequest) {
	v := visitOf(pr.In.Context())
	out := pr.Out
	out.URL = v.url // httputil's copy may have lost bytes of the query
	out.Host = v.in.Host
	if hh := v.origin.target.Origin.HTTPHostHeader; hh != "" {
		out.Host = hh
	}
	for _, name := range forwarding {
		if vv, ok := v.in.Header[name]; ok {
			out.Header[name] = vv
		}
	}
	if _, ok := v.in.Header["User-Agent"]; !ok {
		out.Header["User-Agent"] = nil // or net/http would add its own
	}
	httprelay.PassTrailers(out, v.in, nil)
}

// errTooLong says that a body does not fit into what is collected.
var errTooLong = errors.New("the body is too long to be sent without chunks")

// collect reads a body of unknown length, so that it can be sent with one.
func collect(r *http.Request) error {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxCollected+1))
	if err != nil {
		return err
	}
	if len(b) > maxCollected {
		return errTooLong
	}
	r.Body.Close() //nolint:errcheck // read to its end
	r.Body, r.ContentLength, r.TransferEncoding = io.NopCloser(bytes.NewReader(b)), int64(len(b)), nil
	r.Trailer = nil // they need chunks
	if len(b) == 0 {
		r.Body = http.NoBody
	}
	return nil
}

// A promptWriter passes on each write of a body of known length at once, except for the last, which leaves with the end of
// the stream; httputil does so for bodies of unknown length. A response without a body must not be flushed: its header would
// leave ahead of the end of the stream, and for gRPC a status in the header counts only if the two are one. net/http reaches
// what is below through Unwrap.
type promptWriter struct {
	http.ResponseWriter
	left int64 // bytes of a body of known length that are still to come
}

// Unwrap is what [http.ResponseController] looks for.
func (w *promptWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// WriteHeader implements [http.ResponseWriter].
func (w *promptWriter) WriteHeader(status int) {
	if n, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64); err == nil && status >= 200 {
		w.left = n
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write implements [http.ResponseWriter].
func (w *promptWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if w.left -= int64(n); w.left > 0 && err == nil {
		err = http.NewResponseController(w.ResponseWriter).Flush()
	}
	return n, err
}

// responseCame looks at a response's header before it is passed on.
func (h *Handler) responseCame(res *http.Response) error {
	v := visitOf(res.Request.Context())
	if err := httprelay.CheckSwitch(v.in.Header, res); err != nil {
		return err
	}
	h.metrics.answered(res.StatusCode)
	if res.StatusCode == http.StatusSwitchingProtocols {
		if b, ok := res.Body.(io.ReadWriteCloser); ok {
			res.Body = &switched{b, v.conn}
		}
	}
	return nil
}

// roundTripFailed answers when there is no response to pass on.
func (h *Handler) roundTripFailed(w http.ResponseWriter, r *http.Request, err error) {
	v := visitOf(r.Context())
	if v.in.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the edge has left: there is nobody to tell
	}
	f, id := faultOf(err), httprelay.RequestID()
	if ok, missed := h.faults.allow(time.Now()); ok {
		h.log.Warn("origin failed", "request", id, "reason", f.kind, "service", v.origin.target.Service.String(), "err", err, "unlogged", missed)
	}
	h.answer(w, v.in, f, id)
}
