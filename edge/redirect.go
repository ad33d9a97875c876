package edge

import (
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/keyhaven/keyhaven/edge/zone"
)

// redirect answers plain HTTP: to hosts of a zone with the same URL in https, and to all others with 404. Nothing of a
// request reaches an origin. The status 308 keeps method and body.
func (s *Server) redirect(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close")
	name, err := zone.CanonicalHost(r.Host)
	if err != nil || !strings.HasPrefix(r.RequestURI, "/") {
		http.Error(w, "bad request", http.StatusBadRequest)
		return
	}
	if _, ok := s.now.Load().table.Lookup(name); !ok {
		http.Error(w, "no such host", http.StatusNotFound)
		return
	}
	host := name
	if port := s.listeners.publicPort(s.cfg.Listen); port != 443 {
		host = net.JoinHostPort(name, strconv.Itoa(port))
	}
	w.Header().Set("Location", "https://"+host+r.RequestURI)
	w.WriteHeader(http.StatusPermanentRedirect)
}
