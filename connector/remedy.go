package connector

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/connector/check"
	"github.com/keyhaven/keyhaven/tunnel"
)

// remedy returns what a person has to do before an attempt can succeed, or "" if another attempt may.
func (c *Connector) remedy(err error) string {
	const rejoin = "ask the edge's operator for a new join token and join into a new directory"
	if expired := c.cfg.Identity.Check(); expired != nil {
		return fmt.Sprintf("%v (valid until %s); check this host's clock, else %s",
			expired, c.cfg.Identity.NotAfter().UTC().Format(time.RFC3339), rejoin)
	}
	switch {
	case errors.Is(err, tunnel.ErrRevoked), errors.Is(err, &tunnel.SessionError{Reason: tunnel.CloseRevoked, Remote: true}):
		return "this connector was revoked; if that was a mistake, " + rejoin
	case errors.Is(err, tunnel.ErrUnknown):
		return "the edge does not know this connector; " + rejoin
	case errors.Is(err, tunnel.ErrNotAllowed):
		return "the edge does not admit this connector; ask its operator"
	case errors.Is(err, tunnel.ErrVersion):
		return "connector and edge speak different versions; update the older one"
	case errors.Is(err, &tunnel.SessionError{Reason: tunnel.CloseReplaced, Remote: true}):
		return "another process runs with the same identity; stop one of them, or let each join with a token of its own into a directory of its own"
	}
	return check.Remedy(err)
}

// reporter logs failures of one line: the first of its kind and then ever fewer, so that an outage of a day does not
// fill a disk. What a person must mend is counted over all lines instead; see refusals.
type reporter struct {
	last string
	n    int
}

func (r *reporter) report(l *line, err error, advice string) {
	// Some errors name the local port, which is another one each time.
	kind := strings.Map(func(c rune) rune {
		if '0' <= c && c <= '9' {
			return -1
		}
		return c
	}, err.Error()+advice)
	if kind != r.last {
		r.last, r.n = kind, 0
	}
	r.n++
	log := l.c.log.Debug
	switch {
	case advice != "":
		if l.c.refusals.aloud(l.e.name, advice) {
			log = l.c.log.Error
		}
	case r.n&(r.n-1) == 0:
		log = l.c.log.Warn
	}
	args := []any{"edge", l.e.name, "index", l.i, "failures", r.n, "err", err}
	if advice != "" {
		args = append(args, "remedy", advice)
	}
	log("no session to the edge, will try again", args...)
}
