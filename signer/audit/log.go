package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// Mode says what happens when a record cannot be kept.
type Mode string

// The modes.
const (
	// Required: no durable record, no signature. Commit waits until the record is on the disk.
	Required Mode = "required"
	// BestEffort: Commit never waits. Records that cannot be kept are counted, and a line in the log says how many.
	BestEffort Mode = "best-effort"
)

// Config is what a [Log] works with. The Log keeps no reference to it.
type Config struct {
	// Dir holds the files. It is made if it does not exist, with mode 0700. One process at a time may write to it.
	Dir string
	// Mode has no zero value.
	Mode Mode
	// Server is the server's identity. A log belongs to one server.
	Server string
	// Signer signs the checkpoints. It must not be nil.
	Signer CheckpointSigner
	// Checkpoint is the time between checkpoints while records come. If zero, 1 minute.
	Checkpoint time.Duration
	// RotateSize is the size in bytes above which the next file is begun. If zero, 64 MiB.
	RotateSize int64
	// RotateEvery is the age above which the next file is begun, if the present one has records. If zero, 24 hours.
	RotateEvery time.Duration
	// Queue bounds the records that wait for the writer. If zero, 8192. If it is full, Commit waits in the mode required, and the record is lost in the mode best-effort.
	Queue int
	// InProgress says how many operations are on their way to Commit; nil says none. While there are some, a write waits a little
	// for the records of others. It is called from many goroutines and must not block.
	InProgress func() int
	// Outputs get each line after it is durable here, as well as they can.
	Outputs []Output
	// Logger gets what operators should know; nil discards.
	Logger *slog.Logger

	disk disk // of tests; nil is the real one
}

// The defaults of a [Config].
const (
	DefaultCheckpoint  = time.Minute
	DefaultRotateSize  = 64 << 20
	DefaultRotateEvery = 24 * time.Hour
	DefaultQueue       = 8192
)

// maxServer bounds the server's identity, in bytes.
const maxServer = 512

// Check returns what is wrong with the configuration, without touching the disk; nil if nothing is.
func (c *Config) Check() error {
	switch {
	case c.Dir == "":
		return errors.New("audit: no directory is given")
	case c.Mode != Required && c.Mode != BestEffort:
		return fmt.Errorf("audit: mode %q; use %q or %q", c.Mode, Required, BestEffort)
	case c.Server == "" || len(c.Server) > maxServer || clean(c.Server) != c.Server:
		return fmt.Errorf("audit: server identity %q must be text of 1 to %d bytes", c.Server, maxServer)
	case c.Signer == nil:
		return errors.New("audit: no audit key is given, so that nobody could tell a forged log; give a key file or the name of a key")
	case c.Checkpoint < 0 || c.RotateEvery < 0 || c.RotateSize < 0 || c.Queue < 0:
		return errors.New("audit: checkpoint, rotate_every, rotate_size and queue must not be negative")
	}
	return nil
}

func (c *Config) fill() {
	if c.Checkpoint == 0 {
		c.Checkpoint = DefaultCheckpoint
	}
	if c.RotateSize == 0 {
		c.RotateSize = DefaultRotateSize
	}
	if c.RotateEvery == 0 {
		c.RotateEvery = DefaultRotateEvery
	}
	if c.Queue == 0 {
		c.Queue = DefaultQueue
	}
	if c.InProgress == nil {
		c.InProgress = func() int { return 0 }
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.disk == nil {
		c.disk = realDisk{}
	}
}

// Log is an audit log that is being written. It implements [signer.Auditor]. Make one with [Open]; all methods may be called from several goroutines at once.
type Log struct {
	mode   Mode
	queue  int
	logger *slog.Logger
	w      *writer

	fault  atomic.Pointer[fault] // nil while records can be kept
	wake   chan struct{}         // has one place; filled when the first record of a batch comes
	rotate chan chan error

	mu      sync.Mutex
	gather  *batch        // what comes in while the writer writes
	room    chan struct{} // closed when gather is taken; nil unless somebody waits for that
	lost    uint64        // records that had no place
	stopped bool

	stats struct {
		sync.Mutex
		Stats
	}
	inProgress func() int
}

// batch is a group of records that become durable together.
type batch struct {
	records []*signer.Record
	done    chan struct{} // closed when err is set
	err     error
}

func newBatch(records []*signer.Record) *batch {
	return &batch{records: records, done: make(chan struct{})}
}

// resolve wakes everybody who waits.
func (b *batch) resolve(err error) {
	b.err = err
	close(b.done)
}

// fault is why records cannot be kept.
type fault struct {
	err   error
	since time.Time
}

// ErrClosed is returned by Commit and Rotate after Run has ended.
var ErrClosed = errors.New("audit: the log is closed")

// Open takes the directory, looks at how the log in it ends, and begins a new file. It fails if another process has the directory, and if the
// log is another server's or was signed by another key. What Run may still mend, such as a full disk, and damage that needs an operator's consent
// is no error here; Ready says it. Run must be called, and Close after it.
func Open(ctx context.Context, c Config) (*Log, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	c.fill()
	l := &Log{
		mode: c.Mode, queue: c.Queue, logger: c.Logger,
		wake: make(chan struct{}, 1), rotate: make(chan chan error),
		gather: newBatch(nil), inProgress: c.InProgress,
	}
	w, err := start(ctx, l, c)
	if err != nil {
		return nil, err
	}
	l.w = w
	w.step(time.Now())
	return l, nil
}

// Ready implements [signer.Auditor]. In the mode best-effort it returns nil.
func (l *Log) Ready() error {
	if l.mode == BestEffort {
		return nil
	}
	if f := l.fault.Load(); f != nil {
		return f.err
	}
	return nil
}

// Fault returns why records cannot be kept now, in either mode; nil while they can.
func (l *Log) Fault() error {
	if f := l.fault.Load(); f != nil {
		return f.err
	}
	return nil
}

// Commit implements [signer.Auditor]. In the mode required it returns nil after the record is on the disk; a record that found a place in the queue is written even
// when ctx has ended or the disk is in trouble meanwhile, but then Commit returns an error. In the mode best-effort it never waits and returns nil.
func (l *Log) Commit(ctx context.Context, r *signer.Record) error {
	b, err := l.enqueue(ctx, r)
	if l.mode == BestEffort {
		return nil
	}
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return fmt.Errorf("audit: the record was not durable in time: %w", context.Cause(ctx))
	}
}

// enqueue puts the record into the batch that is gathered, waiting for room if the mode says so. On an error the record either is in the queue or counted as lost.
func (l *Log) enqueue(ctx context.Context, r *signer.Record) (*batch, error) {
	l.mu.Lock()
	for !l.stopped && len(l.gather.records) >= l.queue {
		f := l.fault.Load()
		if l.mode == BestEffort || f != nil || ctx.Err() != nil {
			l.lost++
			l.mu.Unlock()
			if f != nil {
				return nil, f.err
			}
			return nil, fmt.Errorf("audit: the queue of %d records is full", l.queue)
		}
		if l.room == nil {
			l.room = make(chan struct{})
		}
		room := l.room
		l.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
		}
		l.mu.Lock()
	}
	if l.stopped {
		l.mu.Unlock()
		return nil, ErrClosed
	}
	b := l.gather
	b.records = append(b.records, r)
	first := len(b.records) == 1
	f := l.fault.Load()
	l.mu.Unlock()
	if first || l.inProgress() == 0 {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
	if f != nil {
		return nil, f.err
	}
	return b, nil
}

// take hands the gathered batch to the writer, with the number of records lost so far, and gathers anew into spare.
func (l *Log) take(spare []*signer.Record) (*batch, uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.gather.records) == 0 {
		return nil, l.lost
	}
	b := l.gather
	l.gather = newBatch(spare)
	l.makeRoomLocked()
	return b, l.lost
}

func (l *Log) makeRoomLocked() {
	if l.room != nil {
		close(l.room)
		l.room = nil
	}
}

// broken makes Ready and Commit return err, and wakes those who wait. What they wait for stays in the queue.
func (l *Log) broken(err error, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	since := now
	if f := l.fault.Load(); f != nil {
		since = f.since
	}
	l.fault.Store(&fault{err, since})
	waiting := l.gather
	l.gather = newBatch(waiting.records)
	waiting.records = nil
	waiting.resolve(err)
	l.makeRoomLocked()
}

// Rotate begins the next file. It returns after that, or with the reason why not.
func (l *Log) Rotate(ctx context.Context) error {
	reply := make(chan error, 1)
	select {
	case l.rotate <- reply:
		return <-reply
	case <-l.w.ended:
		return ErrClosed
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Close lets the directory go. Run, if it was called, must have returned. Close is idempotent.
func (l *Log) Close() error { return l.w.close() }

// Stats is how a [Log] is doing.
type Stats struct {
	Records        uint64        // kept
	Batches        uint64        // writes that were made durable; Records/Batches is what group commit saves
	Bytes          uint64        // written
	Lost           uint64        // records that had no place
	Waiting        int           // records in the queue
	Files          uint64        // begun
	File           string        // the present one
	Seq            uint64        // of the last durable line
	Covered        uint64        // seq up to which a checkpoint of this process covers the log
	Checkpoints    uint64        // written
	LastCheckpoint time.Time     // zero if none was written yet
	CheckpointErr  string        // why the last try failed; "" if it did not
	Fault          string        // why records cannot be kept; "" if they can
	FaultSince     time.Time     // zero if they can
	Faults         uint64        // writes that failed
	SyncLast       time.Duration // of the last fdatasync
	SyncTotal      time.Duration // of all; divided by Batches it is the mean
	SyncMax        time.Duration
	Outputs        []OutputStats
}

// Stats returns how the log is doing.
func (l *Log) Stats() Stats {
	l.stats.Lock()
	s := l.stats.Stats
	l.stats.Unlock()
	l.mu.Lock()
	s.Lost, s.Waiting = l.lost, s.Waiting+len(l.gather.records)
	l.mu.Unlock()
	if f := l.fault.Load(); f != nil {
		s.Fault, s.FaultSince = f.err.Error(), f.since
	}
	for _, o := range l.w.outputs {
		s.Outputs = append(s.Outputs, o.stats())
	}
	return s
}

// count changes the statistics.
func (l *Log) count(f func(*Stats)) {
	l.stats.Lock()
	defer l.stats.Unlock()
	f(&l.stats.Stats)
}
