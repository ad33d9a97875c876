package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// recordQueue is how many operations may wait to be logged: some seconds' worth at full load, and few megabytes.
const recordQueue = 16 << 10

// failureLines is how many operations of one client, refused or failed for one cause, are logged in a refusalWindow while the audit log keeps them.
const failureLines = 60

// An operationLog has a line in the program's log for each operation: on level warn for those that were refused or failed, info for the others.
// While the audit log keeps them, a second record of each would cost more than it tells: then those that succeed are logged on level debug, and so
// are those of a client that are refused or fail by the thousand, but for the first ones.
type operationLog struct {
	queue   *signer.Queue // before the log; whoever runs it writes the lines
	logger  *slog.Logger
	audited func() bool
}

func newOperationLog(logger *slog.Logger, audited func() bool) *operationLog {
	l := &operationLog{logger: logger, audited: audited}
	l.queue = signer.NewQueue(&leveled{log: l, all: signer.LogRecorder(logger), low: signer.LogRecorder(slog.New(lowered{logger.Handler()})), failures: windows{}}, recordQueue)
	return l
}

// low reports whether the operation's line is one of level debug.
func (l *operationLog) low(r *signer.Record) bool { return r.Result == signer.ResultOK && l.audited() }

// Record implements signer.Recorder. What would not be logged does not take a place in the queue.
func (l *operationLog) Record(r signer.Record) {
	if l.low(&r) && !l.logger.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	l.queue.Record(r)
}

// leveled hands records to one recorder or the other. The queue gives it one after the other.
type leveled struct {
	log      *operationLog
	all, low signer.Recorder
	failures windows // by client and cause
	others   window  // of further ones
}

// Record implements signer.Recorder.
func (l *leveled) Record(r signer.Record) {
	switch {
	case l.log.low(&r):
		l.low.Record(r)
	case r.Result == signer.ResultOK || !l.log.audited():
		l.all.Record(r)
	default:
		now := time.Now()
		w := l.failures.of(r.Peer+" "+string(r.Cause), now)
		if w == nil {
			w = &l.others
		}
		switch ok, leftOut := w.take(now, failureLines); {
		case !ok:
			l.low.Record(r)
		case leftOut > 0:
			signer.LogRecorder(l.log.logger.With("left_out", leftOut)).Record(r)
		default:
			l.all.Record(r)
		}
	}
}

// lowered is a handler that takes every line as one of level debug.
type lowered struct{ slog.Handler }

// Enabled implements slog.Handler.
func (h lowered) Enabled(ctx context.Context, _ slog.Level) bool {
	return h.Handler.Enabled(ctx, slog.LevelDebug)
}

// Handle implements slog.Handler.
func (h lowered) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return h.Handler.Handle(ctx, r)
}
