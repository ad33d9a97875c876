package server

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Fault is something that goes wrong with requests. The zero value of a field does nothing. It is applied in the order of the fields.
type Fault struct {
	// Path is how paths begin, below /v1/, that the fault strikes. If empty, all.
	Path string `json:"path,omitempty"`
	// Count is how many requests it strikes. If zero, all until it is cleared.
	Count int `json:"count,omitempty"`
	// Delay is how long the server waits first.
	Delay time.Duration `json:"delay,omitempty"`
	// Drop ends the connection without an answer.
	Drop bool `json:"drop,omitempty"`
	// Status is answered in place of the right answer, with Body, or else an error, and the fields below as headers.
	Status int `json:"status,omitempty"`
	// Body is the body of the answer.
	Body string `json:"body,omitempty"`
	// Echo puts what the client sent, its token included, into the error.
	Echo bool `json:"echo,omitempty"`
	// RetryAfter is in seconds.
	RetryAfter int `json:"retry_after,omitempty"`
	// Location is that of a redirection.
	Location string `json:"location,omitempty"`
}

// Inject adds a fault.
func (s *Server) Inject(f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
}

// Clear takes all faults away.
func (s *Server) Clear() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = nil
}

// fault returns the first fault that strikes a path.
func (s *Server) fault(path string) (Fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	i := slices.IndexFunc(s.faults, func(f *Fault) bool { return strings.HasPrefix(path, f.Path) })
	if i < 0 {
		return Fault{}, false
	}
	f := *s.faults[i]
	switch s.faults[i].Count {
	case 0:
	case 1:
		s.faults = slices.Delete(s.faults, i, i+1)
	default:
		s.faults[i].Count--
	}
	s.counts.faults.Add(1)
	return f, true
}

// strike applies a fault, and reports whether the request is answered by it.
func (s *Server) strike(w http.ResponseWriter, r *http.Request, path string) bool {
	f, ok := s.fault(path)
	if !ok {
		return false
	}
	if f.Delay > 0 {
		t := time.NewTimer(f.Delay)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			return true
		case <-s.ctx.Done():
			return true
		}
	}
	if f.Drop {
		panic(http.ErrAbortHandler)
	}
	if f.Status == 0 {
		return false
	}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(f.RetryAfter))
	}
	if f.Location != "" {
		w.Header().Set("Location", f.Location)
	}
	switch {
	case f.Body != "":
		reply(w, f.Status, []byte(f.Body))
	case f.Echo:
		data, _ := body(r)
		text := "seen token " + r.Header.Get(tokenHeader)
		for k, v := range data {
			if v, ok := v.(string); ok {
				text += " " + k + "=" + v
			}
		}
		refuse(w, f.Status, text)
	default:
		refuse(w, f.Status, http.StatusText(f.Status))
	}
	return true
}
