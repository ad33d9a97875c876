package main

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/signer"
)

// plain returns err with a text for people: where wrapping has put "pkcs11: " into it several times, the first is enough.
// Nil stays nil.
func plain(err error) error {
	if err == nil {
		return nil
	}
	return plainError{err}
}

type plainError struct{ err error }

func (e plainError) Error() string { return plainText(e.err.Error()) }
func (e plainError) Unwrap() error { return e.err }

func plainText(text string) string {
	const prefix = "pkcs11: "
	before, after, found := strings.Cut(text, prefix)
	if !found {
		return text
	}
	return before + prefix + strings.ReplaceAll(after, prefix, "")
}

// plainReasons is a Recorder that makes reasons plain on their way to the next.
type plainReasons struct{ signer.Recorder }

func (p plainReasons) Record(r signer.Record) {
	r.Reason = plainText(r.Reason)
	p.Recorder.Record(r)
}

// A tokenLog is what a token's logger writes to.
type tokenLog struct {
	slog.Handler
	quiet *atomic.Bool // while set, the caller gets a refusal of the PIN as an error and tells of it
	info  slog.Level   // what slog.LevelInfo is turned into
}

// tokenLogger returns a logger for a token, and the switch that keeps refusals of the PIN out of it.
func tokenLogger(l *slog.Logger, info slog.Level) (*slog.Logger, *atomic.Bool) {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	quiet := new(atomic.Bool)
	return slog.New(tokenLog{l.Handler(), quiet, info}), quiet
}

func (t tokenLog) level(l slog.Level) slog.Level {
	if l == slog.LevelInfo {
		return t.info
	}
	return l
}

func (t tokenLog) Enabled(ctx context.Context, l slog.Level) bool {
	return t.Handler.Enabled(ctx, t.level(l))
}

func (t tokenLog) Handle(ctx context.Context, r slog.Record) error {
	out := slog.NewRecord(r.Time, t.level(r.Level), r.Message, r.PC)
	refusal := false
	r.Attrs(func(a slog.Attr) bool {
		if err, ok := a.Value.Any().(error); ok {
			refusal = refusal || refusesPIN(err)
			a.Value = slog.AnyValue(plain(err))
		}
		out.AddAttrs(a)
		return true
	})
	if refusal && t.quiet.Load() {
		return nil
	}
	return t.Handler.Handle(ctx, out)
}

func (t tokenLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	t.Handler = t.Handler.WithAttrs(attrs)
	return t
}

func (t tokenLog) WithGroup(name string) slog.Handler {
	t.Handler = t.Handler.WithGroup(name)
	return t
}
