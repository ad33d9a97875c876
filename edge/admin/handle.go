package admin

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sort"
	"strconv"
	"strings"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/state"
)

// A handler returns a value to show, or an error.
type handler func(r *http.Request, q url.Values) (any, error)

// An endpoint is a path with its methods and the query parameters that each takes.
type endpoint struct {
	path    string
	methods map[string]method
}

type method struct {
	serve handler
	query []string
}

// revisioned is what a reply is whose revision a later change can name.
type revisioned interface{ ETag() string }

// newMux builds the routes of the API from its table.
func newMux(a api) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+descriptionPath, serveDescription)
	for _, e := range endpoints(a) {
		mux.Handle(e.path, e)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, http.StatusNotFound, &Error{Code: CodeNoSuchPath, Message: fmt.Sprintf("there is no %q here", clip(r.URL.Path)),
			Remedy: "use a keyhaven-edge command of the same version as the edge"})
	})
	return mux
}

// ServeHTTP implements http.Handler.
func (e endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, ok := e.methods[r.Method]
	if !ok {
		allow := make([]string, 0, len(e.methods))
		for name := range e.methods {
			allow = append(allow, name)
		}
		sort.Strings(allow)
		w.Header().Set("Allow", strings.Join(allow, ", "))
		writeError(w, http.StatusMethodNotAllowed, &Error{Code: CodeMethod, Message: fmt.Sprintf("%s does not take %s", e.path, clip(r.Method)),
			Remedy: "use " + strings.Join(allow, " or ")})
		return
	}
	q, err := parseQuery(r.URL.RawQuery, m.query)
	var v any
	if err == nil {
		v, err = m.serve(r, q)
	}
	if err != nil {
		status, e := errorOf(err)
		writeError(w, status, e)
		return
	}
	if t, ok := v.(revisioned); ok {
		w.Header().Set("ETag", t.ETag())
	}
	writeJSON(w, http.StatusOK, v)
}

func parseQuery(raw string, known []string) (url.Values, error) {
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, badRequest("the query cannot be read: %v", err)
	}
	for name, values := range q {
		if len(values) > 1 {
			return nil, badRequest("query parameter %q is given twice", clip(name))
		}
		found := false
		for _, k := range known {
			found = found || k == name
		}
		if !found {
			return nil, badRequest("unknown query parameter %q", clip(name))
		}
	}
	return q, nil
}

// body decodes the request's body into dst.
func body(r *http.Request, dst any) error { return bodyOf(r, dst, maxBody) }

// bodyOf is body for one of up to limit bytes.
func bodyOf(r *http.Request, dst any, limit int64) error {
	if ct := r.Header.Get("Content-Type"); ct != "application/json" {
		return badRequest("the content type is %q, not application/json", clip(ct))
	}
	b, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	if err != nil {
		return badRequest("the body cannot be read: %v", err)
	}
	if int64(len(b)) > limit {
		return &Error{Code: CodeTooLarge, Message: fmt.Sprintf("the body is larger than %d bytes", limit), Status: http.StatusRequestEntityTooLarge}
	}
	if err := decodeStrict(b, dst); err != nil {
		return badRequest("the body cannot be read: %v", err)
	}
	return nil
}

// ifMatch returns the revision that a change asks for with If-Match, zero if it asks for none (RFC 9110, section 13.1.1).
func ifMatch(r *http.Request) (state.Revision, error) {
	h := r.Header.Get("If-Match")
	if h == "" || h == "*" {
		return 0, nil
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(h, `"`), `"`), 10, 64)
	if err != nil || n == 0 {
		return 0, badRequest("If-Match %q is not a revision; send one such as \"12\", in its quotes", clip(h))
	}
	return state.Revision(n), nil
}

func badRequest(format string, args ...any) error {
	return &Error{Code: CodeBadRequest, Message: fmt.Sprintf(format, args...), Status: http.StatusBadRequest,
		Remedy: "use a keyhaven-edge command of the same version as the edge"}
}

// errorOf gives an error its form on the socket. The text of unforeseen errors is shown too: the caller is the operator.
func errorOf(err error) (int, *Error) {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Status, e
	}
	if e, ok := errors.AsType[*control.Error](err); ok {
		return statusOf(e.Code), &Error{Code: e.Code, Message: e.Message, Remedy: e.Remedy, Users: e.Users}
	}
	return http.StatusInternalServerError, &Error{Code: CodeInternal, Message: err.Error(), Remedy: "look into the edge's log"}
}

func statusOf(c control.Code) int {
	switch c {
	case control.CodeInvalid:
		return http.StatusBadRequest
	case control.CodeNotFound, control.CodeNoRoute, control.CodeTokenUnknown:
		return http.StatusNotFound
	case control.CodeExists, control.CodeInUse, control.CodeDefaultVNet, control.CodeRevoked, control.CodeConflict,
		control.CodeTokenUsed, control.CodeTokenExpired:
		return http.StatusConflict
	case control.CodeStale:
		return http.StatusPreconditionFailed
	case control.CodeLimit, control.CodeTunnelDown, control.CodeUnavailable:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, status int, e *Error) { writeJSON(w, status, errorBody{e}) }

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		status, b = http.StatusInternalServerError, []byte(`{"error":{"code":"internal","message":"the reply cannot be encoded"}}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(append(b, '\n'))
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}
