package ingress

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/internal/httprelay"
)

// A fault is an answer that no origin gave. It says which part failed, without addresses or names of the inside.
type fault struct {
	status int
	kind   string // for the log
	part   string // heading of the page; empty: the status' own text
	text   string
}

var (
	hello = fault{http.StatusOK, "", "Hello, world", "The way from the edge through the tunnel to this connector is open."}

	faultNoRule  = fault{http.StatusNotFound, "no_rule", "Nothing is published here", "The site's connector has no ingress rules."}
	faultHost    = fault{http.StatusBadRequest, "bad_host", "The Host header is not valid", "A request needs exactly one valid host name."}
	faultTarget  = fault{http.StatusBadRequest, "bad_target", "The path is not valid", "The request's path could be read in more than one way."}
	faultMethod  = fault{http.StatusMethodNotAllowed, "bad_method", "The method is not supported", "This is not a forward proxy."}
	faultUpgrade = fault{http.StatusBadRequest, "bad_upgrade", "The protocol is not supported", "The connection cannot be upgraded to this protocol."}
	faultBytes   = fault{http.StatusBadGateway, "not_http", "The service does not speak HTTP", "The ingress rule for this host leads to a service that carries plain bytes or packets."}

	faultOrigin   = fault{http.StatusBadGateway, "origin_down", "The origin cannot be reached", "The tunnel is up, but nothing accepts connections where the origin should be. Its operator should check that it runs."}
	faultDenied   = fault{http.StatusBadGateway, "not_permitted", "The origin is not permitted", "The connector's allow-list does not let ingress rules of the edge lead there. Its operator should check the list."}
	faultName     = fault{http.StatusBadGateway, "name_not_found", "The origin's name was not found", "The origin's name does not resolve at the site."}
	faultTimeout  = fault{http.StatusGatewayTimeout, "origin_timeout", "The origin did not answer in time", "The tunnel is up, but the origin took too long."}
	faultTLS      = fault{http.StatusBadGateway, "origin_tls", "The origin's certificate was not accepted", "The connection to the origin could not be secured. Its operator should check its certificate and the rule's options."}
	faultProtocol = fault{http.StatusBadGateway, "origin_protocol", "The origin broke off or did not speak HTTP", "The origin was reached, but its answer was cut off or could not be understood."}
	faultLength   = fault{http.StatusLengthRequired, "length_required", "The request's length is missing", "The origin takes no chunked bodies, and this one is too long to be collected first."}
)

// faultOf classifies an error of a round trip to an origin.
func faultOf(err error) fault {
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return faultName
	}
	switch {
	case errors.Is(err, ErrDenied):
		return faultDenied
	case errors.Is(err, errTooLong):
		return faultLength
	case httprelay.IsTLS(err):
		return faultTLS
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return faultTimeout
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return faultTimeout
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		return faultOrigin
	}
	return faultProtocol
}

// answer sends the page of a fault.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, f fault, id string) {
	if id == "" {
		id = httprelay.RequestID()
	}
	if f.kind != "" {
		h.log.Debug("request answered by the connector", "request", id, "reason", f.kind, "method", r.Method)
	}
	h.metrics.answered(f.status)
	if f.part == "" {
		f.part = http.StatusText(f.status)
	}
	httprelay.Page{Status: f.status, Heading: f.part, Text: f.text}.Write(w, r, id)
}

// throttle lets one event through per second and counts the others.
type throttle struct {
	mu     sync.Mutex // guards the fields below
	last   time.Time
	missed int
}

func (t *throttle) allow(now time.Time) (ok bool, missed int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.last.IsZero() && now.Sub(t.last) < time.Second {
		t.missed++
		return false, 0
	}
	missed, t.missed, t.last = t.missed, 0, now
	return true, missed
}
