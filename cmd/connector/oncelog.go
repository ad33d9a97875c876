package main

import (
	"context"
	"log/slog"
	"sync"
)

// A onceLog passes what an edge's refusal needs of a person on once, and for the other sessions to that edge, which hear
// the same, for debugging only. When a session to the edge has come up, the next refusal is news again.
type onceLog struct {
	slog.Handler
	told *told
}

type told struct {
	mu    sync.Mutex // guards edges
	edges map[string]map[string]bool
}

// once makes a logger of the connector pass refusals on once.
func once(l *slog.Logger) *slog.Logger {
	return slog.New(onceLog{l.Handler(), &told{edges: map[string]map[string]bool{}}})
}

// sessionUp is the message with which the connector says that it has a session.
const sessionUp = "session up"

func (o onceLog) Handle(ctx context.Context, r slog.Record) error {
	var edge, remedy string
	r.Attrs(func(a slog.Attr) bool {
		switch a.Key {
		case "edge":
			edge = a.Value.String()
		case "remedy":
			remedy = a.Value.String()
		}
		return true
	})
	if r.Message == sessionUp {
		o.told.forget(edge)
	}
	if r.Level == slog.LevelError && remedy != "" && !o.told.first(edge, remedy) {
		if r.Level = slog.LevelDebug; !o.Handler.Enabled(ctx, r.Level) {
			return nil
		}
	}
	return o.Handler.Handle(ctx, r)
}

func (o onceLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	o.Handler = o.Handler.WithAttrs(attrs)
	return o
}

func (o onceLog) WithGroup(name string) slog.Handler {
	o.Handler = o.Handler.WithGroup(name)
	return o
}

func (t *told) forget(edge string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.edges, edge)
}

// first reports whether the remedy was not told for this edge yet, and remembers it.
func (t *told) first(edge, remedy string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.edges[edge] == nil {
		t.edges[edge] = map[string]bool{}
	}
	if t.edges[edge][remedy] {
		return false
	}
	t.edges[edge][remedy] = true
	return true
}
