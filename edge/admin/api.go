package admin

import (
	"time"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
)

// Bodies of requests, besides those that are types of other packages.

type vnetRequest struct {
	Name    string `json:"name"`
	Comment string `json:"comment,omitempty"`
	Default bool   `json:"default,omitempty"`
}

type tunnelRequest struct {
	Name    string `json:"name"`
	Comment string `json:"comment,omitempty"`
}

type tokenRequest struct {
	TTL string `json:"ttl,omitempty"` // a duration such as "1h"; empty is the default
}

type cleanupRequest struct {
	Tunnel string `json:"tunnel,omitempty"`
	Unseen string `json:"unseen,omitempty"` // a duration; empty is the default
	DryRun bool   `json:"dry_run,omitempty"`
}

// nothing is the body of requests that say it all in their path, and the reply to deletions.
type nothing struct{}

// Serving tells how what an edge serves to visitors is. Nil functions know of nothing.
type Serving struct {
	Faults func() []Fault
	Health func() []balance.PoolHealth
}

// A FlowList is open flows, as many as were asked for, and how many there are.
type FlowList struct {
	Flows []control.FlowView `json:"flows"`
	Total int                `json:"total"`
}

// A Fault is something published or configured that is out of service, and why.
type Fault struct {
	Kind string `json:"kind"` // "pool", "port" or "zone"
	Name string `json:"name"`
	Text string `json:"text"`
}

// Status is how the edge is.
type Status struct {
	control.Summary
	Edges  []control.EdgeView   `json:"edges"`
	Pools  []balance.PoolHealth `json:"pools"` // as this edge sees them
	Ports  int                  `json:"ports"`
	Zones  int                  `json:"zones"`  // of the store
	Faults []Fault              `json:"faults"` // of this edge
}

// An Error is a refusal by the edge, as the client sees it. Code is one of control's, or one of those below.
type Error struct {
	Code    control.Code `json:"code"`
	Message string       `json:"message"`
	Remedy  string       `json:"remedy,omitempty"`
	Users   []string     `json:"users,omitempty"` // with control.CodeInUse
	Status  int          `json:"-"`               // of HTTP
}

// Codes besides control's.
const (
	CodeBadRequest control.Code = "bad_request"  // the request cannot be read
	CodeDenied     control.Code = "denied"       // the caller may not administer this edge
	CodeNoSuchPath control.Code = "no_such_path" // another version of the program?
	CodeMethod     control.Code = "method"       // the path does not take the method
	CodeTooLarge   control.Code = "too_large"    // the body is larger than the path takes
	CodeInternal   control.Code = "internal"     // the edge failed; its log says how
)

// Error implements error.
func (e *Error) Error() string {
	c := control.Error{Code: e.Code, Message: e.Message, Remedy: e.Remedy, Users: e.Users}
	return c.Error()
}

// Is reports whether target is a control error, or an Error, of the same code.
func (e *Error) Is(target error) bool {
	switch t := target.(type) {
	case *control.Error:
		return t.Code == e.Code
	case *Error:
		return t.Code == e.Code
	}
	return false
}

// errorBody is how an Error crosses the wire.
type errorBody struct {
	Error *Error `json:"error"`
}

// duration reads a length of time above zero; the empty string is zero.
func duration(name, s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, badRequest("%s %q is not a duration above zero, such as 1h", name, clip(s))
	}
	return d, nil
}
