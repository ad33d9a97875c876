package main

import (
	"context"
	"log/slog"

	"github.com/keyhaven/keyhaven/signer"
)

// recordQueue is how many operations may wait to be logged: some seconds' worth at full load, and few megabytes.
const recordQueue = 16 << 10

// An operationLog has a line in the program's log for each operation: on level warn for those that were refused or failed, info for the others, and
// debug for these while the audit log keeps them, as a second record of each would cost more than it tells.
type operationLog struct {
	queue   *signer.Queue // before the log; whoever runs it writes the lines
	logger  *slog.Logger
	audited func() bool
}

func newOperationLog(logger *slog.Logger, audited func() bool) *operationLog {
	l := &operationLog{logger: logger, audited: audited}
	l.queue = signer.NewQueue(leveled{l, signer.LogRecorder(logger), signer.LogRecorder(slog.New(lowered{logger.Handler()}))}, recordQueue)
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

// leveled hands records to one recorder or the other.
type leveled struct {
	log      *operationLog
	all, low signer.Recorder
}

// Record implements signer.Recorder.
func (l leveled) Record(r signer.Record) {
	if l.log.low(&r) {
		l.low.Record(r)
		return
	}
	l.all.Record(r)
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
