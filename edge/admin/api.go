package admin

import (
	"github.com/keyhaven/keyhaven/edge/control"
)

// Bodies of requests.

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
	CodeDenied     control.Code = "denied"       // the caller may not use the socket
	CodeNoSuchPath control.Code = "no_such_path" // another version of the program?
	CodeMethod     control.Code = "method"       // the path does not take the method
	CodeTooLarge   control.Code = "too_large"    // the body is larger than 64 KiB
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

// errorBody is how an Error crosses the socket.
type errorBody struct {
	Error *Error `json:"error"`
}
