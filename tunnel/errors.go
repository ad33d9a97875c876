package tunnel

import (
	"errors"
	"fmt"
	"net"
)

// A Result is the one byte with which a connector answers the opening of a flow, and the code with which either side
// cuts a flow that was open. Numbers are append-only.
type Result byte

// Results of opening a flow.
const (
	// ResultOK: the destination is connected, bytes follow.
	ResultOK Result = 0x00
	// ResultRefused: the destination answered that nobody listens there. Another connector may fare better.
	ResultRefused Result = 0x01
	// ResultTimedOut: the destination did not answer in time.
	ResultTimedOut Result = 0x02
	// ResultDenied: the connector's allow-list does not permit the destination. Trying again is pointless.
	ResultDenied Result = 0x03
	// ResultNoRoute: the connector has no route to the host or its network.
	ResultNoRoute Result = 0x04
	// ResultNameNotFound: the destination's name does not resolve at the connector.
	ResultNameNotFound Result = 0x05
	// ResultDraining: the session takes no new flows. Nothing was dialled: safe to try on another session.
	ResultDraining Result = 0x06
	// ResultLimit: the session carries as many flows as it may. Nothing was dialled: safe to try on another session.
	ResultLimit Result = 0x07
	// ResultInternal: the connector failed; its log says how.
	ResultInternal Result = 0x08
	// ResultUnsupported: the connector does not know the kind or the version of the flow. Nothing was dialled.
	ResultUnsupported Result = 0x09
	// ResultMalformed: the connector could not read the flow's header. Nothing was dialled.
	ResultMalformed Result = 0x0a
	// ResultForbidden: the connector's host does not let it do that; its log says how to permit it. For echoes it is
	// net.ipv4.ping_group_range.
	ResultForbidden Result = 0x0b
)

// Codes that cut an open flow.
const (
	// ResultReset: the far end of the flow broke; bytes are missing.
	ResultReset Result = 0x20
	// ResultCancelled: whoever opened the flow gave up waiting for the result.
	ResultCancelled Result = 0x21
	// ResultClosed: the peer closed the flow and reads no more of it.
	ResultClosed Result = 0x22
)

// ResultSessionLost never crosses the wire: the session ended under the flow, or before it could be opened.
const ResultSessionLost Result = 0xff

var resultNames = map[Result]string{
	ResultOK:           "ok",
	ResultRefused:      "connection refused by the destination",
	ResultTimedOut:     "the destination did not answer in time",
	ResultDenied:       "not permitted by the connector",
	ResultNoRoute:      "no route to the host",
	ResultNameNotFound: "the host name was not found",
	ResultDraining:     "the session is draining",
	ResultLimit:        "the session has no room for another flow",
	ResultInternal:     "the connector failed",
	ResultUnsupported:  "flow kind or version not supported by the connector",
	ResultMalformed:    "malformed flow header",
	ResultForbidden:    "the connector's host forbids it (for pings: net.ipv4.ping_group_range; see the connector's log)",
	ResultReset:        "the flow was cut by a failure at its far end",
	ResultCancelled:    "the flow was cancelled",
	ResultClosed:       "the peer closed the flow",
	ResultSessionLost:  "the session was lost",
}

// String says what r means.
func (r Result) String() string {
	if s, ok := resultNames[r]; ok {
		return s
	}
	return fmt.Sprintf("result 0x%02x", byte(r))
}

// A FlowError says why a flow could not be opened or why it was cut. errors.Is compares with the sentinels below by
// Result. An Err, if there is one, is the local cause.
type FlowError struct {
	Result Result
	// Remote is set if the peer said so.
	Remote bool
	// Err is the local cause: the context's error, or the session's. It may be nil.
	Err error
}

// Sentinels for errors.Is; compare with the results of the same names.
var (
	ErrRefused      = &FlowError{Result: ResultRefused}
	ErrTimedOut     = &FlowError{Result: ResultTimedOut}
	ErrDenied       = &FlowError{Result: ResultDenied}
	ErrNoRoute      = &FlowError{Result: ResultNoRoute}
	ErrNameNotFound = &FlowError{Result: ResultNameNotFound}
	ErrDraining     = &FlowError{Result: ResultDraining}
	ErrLimit        = &FlowError{Result: ResultLimit}
	ErrInternal     = &FlowError{Result: ResultInternal}
	ErrUnsupported  = &FlowError{Result: ResultUnsupported}
	ErrMalformed    = &FlowError{Result: ResultMalformed}
	ErrForbidden    = &FlowError{Result: ResultForbidden}
	ErrReset        = &FlowError{Result: ResultReset}
	ErrCancelled    = &FlowError{Result: ResultCancelled}
	ErrClosed       = &FlowError{Result: ResultClosed}
	ErrSessionLost  = &FlowError{Result: ResultSessionLost}
)

// Error implements error.
func (e *FlowError) Error() string {
	who := "tunnel: "
	if e.Remote {
		who = "tunnel: peer: "
	}
	if e.Err != nil {
		return who + e.Result.String() + ": " + e.Err.Error()
	}
	return who + e.Result.String()
}

// Unwrap returns the local cause.
func (e *FlowError) Unwrap() error { return e.Err }

// Is reports whether target is a *FlowError with the same result.
func (e *FlowError) Is(target error) bool {
	t, ok := target.(*FlowError)
	return ok && t.Result == e.Result
}

// Timeout implements net.Error.
func (e *FlowError) Timeout() bool { return e.Result == ResultTimedOut }

// Temporary implements net.Error; it is always false.
func (e *FlowError) Temporary() bool { return false }

// Retriable reports whether the flow certainly reached no destination and may be opened on another session.
func (e *FlowError) Retriable() bool {
	switch e.Result {
	case ResultDraining, ResultLimit, ResultUnsupported, ResultMalformed:
		return true
	}
	return false
}

// A RefusalCode says why an edge refused a session, a join or a renewal. Only the code crosses the wire; the detail
// is in the edge's log. Numbers are append-only.
type RefusalCode byte

// Refusal codes.
const (
	// RefusalInternal: the edge failed. Worth trying again.
	RefusalInternal RefusalCode = 0x01
	// RefusalUnknown: the edge does not know the connector. Joining anew is the remedy.
	RefusalUnknown RefusalCode = 0x02
	// RefusalRevoked: the connector was revoked.
	RefusalRevoked RefusalCode = 0x03
	// RefusalNotAllowed: the connector is known, but may not do this.
	RefusalNotAllowed RefusalCode = 0x04
	// RefusalVersion: the edge does not speak the connector's version of the protocol.
	RefusalVersion RefusalCode = 0x05
	// RefusalBusy: a limit is reached. Worth trying again.
	RefusalBusy RefusalCode = 0x06
	// RefusalDraining: the edge is about to stop. Worth trying another edge.
	RefusalDraining RefusalCode = 0x07
	// RefusalMalformed: the edge could not read the request.
	RefusalMalformed RefusalCode = 0x08
	// RefusalCertificate: the edge refused the certificate in the TLS handshake. It crosses the wire as a TLS alert.
	RefusalCertificate RefusalCode = 0x09
	// RefusalTokenUnknown: the edge does not know the join token.
	RefusalTokenUnknown RefusalCode = 0x10
	// RefusalTokenUsed: the join token was used before.
	RefusalTokenUsed RefusalCode = 0x11
	// RefusalTokenExpired: the join token is too old.
	RefusalTokenExpired RefusalCode = 0x12
)

var refusalNames = map[RefusalCode]string{
	RefusalInternal:     "the edge failed",
	RefusalUnknown:      "the edge does not know this connector: join again with a new token",
	RefusalRevoked:      "this connector was revoked",
	RefusalNotAllowed:   "not allowed",
	RefusalVersion:      "the edge does not speak this version of the protocol: update the older side",
	RefusalBusy:         "the edge is at a limit: try again later",
	RefusalDraining:     "the edge is about to stop",
	RefusalMalformed:    "the edge could not read the request",
	RefusalCertificate:  "the edge does not accept the certificate: wrong authority, wrong kind, or expired",
	RefusalTokenUnknown: "the edge does not know the join token",
	RefusalTokenUsed:    "the join token was used before: ask for a new one",
	RefusalTokenExpired: "the join token has expired: ask for a new one",
}

// String says what c means.
func (c RefusalCode) String() string {
	if s, ok := refusalNames[c]; ok {
		return s
	}
	return fmt.Sprintf("refusal 0x%02x", byte(c))
}

// A RefusedError is a refusal by the edge. [ListenConfig] callbacks return one (or wrap one of the sentinels) to
// choose the code that the connector gets; any other error becomes RefusalInternal.
type RefusedError struct{ Code RefusalCode }

// Sentinels for errors.Is and for the callbacks of ListenConfig.
var (
	ErrEdgeInternal = &RefusedError{RefusalInternal}
	ErrUnknown      = &RefusedError{RefusalUnknown}
	ErrRevoked      = &RefusedError{RefusalRevoked}
	ErrNotAllowed   = &RefusedError{RefusalNotAllowed}
	ErrVersion      = &RefusedError{RefusalVersion}
	ErrBusy         = &RefusedError{RefusalBusy}
	ErrEdgeDraining = &RefusedError{RefusalDraining}
	ErrBadRequest   = &RefusedError{RefusalMalformed}
	ErrCertificate  = &RefusedError{RefusalCertificate}
	ErrTokenUnknown = &RefusedError{RefusalTokenUnknown}
	ErrTokenUsed    = &RefusedError{RefusalTokenUsed}
	ErrTokenExpired = &RefusedError{RefusalTokenExpired}
)

// Error implements error.
func (e *RefusedError) Error() string { return "refused: " + e.Code.String() }

// Is reports whether target is a *RefusedError with the same code.
func (e *RefusedError) Is(target error) bool {
	t, ok := target.(*RefusedError)
	return ok && t.Code == e.Code
}

// Retriable reports whether the same request may succeed later without anybody changing anything.
func (e *RefusedError) Retriable() bool {
	switch e.Code {
	case RefusalInternal, RefusalBusy, RefusalDraining:
		return true
	}
	return false
}

// refusalOf maps a callback's error to the code that crosses the wire.
func refusalOf(err error) RefusalCode {
	if r, ok := errors.AsType[*RefusedError](err); ok {
		return r.Code
	}
	return RefusalInternal
}

// A CloseReason says why a side ended a session. Numbers are append-only.
type CloseReason byte

// Close reasons.
const (
	// CloseDrained: the session was drained, no flow was cut.
	CloseDrained CloseReason = 0x00
	// CloseShutdown: the side is stopping and did not wait for the flows that were open.
	CloseShutdown CloseReason = 0x01
	// CloseRevoked: the connector lost its permission.
	CloseRevoked CloseReason = 0x02
	// CloseReplaced: a newer session of the same connector took this one's place.
	CloseReplaced CloseReason = 0x03
	// CloseProtocol: the peer broke the protocol.
	CloseProtocol CloseReason = 0x04
	// CloseInternal: the side failed.
	CloseInternal CloseReason = 0x05
	// CloseRefused: the session was not admitted; the refusal went before.
	CloseRefused CloseReason = 0x06
	// CloseDone: a join got its answer.
	CloseDone CloseReason = 0x07
)

var closeNames = map[CloseReason]string{
	CloseDrained:  "drained",
	CloseShutdown: "shutting down",
	CloseRevoked:  "connector revoked",
	CloseReplaced: "replaced by a newer session",
	CloseProtocol: "protocol error",
	CloseInternal: "internal error",
	CloseRefused:  "not admitted",
	CloseDone:     "done",
}

// String says what r means.
func (r CloseReason) String() string {
	if s, ok := closeNames[r]; ok {
		return s
	}
	return fmt.Sprintf("reason 0x%02x", byte(r))
}

// A SessionError says how a session ended. It unwraps to net.ErrClosed and to Err.
type SessionError struct {
	Reason CloseReason
	// Remote is set if the peer ended the session.
	Remote bool
	// Err is the cause if the session was not ended on purpose, such as ErrPeerLost.
	Err error
}

// ErrPeerLost is the cause of a session's end if the peer stopped answering or forgot the session.
var ErrPeerLost = errors.New("the peer is gone")

// ErrNoAnswer says that nothing answered at the edge's address: wrong address, edge down, or the port blocked on the way.
var ErrNoAnswer = errors.New("no answer: is the address right, the edge up, and its port allowed on the way?")

// ErrStalled says that a TCP connection was made and then nothing came over it. It is an ErrNoAnswer. With
// [DialConfig.SmallSegments] it may work.
var ErrStalled error = stalledError{}

type stalledError struct{}

func (stalledError) Error() string {
	return "connected, but nothing comes: is the edge up, or does the path lose large packets?"
}

func (stalledError) Unwrap() error { return ErrNoAnswer }

// ErrProxy says that the HTTP proxy did not let a connection through; what it wraps says why and what to do.
var ErrProxy = errors.New("HTTP proxy")

// Error implements error.
func (e *SessionError) Error() string {
	if e.Err != nil {
		return "tunnel: session lost: " + e.Err.Error()
	}
	if e.Remote {
		return "tunnel: session closed by the peer: " + e.Reason.String()
	}
	return "tunnel: session closed: " + e.Reason.String()
}

// Unwrap returns net.ErrClosed and the cause.
func (e *SessionError) Unwrap() []error {
	if e.Err != nil {
		return []error{net.ErrClosed, e.Err}
	}
	return []error{net.ErrClosed}
}

// Is reports whether target is a *SessionError with the same reason, side, and no cause of its own.
func (e *SessionError) Is(target error) bool {
	t, ok := target.(*SessionError)
	return ok && t.Reason == e.Reason && t.Remote == e.Remote && t.Err == nil
}
