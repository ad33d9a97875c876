package proxy

import (
	"bufio"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/internal/httprelay"
	"github.com/keyhaven/keyhaven/internal/reqtarget"
)

// A Dialer reaches addresses behind the tunnel. Connections that know whether the session below them seems dead have a
// method Suspect() bool.
type Dialer interface {
	Dial(ctx context.Context, q control.Query) (net.Conn, error)
}

// Config is what a [Handler] needs. Zones, Dialer and a positive ConnectTimeout are required.
type Config struct {
	Zones           *zone.Table
	Dialer          Dialer
	Balancer        *balance.Balancer // of the pools that origins name; nil: there are none
	ConnectTimeout  time.Duration     // to reach an origin; its TLS handshake may take as long again
	ResponseTimeout time.Duration     // for a response's header once the request is written; zero: none
	IdleConns       int               // kept per origin; zero: net/http's default
	BodyIdleTimeout time.Duration     // for a visitor to send or to take the next part of a body that is due; zero: none
	AltSvc          string            // value of Alt-Svc for zones with HTTP/3 on connections without; "" sends none
	Logger          *slog.Logger      // nil discards
	// OnRequest, if not nil, is told of each finished request: the zone ("" if none), the HTTP version ("1.1", "2", "3")
	// and the status, which is 499 if the visitor left before there was one.
	OnRequest func(zone, version string, status int)
}

// statusGone counts requests whose visitor left before there was a response.
const statusGone = 499

// maxFaultLines is how many faults are logged in a second: visitors cause them at will.
const maxFaultLines = 20

// A Handler forwards the requests of the zones it was made with. It needs requests that came over TLS. It is safe for
// concurrent use; close it when no request comes any more.
type Handler struct {
	cfg     Config
	log     *slog.Logger
	origins map[*zone.Upstream]*origin
	faults  perSecond
}

// New returns a handler. It opens no connection.
func New(cfg Config) *Handler {
	h := &Handler{cfg: cfg, log: cfg.Logger, origins: make(map[*zone.Upstream]*origin)}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	for _, z := range cfg.Zones.Zones() {
		for _, u := range z.Upstreams() {
			h.origins[u] = h.newOrigin(u)
		}
	}
	return h
}

// CloseIdle closes the connections to origins that carry nothing; the others close when they become idle. Requests in
// flight are not disturbed.
func (h *Handler) CloseIdle() {
	for _, o := range h.origins {
		o.closeIdle()
	}
}

// A visit is one request on its way.
type visit struct {
	id      string
	in      *http.Request // as it came, before any copy: its trailers are filled in while its body is read
	zone    *zone.Zone
	origin  *origin
	host    string // canonical, with the port if one came
	target  reqtarget.Target
	url     *url.URL // for the origin
	visitor netip.Addr
	remote  netip.AddrPort // of the visitor's connection
	local   netip.AddrPort // that the visitor dialled
	conn    *Visitor
	ctx     context.Context // of the request, with the visit in it
	body    *visitorBody    // nil if there is none
}

// ingressAddr is the requested host with the port that the visitor dialled.
func (v *visit) ingressAddr() string {
	if _, _, err := net.SplitHostPort(v.host); err == nil {
		return v.host
	}
	return net.JoinHostPort(v.host, "443")
}

type visitKey struct{}

func visitOf(ctx context.Context) *visit { return ctx.Value(visitKey{}).(*visit) }

// ServeHTTP implements [http.Handler].
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	sw := newStatusWriter(w, r, h.cfg.BodyIdleTimeout)
	defer sw.end()
	v := &visit{in: r}
	if h.cfg.OnRequest != nil {
		defer func() {
			name := ""
			if v.zone != nil {
				name = v.zone.Name
			}
			h.cfg.OnRequest(name, versionOf(r), sw.statusOr(statusGone))
		}()
	}
	if f, ok := h.admit(v, r); !ok {
		h.refuse(sw, r, f)
		return
	}
	if h.cfg.AltSvc != "" && v.zone.HTTP3 && r.ProtoMajor < 3 {
		w.Header().Set("Alt-Svc", h.cfg.AltSvc)
	}
	if r.ProtoMajor == 1 {
		// Without this net/http swallows the rest of a request's body once a response begins. HTTP/2 and 3 have it anyway.
		_ = sw.control.EnableFullDuplex()
	}
	if site := v.origin.up.Site; site != nil {
		site.Serve(sw, r, strings.TrimPrefix(v.target.Path, v.origin.up.Path), "https://"+v.host+v.origin.up.Path, h.log)
		return
	}
	conn, single := visitorOf(r.Context())
	if v.conn = conn; single {
		defer conn.Close()
	}
	v.ctx = context.WithValue(r.Context(), visitKey{}, v)
	out := r.WithContext(v.ctx)
	if r.ContentLength != 0 {
		v.body = newVisitorBody(w, r, h.cfg.BodyIdleTimeout)
		defer v.body.guard.done()
		out.Body = v.body
		if r.ProtoMajor == 3 && r.ContentLength < 0 {
			if err := v.body.settleEmpty(out); err != nil {
				h.roundTripFailed(sw, out, err)
				return
			}
		}
	}
	v.origin.proxy.ServeHTTP(sw, out)
}

// admit decides where a request goes, or why it goes nowhere. The zone is that of the connection's SNI, and the Host must
// select the very same one.
func (h *Handler) admit(v *visit, r *http.Request) (fault, bool) {
	sni, err := zone.Canonical(r.TLS.ServerName)
	if err != nil {
		return faultNoZone, false
	}
	z, ok := h.cfg.Zones.Lookup(sni)
	if !ok {
		return faultNoZone, false
	}
	v.zone = z
	name, err := zone.CanonicalHost(r.Host)
	if err != nil {
		return faultHost, false
	}
	if hz, ok := h.cfg.Zones.Lookup(name); !ok || hz != z {
		return faultNoZone, false
	}
	if v.host = name; name != r.Host {
		if _, port, err := net.SplitHostPort(r.Host); err == nil && port != "" {
			v.host = name + ":" + port
		}
	}
	switch {
	case r.Method == http.MethodConnect:
		return faultMethod, false
	case r.ProtoMajor == 1 && !z.HTTP1, r.ProtoMajor == 2 && !z.HTTP2, r.ProtoMajor == 3 && !z.HTTP3:
		return faultVersion, false
	}
	if up := httprelay.UpgradeOf(r.Header); up != "" && up != "websocket" {
		return faultUpgrade, false // an upgrade to h2c would carry requests past every check here
	}
	if v.target, err = reqtarget.Of(r); err != nil || z.Ambiguous(v.target) {
		return faultTarget, false
	}
	up, ok := z.Upstream(v.target.Path)
	if !ok {
		return faultNoOrigin, false
	}
	v.origin = h.origins[up]
	if v.url, err = v.target.URL(v.origin.scheme, up.Addr()); err != nil {
		return faultTarget, false
	}
	addr, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return faultProtocol, false
	}
	v.visitor = addr.Addr().Unmap().WithZone("")
	v.remote = netip.AddrPortFrom(v.visitor, addr.Port())
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		v.local, _ = netip.ParseAddrPort(local.String())
	}
	return fault{}, true
}

func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, f fault) {
	id := httprelay.RequestID()
	h.log.Debug("request refused", "request", id, "reason", f.kind, "peer", r.RemoteAddr, "method", r.Method)
	f.write(w, r, id)
}

// rewrite turns the visitor's request into the origin's. httputil has removed the hop-by-hop headers already.
func rewrite(pr *httputil.ProxyRequest) {
	v := visitOf(pr.In.Context())
	out := pr.Out
	out.URL = v.url // httputil's copy has lost bytes of the query
	out.Host = v.host
	if hh := v.origin.up.HostHeader; hh != "" {
		out.Host = hh
	}
	stripIdentity(out.Header)
	setForwarded(out.Header, v.visitor, v.host)
	httprelay.PassTrailers(out, v.in, namesIdentity)
}

// cleanResponse removes what only the edge may say to visitors. From here on the response has begun.
func (h *Handler) cleanResponse(res *http.Response) error {
	v := visitOf(res.Request.Context())
	if err := httprelay.CheckSwitch(v.in.Header, res); err != nil {
		return err
	}
	if v.body != nil {
		v.body.relax()
	}
	res.Header.Del("Alt-Svc")
	return nil
}

// roundTripFailed answers when there is no response to pass on.
func (h *Handler) roundTripFailed(w http.ResponseWriter, r *http.Request, err error) {
	v := visitOf(r.Context())
	switch {
	case v.body != nil && v.body.stalled.Load(): // net/http may have ended the context at the deadline, but the visitor is there
		h.refuse(w, v.in, faultStalled)
		return
	case errors.Is(err, errBody):
		h.refuse(w, v.in, faultBody)
		return
	}
	if v.in.Context().Err() != nil {
		panic(http.ErrAbortHandler) // the visitor has left, or the edge stops: there is nobody to tell
	}
	f := faultOf(err)
	v.id = httprelay.RequestID()
	if h.faults.allow(time.Now(), maxFaultLines) {
		h.log.Warn("origin failed", "request", v.id, "reason", f.kind, "zone", v.zone.Name, "vnet", v.origin.up.VNet, "origin", v.origin.name(), "err", err)
	}
	f.write(w, v.in, v.id)
}

func versionOf(r *http.Request) string {
	switch r.ProtoMajor {
	case 3:
		return "3"
	case 2:
		return "2"
	}
	return "1.1"
}

// A statusWriter remembers the status, and passes on each write at once. httputil does so for bodies of unknown length. Here
// it is done for those of known length, except for the last write, which leaves with the end of the stream. A response
// without a body must not be flushed: its header would leave ahead of the end of the stream, and for gRPC a status in
// the header counts only if the two are one. net/http reaches what is below through Unwrap. A visitor who does not take a
// write within the limit is cut.
type statusWriter struct {
	http.ResponseWriter
	guard   guard
	control *http.ResponseController
	http1   bool
	status  int
	left    int64 // bytes of a body of known length that are still to come
}

func newStatusWriter(w http.ResponseWriter, r *http.Request, limit time.Duration) *statusWriter {
	s := &statusWriter{ResponseWriter: w, control: http.NewResponseController(w), http1: r.ProtoMajor == 1}
	s.guard.limit = limit
	s.guard.cut = func() { _ = s.control.SetWriteDeadline(aMomentAgo) }
	if s.http1 && limit > 0 {
		_ = s.control.SetWriteDeadline(time.Time{}) // that of the request before
	}
	return s
}

// end is called when the request is over. What net/http has buffered over HTTP/1.1 leaves after that.
func (w *statusWriter) end() {
	w.guard.done()
	if w.http1 && w.guard.limit > 0 && w.status != http.StatusSwitchingProtocols {
		_ = w.control.SetWriteDeadline(time.Now().Add(w.guard.limit))
	}
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *statusWriter) WriteHeader(status int) {
	if status >= 200 || status == http.StatusSwitchingProtocols {
		w.status = status
		if n, err := strconv.ParseInt(w.Header().Get("Content-Length"), 10, 64); err == nil {
			w.left = n
		}
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(p []byte) (int, error) {
	w.guard.begin()
	defer w.guard.done()
	n, err := w.ResponseWriter.Write(p)
	if w.left -= int64(n); w.left > 0 && err == nil {
		err = w.control.Flush()
	}
	return n, err
}

// FlushError implements what [http.ResponseController] flushes with.
func (w *statusWriter) FlushError() error {
	w.guard.begin()
	defer w.guard.done()
	return w.control.Flush()
}

// Hijack is what a WebSocket takes.
func (w *statusWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	w.status = http.StatusSwitchingProtocols
	return w.control.Hijack()
}

func (w *statusWriter) statusOr(none int) int {
	if w.status == 0 {
		return none
	}
	return w.status
}

// perSecond counts events within the current second.
type perSecond struct{ secondAndCount atomic.Uint64 }

// allow reports whether fewer than limit events were allowed in the second of now. It may err by a few under contention.
func (p *perSecond) allow(now time.Time, limit uint32) bool {
	second := uint64(now.Unix()) << 32
	old := p.secondAndCount.Load()
	if old&^0xffff_ffff != second {
		old = second
	}
	if uint32(old) >= limit {
		return false
	}
	p.secondAndCount.Store(old + 1)
	return true
}
