package ingress

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"html"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
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
	faultBytes   = fault{http.StatusBadGateway, "not_http", "The service does not speak HTTP", "The ingress rule for this host leads to a service that carries plain bytes."}

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
	case isTLS(err):
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

// isTLS reports whether err comes from securing the connection to an origin.
func isTLS(err error) bool {
	var (
		verify  *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		alert   tls.AlertError
		host    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) ||
		errors.As(err, &host) || errors.As(err, &unknown) || errors.As(err, &invalid)
}

// requestID returns a short random name for one request, so that a visitor's report finds the log line.
func requestID() string { return strings.ToLower(rand.Text()[:16]) }

const pageHTML = `<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>%[1]d %[2]s</title></head>
<body style="font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em">
<h1>%[2]s</h1>
<p>%[3]s</p>
<p><small>%[1]d %[4]s &middot; request %[5]s</small></p>
</body>
</html>
`

const pageText = "%[1]d %[4]s: %[2]s\n%[3]s\nrequest %[5]s\n"

// answer sends the page of a fault: HTML to those who ask for it, and text to all others. Statuses that have no body get
// none.
func (h *Handler) answer(w http.ResponseWriter, r *http.Request, f fault, id string) {
	if id == "" {
		id = requestID()
	}
	if f.kind != "" {
		h.log.Debug("request answered by the connector", "request", id, "reason", f.kind, "method", r.Method)
	}
	h.metrics.answered(f.status)
	if f.part == "" {
		f.part = http.StatusText(f.status)
	}
	header := w.Header()
	clear(header)
	if f.status == http.StatusBadRequest && r.ProtoMajor == 1 {
		header.Set("Connection", "close") // what follows may not be what it seems
	}
	header.Set("Cache-Control", "no-store")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Request-Id", id)
	if f.status == http.StatusNoContent || f.status == http.StatusNotModified {
		w.WriteHeader(f.status)
		return
	}
	format, part, text := pageText, f.part, f.text
	header.Set("Content-Type", "text/plain; charset=utf-8")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		format, part, text = pageHTML, html.EscapeString(part), html.EscapeString(text)
		header.Set("Content-Type", "text/html; charset=utf-8")
	}
	body := fmt.Sprintf(format, f.status, part, text, http.StatusText(f.status), id)
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write([]byte(body)) // the visitor may be gone
	}
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
