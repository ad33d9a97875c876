package httprelay

import (
	"crypto/rand"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"
)

// RequestID returns a short random name for one request, so that a visitor's report finds the log line.
func RequestID() string { return strings.ToLower(rand.Text()[:16]) }

// A Page is an answer that no origin gave. It says which part failed, without addresses or names of the inside.
type Page struct {
	Status  int
	Heading string
	Text    string
}

const pageHTML = `<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>%[1]d %[2]s</title></head>
<body style="font: 16px/1.5 sans-serif; max-width: 40em; margin: 4em auto; padding: 0 1em">
<h1>%[2]s</h1>
<p>%[3]s</p>
<p><small>%[1]d %[4]s &middot; request %[5]s</small></p>
</body>
</html>
`

const pageText = "%[1]d %[4]s: %[2]s\n%[3]s\nrequest %[5]s\n"

// Write sends the page: HTML to those who ask for it, and text to all others. Statuses that have no body get none. What is in
// the header already is dropped. An HTTP/1.1 connection ends after a request that was malformed or did not arrive in full.
func (p Page) Write(w http.ResponseWriter, r *http.Request, id string) {
	h := w.Header()
	clear(h)
	if (p.Status == http.StatusBadRequest || p.Status == http.StatusRequestTimeout) && r.ProtoMajor == 1 {
		h.Set("Connection", "close") // what follows may not be what it seems
	}
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Request-Id", id)
	if p.Status == http.StatusNoContent || p.Status == http.StatusNotModified {
		w.WriteHeader(p.Status)
		return
	}
	format, heading, text := pageText, p.Heading, p.Text
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		format, heading, text = pageHTML, html.EscapeString(heading), html.EscapeString(text)
		h.Set("Content-Type", "text/html; charset=utf-8")
	}
	body := fmt.Sprintf(format, p.Status, heading, text, http.StatusText(p.Status), id)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(p.Status)
	if r.Method != http.MethodHead {
		_, _ = w.Write([]byte(body)) // the visitor may be gone
	}
}
