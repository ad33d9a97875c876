package control

import (
	"fmt"
	"strings"
)

// A Code classifies an [Error]. Codes are part of the admin API and are only ever added to.
type Code string

// The codes. None of them is worth retrying without a change, except CodeConflict, CodeTunnelDown and CodeUnavailable.
const (
	CodeInvalid      Code = "invalid"       // the request says something impossible
	CodeNotFound     Code = "not_found"     // no such record
	CodeExists       Code = "exists"        // a record with that name or prefix is there already
	CodeInUse        Code = "in_use"        // others depend on the record; Users names them
	CodeDefaultVNet  Code = "default_vnet"  // the default network cannot be deleted
	CodeRevoked      Code = "revoked"       // the connector has been revoked
	CodeTokenUnknown Code = "token_unknown" // no join token with that id and secret
	CodeTokenUsed    Code = "token_used"    // the join token has enrolled a connector
	CodeTokenExpired Code = "token_expired" // the join token is too old
	CodeNoRoute      Code = "no_route"      // the network has no route to the host
	CodeTunnelDown   Code = "tunnel_down"   // the route's tunnel has no session that takes flows
	CodeLimit        Code = "limit"         // a named bound has been reached
	CodeConflict     Code = "conflict"      // others kept changing the same records
	CodeStale        Code = "stale"         // the record has a newer revision than the change was made from
	CodeUnavailable  Code = "unavailable"   // the store that edges share does not answer
)

// An Error is a refusal: what was wrong, and what to do about it. Two errors match by [errors.Is] if their codes do.
type Error struct {
	Code    Code
	Message string
	Remedy  string   // may be empty
	Users   []string // what still depends on the record, with CodeInUse
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString(e.Message)
	for _, u := range e.Users {
		b.WriteString("\n  ")
		b.WriteString(u)
	}
	if e.Remedy != "" {
		if len(e.Users) > 0 {
			b.WriteString("\n")
		} else {
			b.WriteString("; ")
		}
		b.WriteString(e.Remedy)
	}
	return b.String()
}

// Is reports whether target is an [Error] of the same code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// Sentinels for errors.Is.
var (
	ErrInvalid      = &Error{Code: CodeInvalid, Message: "invalid"}
	ErrNotFound     = &Error{Code: CodeNotFound, Message: "not found"}
	ErrExists       = &Error{Code: CodeExists, Message: "exists already"}
	ErrInUse        = &Error{Code: CodeInUse, Message: "in use"}
	ErrDefaultVNet  = &Error{Code: CodeDefaultVNet, Message: "is the default network"}
	ErrRevoked      = &Error{Code: CodeRevoked, Message: "revoked"}
	ErrTokenUnknown = &Error{Code: CodeTokenUnknown, Message: "join token unknown"}
	ErrTokenUsed    = &Error{Code: CodeTokenUsed, Message: "join token used"}
	ErrTokenExpired = &Error{Code: CodeTokenExpired, Message: "join token expired"}
	ErrNoRoute      = &Error{Code: CodeNoRoute, Message: "no route"}
	ErrTunnelDown   = &Error{Code: CodeTunnelDown, Message: "tunnel down"}
	ErrLimit        = &Error{Code: CodeLimit, Message: "limit reached"}
	ErrConflict     = &Error{Code: CodeConflict, Message: "conflict"}
	ErrStale        = &Error{Code: CodeStale, Message: "stale"}
	ErrUnavailable  = &Error{Code: CodeUnavailable, Message: "store unavailable"}
)

func refusal(c Code, remedy, format string, args ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, args...), Remedy: remedy}
}
