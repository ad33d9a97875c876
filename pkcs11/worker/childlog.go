package worker

import (
	"context"
	"log/slog"
)

// logger returns a logger whose records go to the pool.
func (s *server) logger() *slog.Logger { return slog.New(&logHandler{out: s.out}) }

// logHandler sends records to the pool. Groups are written as prefixes.
type logHandler struct {
	out   *frameWriter
	attrs [][2]string
	group string
}

// Enabled implements [slog.Handler]: the pool's logger decides about the rest.
func (h *logHandler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo
}

// Handle implements [slog.Handler].
func (h *logHandler) Handle(_ context.Context, r slog.Record) error {
	out := logRecord{Level: r.Level, Message: cut(r.Message), Attrs: h.attrs[:len(h.attrs):len(h.attrs)]}
	r.Attrs(func(a slog.Attr) bool {
		out.Attrs = h.append(out.Attrs, a)
		return true
	})
	h.out.spareable(frameLog, encodeJSON(out))
	return nil
}

func (h *logHandler) append(attrs [][2]string, a slog.Attr) [][2]string {
	if len(attrs) == maxLogAttrs {
		return attrs
	}
	return append(attrs, [2]string{h.group + a.Key, cut(a.Value.Resolve().String())})
}

// WithAttrs implements [slog.Handler].
func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	next := *h
	next.attrs = h.attrs[:len(h.attrs):len(h.attrs)]
	for _, a := range attrs {
		next.attrs = next.append(next.attrs, a)
	}
	return &next
}

// WithGroup implements [slog.Handler].
func (h *logHandler) WithGroup(name string) slog.Handler {
	next := *h
	next.group += name + "."
	return &next
}

func cut(text string) string {
	if len(text) > maxLogText {
		return text[:maxLogText]
	}
	return text
}
