package main

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

const (
	// refusalWindow is the time that the limits below are for.
	refusalWindow = time.Minute
	// strangerLines is how many refused strangers are logged in one window; all of them share it.
	strangerLines = 10
	// maxWindows bounds what has a limit of its own.
	maxWindows = 256
)

// refusals logs who is refused a connection. A client that the authority has named is logged once in a window for each reason; all
// others share a few lines, so that strangers neither flood the log nor crowd a client out of it.
type refusals struct {
	logger *slog.Logger

	mu        sync.Mutex // guards the rest
	clients   windows
	strangers window
}

// A window counts lines in a span of time.
type window struct {
	start     time.Time
	lines     int
	left, was int // out of the log: in this span, and since the last line before it
}

// take reports whether another line may be logged, and how many were left out since the last one.
func (w *window) take(now time.Time, limit int) (ok bool, leftOut int) {
	if now.Sub(w.start) >= refusalWindow {
		w.start, w.lines, w.was, w.left = now, 0, w.was+w.left, 0
	}
	if w.lines >= limit {
		w.left++
		return false, 0
	}
	w.lines++
	leftOut, w.was = w.was, 0
	return true, leftOut
}

// windows are those of several things that lines are about.
type windows map[string]*window

// of returns the window of a thing, or nil if there are too many things.
func (ws windows) of(thing string, now time.Time) *window {
	w := ws[thing]
	if w == nil && len(ws) >= maxWindows {
		maps.DeleteFunc(ws, func(_ string, w *window) bool { return now.Sub(w.start) >= refusalWindow })
	}
	if w == nil && len(ws) < maxWindows {
		w = new(window)
		ws[thing] = w
	}
	return w
}

func newRefusals(l *slog.Logger) *refusals {
	return &refusals{logger: l, clients: windows{}}
}

// refused logs a connection that was refused. The identity is what the certificate says; that the peer has the key of it was not
// always proved yet.
func (r *refusals) refused(addr net.Addr, state tls.ConnectionState, err error) {
	named := errors.Is(err, mtls.ErrRefused) || errors.Is(err, mtls.ErrRevoked) // by an authority that is verified
	args := []any{"conn", addr.String()}
	if len(state.PeerCertificates) > 0 {
		if id, idErr := mtls.IdentityOf(state.PeerCertificates[0]); idErr == nil {
			key := "claimed"
			if named {
				key = "peer"
			}
			args = append(args, key, id.String())
		}
	}
	args = append(args, "err", err)
	level := slog.LevelWarn
	switch {
	case left(err):
		level = slog.LevelDebug
	default:
		ok, leftOut := r.take(named, err.Error())
		if !ok {
			level = slog.LevelDebug
		} else if leftOut > 0 {
			args = append(args, "left_out", leftOut)
		}
	}
	r.logger.Log(context.Background(), level, "connection refused", args...)
}

// left reports whether it was the peer that ended the handshake, without a word: port scans and health checks do that.
func left(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func (r *refusals) take(named bool, reason string) (ok bool, leftOut int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if !named {
		return r.strangers.take(now, strangerLines)
	}
	if w := r.clients.of(reason, now); w != nil {
		return w.take(now, 1)
	}
	return r.strangers.take(now, strangerLines)
}
