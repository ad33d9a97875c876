package admin

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/tunnel"
)

// maxEchoWait bounds how long an echo is waited for: a request of the API is answered soon.
const maxEchoWait = 10 * time.Second

// An EchoRequest asks for one ping through a tunnel.
type EchoRequest struct {
	VNet      string `json:"vnet,omitempty"`      // name or id; empty: the default network
	Host      string `json:"host"`                // address or name
	Connector string `json:"connector,omitempty"` // empty: any
	Seq       uint16 `json:"seq,omitempty"`
	TTL       uint8  `json:"ttl,omitempty"`        // zero: the connector's default
	Size      int    `json:"size,omitempty"`       // of the payload
	TimeoutMS int    `json:"timeout_ms,omitempty"` // zero: 2000
}

// What an [Echo] can be. Values are only ever added.
const (
	EchoReply        = "reply"
	EchoUnreachable  = "unreachable"
	EchoTimeExceeded = "time_exceeded"
	EchoTimedOut     = "timed_out" // nobody answered
	EchoFailed       = "failed"    // it could not be sent; Text says why
)

// An Echo is what came of a ping.
type Echo struct {
	Type      string `json:"type"`
	Code      int    `json:"code"` // with EchoUnreachable and EchoTimeExceeded, as in RFC 792
	From      string `json:"from,omitempty"`
	Seq       uint16 `json:"seq"`
	TTL       uint8  `json:"ttl"`         // on arrival at the connector; zero: not known
	Size      int    `json:"size"`        // of the payload that came back
	RTTUS     int64  `json:"rtt_us"`      // from the edge, in microseconds
	HostRTTUS int64  `json:"host_rtt_us"` // from the connector
	Text      string `json:"text,omitempty"`
}

// Echo pings a host behind a tunnel.
func (c *Client) Echo(ctx context.Context, r EchoRequest) (Echo, error) {
	return ask[Echo](ctx, c, request{method: post, path: path("echo"), in: r})
}

func (a api) echo(r *http.Request, _ url.Values) (any, error) {
	var in EchoRequest
	if err := body(r, &in); err != nil {
		return nil, err
	}
	wait := time.Duration(in.TimeoutMS) * time.Millisecond
	if in.Size < 0 || in.Size > tunnel.MaxEchoPayload || wait < 0 || wait > maxEchoWait {
		return nil, &control.Error{Code: control.CodeInvalid, Message: "size or timeout_ms is out of range", Remedy: "size is 0 to 65480, timeout_ms 0 to 10000"}
	}
	payload := make([]byte, in.Size)
	for i := range payload {
		payload[i] = byte(i)
	}
	reply, err := a.c.Echo(r.Context(), control.Query{VNet: in.VNet, Host: in.Host, Connector: in.Connector},
		tunnel.EchoRequest{Seq: in.Seq, TTL: in.TTL, Payload: payload, Timeout: wait})
	if _, ok := errors.AsType[*control.Error](err); ok {
		return nil, err
	}
	return echoView(in.Seq, reply, err), nil
}

func echoView(seq uint16, r tunnel.EchoReply, err error) Echo {
	e := Echo{Seq: seq, Code: int(r.Code), TTL: r.TTL, Size: len(r.Payload), RTTUS: r.RTT.Microseconds(), HostRTTUS: r.HostRTT.Microseconds()}
	if r.From.IsValid() {
		e.From = r.From.String()
	}
	switch {
	case err == tunnel.ErrEchoTimeout:
		e.Type = EchoTimedOut
	case err != nil:
		e.Type, e.Text = EchoFailed, err.Error()
	case r.Type == tunnel.EchoReplied:
		e.Type = EchoReply
	case r.Type == tunnel.EchoTimeExceeded:
		e.Type = EchoTimeExceeded
	default:
		e.Type, e.Text = EchoUnreachable, (&tunnel.UnreachableError{Code: r.Code}).Error()
	}
	return e
}
