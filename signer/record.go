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
	ResultFailed  Result = "failed"  // the request was right and the key's home could not serve it, or its result was kept back
)

// Record is what is kept of one operation. It never holds what was signed, decrypted or sealed, only its hash.
type Record struct {
	Time     time.Time // when the request was taken up
	Duration time.Duration
	Peer     string // the client's identity
	Op       string // an [Op] word, or the opcode's name if it is none
	Scheme   string // as [Algorithm.String]; "" without a signature
	SKI      keyless.SKI
	Label    string         // of the key, if it was found
	SNI      string         // what the client says the visitor asked for
	ClientIP netip.Addr     // the visitor, as the client says
	ServerIP netip.Addr     // the address that the visitor reached, as the client says
	Addr     netip.AddrPort // where the client's connection comes from
	// Hash is SHA-256 of exactly what was asked to be signed or decrypted: the message for tls-sign, the payload otherwise.
	Hash      [32]byte
	Home      string        // where the operation was done, or was tried last; "" if no home was asked
	Waited    time.Duration // for a place in the home
	Took      time.Duration // in the home
	Tries     int           // homes and repetitions
	Hedged    bool          // a second home was asked because the first was slow
	TraceID   string        // of the client's trace, 32 hex digits; "" without one
	RequestID string        // what the client calls the request, at most 128 printable characters
	Result    Result
	Reason    string // why it was refused or failed; "" if ok
	Cause     Cause  // the same as one of a fixed list; "" if ok

	client string // Peer, if the policy has a rule for it
	key    *Entry // if the key was found
}

// An Auditor keeps the records that must not be lost. All methods may be called from several goroutines at once.
type Auditor interface {
	// Ready reports whether a record could be kept now. It is asked before a key is used, and must not block.
	Ready() error
	// Commit returns when r is kept as durably as the auditor was told to, and owns r from then on. On an error the operation's result is withheld from
	// the client. ctx bounds the waiting, not the keeping: an operation that a key has done is recorded whatever became of its client.
	Commit(ctx context.Context, r *Record) error
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
	attrs := make([]slog.Attr, 0, 18)
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
	if r.Addr.IsValid() {
		attrs = append(attrs, slog.String("addr", r.Addr.String()))
	}
	text("trace_id", r.TraceID)
	text("request_id", r.RequestID)
	if r.Tries > 1 {
		attrs = append(attrs, slog.Int("tries", r.Tries))
	}
	if r.Hedged {
		attrs = append(attrs, slog.Bool("hedged", true))
	}
	if r.Waited > 0 {
		attrs = append(attrs, slog.Duration("waited", r.Waited))
	}
	text("result", string(r.Result))
	text("reason", r.Reason)
	attrs = append(attrs, slog.Duration("dur", r.Duration))
	line := slog.NewRecord(r.Time.Add(r.Duration), level, "operation", 0) // the record may have waited in a Queue
	line.AddAttrs(attrs...)
	_ = lr.l.Handler().Handle(ctx, line) // as a Logger does: there is nowhere to tell of a log that fails
}
