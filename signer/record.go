package signer

import (
	"context"
	"log/slog"
	"net/netip"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// Result is how an operation ended.
type Result string

// The results of an operation.
const (
	ResultOK      Result = "ok"
	ResultRefused Result = "refused" // the request was not allowed or not well-formed; no key was used
	ResultFailed  Result = "failed"  // the request was right and the key's home could not serve it
)

// Record is what is kept of one operation. It never holds what was signed, decrypted or sealed.
type Record struct {
	Time     time.Time // when the request was taken up
	Duration time.Duration
	Peer     string // the client's identity
	Op       string // an [Op] word, or the opcode's name if it is none
	Scheme   string // as [Algorithm.String]; "" without a signature
	SKI      keyless.SKI
	Label    string // of the key, if it was found
	Home     string // of the key, if it was found; the first if it has several
	SNI      string // what the client says the visitor asked for
	ClientIP netip.Addr
	Result   Result
	Reason   string // why it was refused or failed; "" if ok
}

// Recorder keeps records. Record is called once for each operation, from many goroutines at once, before the reply is sent.
type Recorder interface {
	Record(Record)
}

// Recorders hands each record to all of its members in order.
type Recorders []Recorder

// Record implements [Recorder].
func (rs Recorders) Record(r Record) {
	for _, x := range rs {
		x.Record(r)
	}
}

// LogRecorder returns a Recorder that writes one line for each record to the logger, on level info if the result is ok and warn otherwise. A
// nil logger discards.
func LogRecorder(l *slog.Logger) Recorder {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	return logRecorder{l}
}

type logRecorder struct{ l *slog.Logger }

func (lr logRecorder) Record(r Record) {
	level := slog.LevelInfo
	if r.Result != ResultOK {
		level = slog.LevelWarn
	}
	ctx := context.Background()
	if !lr.l.Enabled(ctx, level) {
		return
	}
	attrs := make([]slog.Attr, 0, 11)
	attrs = append(attrs, slog.String("peer", r.Peer), slog.String("op", r.Op))
	text := func(key, value string) {
		if value != "" {
			attrs = append(attrs, slog.String(key, value))
		}
	}
	text("scheme", r.Scheme)
	if !r.SKI.IsZero() {
		attrs = append(attrs, slog.String("key_ski", r.SKI.String()))
	}
	text("label", r.Label)
	text("home", r.Home)
	text("sni", r.SNI)
	if r.ClientIP.IsValid() {
		attrs = append(attrs, slog.String("visitor", r.ClientIP.String()))
	}
	text("result", string(r.Result))
	text("reason", r.Reason)
	attrs = append(attrs, slog.Duration("dur", r.Duration))
	line := slog.NewRecord(r.Time.Add(r.Duration), level, "operation", 0) // the record may have waited in a Queue
	line.AddAttrs(attrs...)
	_ = lr.l.Handler().Handle(ctx, line) // as a Logger does: there is nowhere to tell of a log that fails
}
