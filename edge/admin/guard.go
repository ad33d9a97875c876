package admin

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

type connKey struct{}

// A caller is who makes a request, as the log names it.
type caller slog.Attr

// callerOnSocket decides by the user, on the kernel's word.
func (s *Server) callerOnSocket(r *http.Request) (caller, *Error) {
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	uid, err := s.identify(conn)
	who := caller(slog.Any("uid", uid))
	if err != nil || !s.allowed(uid) {
		return who, &Error{Code: CodeDenied, Message: fmt.Sprintf("user %d may not administer this edge", uid),
			Remedy: "use root, or the user that the edge runs as"}
	}
	return who, nil
}

// callerOverTLS decides by the certificate, anew for each request: a connection may outlive both the certificate and its
// holder's place on the list.
func (s *Server) callerOverTLS(r *http.Request) (caller, *Error) {
	if r.TLS == nil {
		return caller(slog.String("peer", "")), &Error{Code: CodeDenied, Message: "the connection has no TLS"}
	}
	id, err := mtls.PeerIdentity(*r.TLS)
	who := caller(slog.String("peer", id.String()))
	switch {
	case err != nil || id.Kind != mtls.KindOperator || id.TrustDomain != s.cfg.Identity.Identity().TrustDomain:
		return who, &Error{Code: CodeDenied, Message: "the certificate is no operator's", Remedy: "use one of 'keyhaven-edge ca issue operator NAME'"}
	case time.Now().After(r.TLS.PeerCertificates[0].NotAfter):
		return who, &Error{Code: CodeDenied, Message: fmt.Sprintf("the certificate of %s has run out", id), Remedy: "have a new one issued with 'keyhaven-edge ca issue operator'"}
	case !slices.Contains(*s.operators.Load(), id.Name):
		return who, &Error{Code: CodeDenied, Message: fmt.Sprintf("%s may not administer this edge", id),
			Remedy: "add the name to admin.operators in the edge's configuration, and reload it"}
	}
	return who, nil
}

// guard refuses callers who may not, and requests that a web page could have made.
func (s *Server) guard(identify func(*http.Request) (caller, *Error), next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		who, refused := identify(r)
		if refused != nil {
			s.log.Warn("caller refused", slog.Attr(who), "err", refused.Message)
			w.Header().Set("Connection", "close")
			writeError(w, http.StatusForbidden, refused)
			return
		}
		if r.Header.Get("Origin") != "" || r.Header.Get("Sec-Fetch-Site") != "" || r.Host != hostName {
			writeError(w, http.StatusForbidden, &Error{Code: CodeDenied, Message: "requests of web pages are refused",
				Remedy: "use keyhaven-edge, or send the header Host: " + hostName})
			return
		}
		start := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r.WithContext(ctx))
		level := slog.LevelDebug
		if r.Method != http.MethodGet {
			level = slog.LevelInfo
		}
		s.log.Log(ctx, level, "admin request", "op", r.Method+" "+r.URL.Path, "status", rec.status, slog.Attr(who), "dur", time.Since(start))
	})
}

type recorder struct {
	http.ResponseWriter
	status int
}

// WriteHeader implements [http.ResponseWriter].
func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}
