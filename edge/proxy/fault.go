package proxy

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"syscall"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/httprelay"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A fault says to a visitor which part failed, without addresses or names of the inside.
type fault struct {
	status int
	kind   string // for metrics and logs
	part   string // heading of the page
	text   string
}

var (
	faultTunnel   = fault{http.StatusBadGateway, "tunnel_down", "The tunnel to the site is down", "The site's connector is not connected to this edge at the moment. Its operator should check that it runs and can reach the edge."}
	faultNoRoute  = fault{http.StatusBadGateway, "no_route", "There is no route to the origin", "The edge or the site's connector knows no way to the origin. Its operator should check the routes and the network of the site."}
	faultRefused  = fault{http.StatusBadGateway, "origin_refused", "The origin refused the connection", "The tunnel is up, but nothing accepts connections where the origin should be. Its operator should check that it runs."}
	faultTimeout  = fault{http.StatusGatewayTimeout, "origin_timeout", "The origin did not answer in time", "The tunnel is up, but the origin took too long to answer."}
	faultDenied   = fault{http.StatusBadGateway, "not_permitted", "The origin is not permitted", "The site's connector does not allow this edge to reach the origin. Its operator should check the connector's allow-list."}
	faultName     = fault{http.StatusBadGateway, "name_not_found", "The origin's name was not found", "The origin's name does not resolve at the site. Its operator should check the zone's origin and the site's DNS."}
	faultBusy     = fault{http.StatusServiceUnavailable, "busy", "The tunnel to the site is busy", "The tunnel has no room for another connection at the moment. Please try again."}
	faultTLS      = fault{http.StatusBadGateway, "origin_tls", "The origin's certificate was not accepted", "The connection to the origin could not be secured. Its operator should check the origin's certificate and the zone's settings for it."}
	faultProtocol = fault{http.StatusBadGateway, "origin_protocol", "The origin broke off or did not speak HTTP", "The origin was reached, but its answer was cut off or could not be understood."}

	faultPool = fault{http.StatusServiceUnavailable, "no_endpoint", "No server of the site is available", "Every server that could answer is out of service at the moment. Please try again shortly."}

	faultNoZone   = fault{http.StatusMisdirectedRequest, "misdirected", "This host is not served on this connection", "The host asked for is not one that the connection was made for. Please try again on a new connection."}
	faultHost     = fault{http.StatusBadRequest, "bad_host", "The Host header is not valid", "A request needs exactly one valid host name."}
	faultTarget   = fault{http.StatusBadRequest, "bad_target", "The path is not valid", "The request's path could be read in more than one way."}
	faultMethod   = fault{http.StatusMethodNotAllowed, "bad_method", "The method is not supported", "This is not a forward proxy."}
	faultUpgrade  = fault{http.StatusBadRequest, "bad_upgrade", "The protocol is not supported", "Only WebSocket connections can be upgraded to."}
	faultVersion  = fault{http.StatusHTTPVersionNotSupported, "bad_version", "The HTTP version is not supported", "This host is not served over the HTTP version of the request."}
	faultBody     = fault{http.StatusBadRequest, "bad_body", "The request's body is not valid", "It broke off, or could not be understood."}
	faultStalled  = fault{http.StatusRequestTimeout, "visitor_stalled", "The request did not arrive in full", "Its body stopped for too long."}
	faultNoOrigin = fault{http.StatusNotFound, "no_origin", "No origin serves this path", "The host has no origin for the path asked for."}
)

// write sends the fault's page.
func (f fault) write(w http.ResponseWriter, r *http.Request, id string) {
	httprelay.Page{Status: f.status, Heading: f.part, Text: f.text}.Write(w, r, id)
}

// faultOf classifies an error of a round trip to an origin.
func faultOf(err error) fault {
	for _, c := range []struct {
		is    error
		fault fault
	}{
		{balance.ErrNoEndpoint, faultPool}, {balance.ErrNoPool, faultPool}, {errSuspect, faultTunnel},
		{control.ErrTunnelDown, faultTunnel}, {control.ErrNoRoute, faultNoRoute}, {control.ErrNotFound, faultNoRoute}, {control.ErrLimit, faultBusy},
		{tunnel.ErrRefused, faultRefused}, {tunnel.ErrTimedOut, faultTimeout}, {tunnel.ErrDenied, faultDenied},
		{tunnel.ErrNoRoute, faultNoRoute}, {tunnel.ErrNameNotFound, faultName}, {tunnel.ErrLimit, faultBusy},
		{tunnel.ErrDraining, faultTunnel}, {tunnel.ErrSessionLost, faultTunnel}, {tunnel.ErrInternal, faultTunnel},
		{syscall.ECONNREFUSED, faultRefused}, {syscall.EHOSTUNREACH, faultNoRoute}, {syscall.ENETUNREACH, faultNoRoute},
		{context.DeadlineExceeded, faultTimeout}, {os.ErrDeadlineExceeded, faultTimeout},
	} {
		if errors.Is(err, c.is) {
			return c.fault
		}
	}
	if httprelay.IsTLS(err) {
		return faultTLS
	}
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return faultTimeout
	}
	return faultProtocol
}
