package balance

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"reflect"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	maxProbeBody      = 64 << 10
	maxProbeHeader    = 64 << 10
	maxProbeRedirects = 5
	maxReason         = 200 // bytes of what is kept of a failure
	// smoothing is the weight of the newest round trip in the mean.
	smoothing = 0.3
)

// timeoutOf bounds one probe with its retries.
func timeoutOf(m *spec.Monitor) time.Duration {
	return m.Patience() * time.Duration(1+m.Retries)
}

// watchAllLocked starts the monitors that are new and ends those that are gone.
func (b *Balancer) watchAllLocked(old, next *table) {
	kept := map[*endpointState]bool{}
	for _, p := range next.order {
		for _, e := range p.endpoints {
			kept[e.endpointState] = true
			b.watchLocked(p, e)
		}
	}
	for _, p := range old.order {
		for _, e := range p.endpoints {
			if !kept[e.endpointState] {
				e.unwatch()
			}
		}
	}
}

// watchLocked makes the endpoint's monitor be as p says.
func (b *Balancer) watchLocked(p *pool, e *endpoint) {
	m := p.cfg.Monitor
	if m == nil || e.cfg.Disabled {
		e.unwatch()
		return
	}
	if b.ctx == nil || b.ctx.Err() != nil {
		return
	}
	e.mu.Lock()
	running := e.stop != nil && reflect.DeepEqual(e.of, *m)
	e.mu.Unlock()
	if running {
		return
	}
	e.unwatch()
	ctx, cancel := context.WithCancel(b.ctx)
	e.mu.Lock()
	e.stop, e.of = cancel, *m
	e.mu.Unlock()
	b.running.Go(func() {
		defer cancel()
		b.watch(ctx, e, m)
	})
}

// unwatch ends the monitor and forgets its results: without one they are stale.
func (e *endpoint) unwatch() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.stop == nil {
		return
	}
	e.stop()
	e.stop, e.row, e.reason = nil, 0, ""
	if !e.watch || e.cfg.Disabled {
		e.health.Store(healthUnknown)
		e.since = time.Now()
	}
}

// watch probes the endpoint at once and then at intervals, which differ by a tenth so that edges and endpoints do not fall
// into step.
func (b *Balancer) watch(ctx context.Context, e *endpoint, m *spec.Monitor) {
	pr := newProber(b.cfg.Dialer, &e.cfg, m)
	interval := m.Every()
	for {
		var rtt time.Duration
		var err error
		for range 1 + m.Retries {
			began := time.Now()
			pctx, cancel := context.WithTimeout(ctx, m.Patience())
			rtt, err = pr.probe(pctx)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				if rtt == 0 {
					rtt = time.Since(began)
				}
				break
			}
		}
		b.note(ctx, e, m, rtt, err)
		t := time.NewTimer(interval - interval/10 + rand.N(interval/5))
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
	}
}

// note takes in the result of a probe.
func (b *Balancer) note(ctx context.Context, e *endpoint, m *spec.Monitor, rtt time.Duration, err error) {
	e.mu.Lock()
	if ctx.Err() != nil { // the monitor has been taken away meanwhile
		e.mu.Unlock()
		return
	}
	was := e.health.Load()
	next := was
	if err == nil {
		e.good.Add(1)
		e.smooth(rtt)
		e.row, e.reason = max(1, e.row+1), ""
		if was == healthUnknown || e.row >= max(1, m.Up) {
			next = healthUp
		}
	} else {
		e.bad.Add(1)
		e.row, e.reason = min(-1, e.row-1), reasonOf(err)
		if was == healthUnknown || -e.row >= max(1, m.Down) {
			next = healthDown
		}
	}
	if next != was {
		e.health.Store(next)
		e.since = time.Now()
	}
	e.mu.Unlock()
	if next == was {
		return
	}
	if next == healthUp {
		b.log.Info("endpoint is up", "pool", e.pool.cfg.Name, "endpoint", e.label, "vnet", e.cfg.VNet, "dur", rtt)
	} else {
		b.log.Warn("endpoint is down", "pool", e.pool.cfg.Name, "endpoint", e.label, "vnet", e.cfg.VNet, "err", err)
	}
	b.wake()
}

func (e *endpointState) smooth(rtt time.Duration) {
	if old := e.rtt.Load(); old != 0 {
		rtt = time.Duration(smoothing*float64(rtt) + (1-smoothing)*float64(old))
	}
	e.rtt.Store(max(1, int64(rtt)))
}

func reasonOf(err error) string {
	text := strings.ToValidUTF8(err.Error(), "?")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}

// A prober probes one endpoint.
type prober struct {
	dialer Dialer
	query  control.Query
	m      *spec.Monitor
	codes  spec.Codes
	host   string // of HTTP probes
	seq    uint16
}

func newProber(d Dialer, e *spec.Endpoint, m *spec.Monitor) *prober {
	p := &prober{dialer: d, m: m, host: m.HostHeader}
	p.query = control.Query{VNet: e.VNet, Host: e.Host, Port: e.Port, Connector: e.Connector, Class: tunnel.ClassInteractive}
	if m.Port != 0 {
		p.query.Port = m.Port
	}
	if p.host == "" {
		p.host = e.HostHeader
	}
	if p.host == "" {
		p.host = net.JoinHostPort(e.Host, fmt.Sprint(p.query.Port))
	}
	p.codes, _ = spec.ParseCodes(m.Expect) // checked with the configuration
	return p
}

// probe asks once. It returns the round trip, or zero if that is the time that the call took.
func (p *prober) probe(ctx context.Context) (time.Duration, error) {
	switch p.m.Type {
	case spec.MonitorTCP:
		conn, err := p.dialer.Dial(ctx, p.query)
		if err != nil {
			return 0, err
		}
		return 0, conn.Close()
	case spec.MonitorICMP:
		p.seq++
		q := p.query
		q.Port = 0
		r, err := p.dialer.Echo(ctx, q, tunnel.EchoRequest{Seq: p.seq, Payload: make([]byte, 32), Timeout: p.m.Patience()})
		if err == nil {
			err = r.Err()
		}
		return r.RTT, err
	}
	return 0, p.probeHTTP(ctx)
}

var errRedirects = errors.New("too many redirects")

// probeHTTP asks on a connection of its own, so that it sees what a new visitor sees.
func (p *prober) probeHTTP(ctx context.Context) error {
	t := &http.Transport{
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxProbeHeader,
		DialContext:     func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dialer.Dial(ctx, p.query) },
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, InsecureSkipVerify: !p.m.VerifyTLS}, //nolint:gosec // G402: a probe tells whether there is an answer; verify_tls asks for more
	}
	defer t.CloseIdleConnections()
	client := &http.Client{Transport: t, CheckRedirect: func(_ *http.Request, via []*http.Request) error {
		if !p.m.FollowRedirects {
			return http.ErrUseLastResponse
		}
		if len(via) >= maxProbeRedirects {
			return errRedirects
		}
		return nil
	}}
	method, path := p.m.Method, p.m.Path
	if method == "" {
		method = http.MethodGet
	}
	if path == "" {
		path = "/"
	}
	req, err := http.NewRequestWithContext(ctx, method, p.m.Type+"://"+p.host+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "keyhaven-monitor")
	for name, value := range p.m.Headers {
		req.Header.Set(name, value)
	}
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if !p.codes.Has(res.StatusCode) {
		return fmt.Errorf("status %d is not among those expected (%s)", res.StatusCode, expectText(p.m.Expect))
	}
	if p.m.Body == "" {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(res.Body, maxProbeBody))
	if err != nil {
		return fmt.Errorf("body: %w", err)
	}
	if !strings.Contains(string(body), p.m.Body) {
		return errors.New("the expected text is not in the body")
	}
	return nil
}

func expectText(s string) string {
	if s == "" {
		return "200-399"
	}
	return s
}
