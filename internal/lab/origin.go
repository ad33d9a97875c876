package lab

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"strconv"
	"time"
)

// Origin returns the handler of a private web server that tells who it is and what it was sent:
//
//	/            a line of text with its name
//	/request     the request as it arrived, as JSON
//	/upload      takes a body and answers with its length and SHA-256
//	/download?n= sends n bytes
//	/events?n=   sends n server-sent events, one every 100 ms
//	/browser     a page whose script shows the protocol that the browser used, as "protocol: h3"
func Origin(name string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		fmt.Fprintf(w, "Hello from the private origin %q.\nYou asked %s for %s.\n", name, r.Host, r.URL.Path)
	})
	mux.HandleFunc("/request", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(map[string]any{
			"origin": name, "method": r.Method, "host": r.Host, "uri": r.RequestURI, "header": r.Header, "remote": r.RemoteAddr,
		})
	})
	mux.HandleFunc("/upload", func(w http.ResponseWriter, r *http.Request) {
		h := sha256.New()
		n, err := io.Copy(h, r.Body)
		if err != nil {
			return // the visitor has gone
		}
		fmt.Fprintf(w, "%d %x\n", n, h.Sum(nil))
	})
	mux.HandleFunc("/download", download)
	mux.HandleFunc("/events", events)
	mux.HandleFunc("/browser", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprintf(w, browserPage, html.EscapeString(name))
	})
	return mux
}

const browserPage = `<!doctype html><title>Keyhaven</title><p>private origin %s</p><p id="p"></p>
<script>document.getElementById("p").textContent = "protocol: " + performance.getEntriesByType("navigation")[0].nextHopProtocol</script>
`

func download(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.ParseInt(r.FormValue("n"), 10, 64)
	if err != nil || n < 0 || n > 1<<40 {
		http.Error(w, "n must be a number of bytes", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	buf := make([]byte, 64<<10)
	for n > 0 {
		m, err := w.Write(buf[:min(n, int64(len(buf)))])
		if err != nil {
			return
		}
		n -= int64(m)
	}
}

func events(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.Atoi(r.FormValue("n"))
	if err != nil || n < 0 || n > 1_000 {
		http.Error(w, "n must be a number of events up to 1000", http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	for i := range n {
		fmt.Fprintf(w, "data: %d\n\n", i)
		if http.NewResponseController(w).Flush() != nil {
			return
		}
		select {
		case <-r.Context().Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
}
