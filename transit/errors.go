package transit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Errors that callers branch on, besides those of the signer.
var (
	// ErrPermission means that the server refuses the login the right to do something, or does not know the login any more.
	// It is a signer.ErrUnavailable too: another home may have the key.
	ErrPermission = errors.New("transit: permission denied")
	// ErrLogin means that the server refused to log in.
	ErrLogin = errors.New("transit: login refused")
	// ErrKey means that a key must not or cannot be served: it is exportable, of a wrong type, or not there.
	ErrKey = errors.New("transit: key not fit to serve")
)

// fault is an error with the classes it belongs to.
type fault struct {
	text    string
	classes []error
	retry   time.Duration // how long the server wants to be left alone
}

func (f *fault) Error() string   { return f.text }
func (f *fault) Unwrap() []error { return f.classes }

// unavailable says that the home does not answer as it should.
func unavailable(format string, args ...any) error {
	err := fmt.Errorf(format, args...)
	return &fault{text: "transit: " + err.Error(), classes: []error{signer.ErrUnavailable, err}}
}

// connection classifies the error of a request that got no answer: the caller's own end, or the home's.
func connection(ctx context.Context, home string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	// The address in the error says nothing that home does not; its text can be long.
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return unavailable("no answer from %s: %w", home, err)
}

// Words by which the engine says that a key or a version is not there. It gives them with status 400 or 500.
var absent = []string{"signing key not found", "no such key version", "does not contain a private part",
	"requested version for signing is higher", "requested version for signing is less"}

// refusal says what an answer other than 200 means. doing is what was tried, hint what the operator can do about a denied permission.
func (b *Backend) refusal(a *answer, doing, hint string) error {
	said := b.session.scrub(messages(a.body))
	text := fmt.Sprintf("transit: %s at %s: HTTP %d", doing, b.name, a.status)
	if said != "" {
		text += ": " + said
	}
	f := &fault{text: text}
	switch {
	case says(said, absent):
		f.classes = []error{signer.ErrNotFound, signer.ErrUnavailable}
		f.text += ": the key or this version of it is gone; reload after the configuration names one that is there"
	case a.status == http.StatusForbidden:
		f.classes = []error{ErrPermission, signer.ErrUnavailable}
		f.text += ": " + hint
	case a.status == http.StatusNotFound:
		f.classes = []error{signer.ErrNotFound, signer.ErrUnavailable}
		f.text += ": no such key, mount or namespace there"
	case a.status == http.StatusTooManyRequests:
		f.classes = []error{signer.ErrThrottled}
		f.retry = retryAfter(a.retry)
	case a.status < 300:
		f.classes = []error{signer.ErrUnavailable}
		f.text += ": not an answer of a Transit engine"
	case a.status < 400:
		f.classes = []error{signer.ErrUnavailable}
		f.text += ": redirections are not followed"
		if u, err := url.Parse(a.location); err == nil && u.Host != "" {
			f.text += fmt.Sprintf("; it points to %.100q: a standby server does so, give the active server's address or a load balancer's", u.Host)
		}
	case a.status == http.StatusPreconditionFailed, a.status == 472, a.status == 473, a.status >= 500:
		// 412: a replica that lags behind; 472, 473: standby servers; 503: sealed, or a standby.
		f.classes = []error{signer.ErrUnavailable}
	}
	return f
}

func says(text string, words []string) bool {
	for _, w := range words {
		if strings.Contains(text, w) {
			return true
		}
	}
	return false
}

// messages returns the errors that a body holds, or nothing.
func messages(body []byte) string {
	var m struct {
		Errors []string `json:"errors"`
		Data   struct {
			Error string `json:"error"`
		} `json:"data"`
	}
	if json.Unmarshal(body, &m) != nil {
		return ""
	}
	if m.Data.Error != "" {
		m.Errors = append(m.Errors, m.Data.Error)
	}
	return strings.Join(m.Errors, "; ")
}

// maxRetryAfter is the longest that a server's wish to be left alone is granted at its word.
const maxRetryAfter = 2 * time.Second

// retryAfter reads the seconds of Retry-After (RFC 9110 section 10.2.3). A date is not read. 0 is no wish.
func retryAfter(v string) time.Duration {
	n, err := strconv.Atoi(strings.TrimSpace(v))
	if err != nil || n <= 0 {
		return 0
	}
	return min(time.Duration(min(n, 60))*time.Second, maxRetryAfter)
}
