package proxy

import (
	"crypto/rand"
	"fmt"
	"html"
	"net/http"
	"strconv"
	"strings"
)

// requestID returns a short random name for one request, so that a visitor's report finds the log line.
func requestID() string { return strings.ToLower(rand.Text()[:16]) }

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

// write sends the page of a fault: HTML to those who ask for it, and text to all others.
func (f fault) write(w http.ResponseWriter, r *http.Request, id string) {
	h := w.Header()
	clear(h)
	if (f.status == http.StatusBadRequest || f.status == http.StatusRequestTimeout) && r.ProtoMajor == 1 {
		h.Set("Connection", "close") // what follows may not be what it seems
	}
	format, part, text := pageText, f.part, f.text
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if strings.Contains(r.Header.Get("Accept"), "text/html") {
		format, part, text = pageHTML, html.EscapeString(part), html.EscapeString(text)
		h.Set("Content-Type", "text/html; charset=utf-8")
	}
	body := fmt.Sprintf(format, f.status, part, text, http.StatusText(f.status), id)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Request-Id", id)
	w.WriteHeader(f.status)
	if r.Method != http.MethodHead {
		_, _ = w.Write([]byte(body)) // the visitor may be gone
	}
}
