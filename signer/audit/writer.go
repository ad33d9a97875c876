package audit

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// maxWrite is the size above which a batch is written in several parts, in bytes.
const maxWrite = 4 << 20

// The pauses between tries while the disk is in trouble.
const (
	minRetry = 100 * time.Millisecond
	maxRetry = time.Second
)

// writer is the one that writes. Its fields belong to the goroutine of Open, and then of Run.
type writer struct {
	l        *Log
	c        Config
	lock     *os.File
	sealer   *sealer
	outputs  []*outputQueue
	ended    chan struct{} // closed when Run returns
	closing  sync.Once
	closeErr error
	check    checkpointer

	// The log so far.
	id   ID
	key  Hash   // id of the audit key; zero until it is known
	seq  uint64 // of the last line; after damage possibly beyond
	good uint64 // seq of the last durable line that is right
	head Hash   // its chain

	// The file.
	f         file   // nil: the next one must be begun
	name      string // of the file that holds the last durable line; "" if there is none
	number    int
	attempted int // number of the file that was begun in vain
	size      int64
	opened    time.Time
	records   uint64

	// What the next file's first lines must tell.
	gap       Note   // what was given up at the end of the file before
	damage    string // see Opening.Damage
	damaged   error  // waits for consent; see usable
	consented bool

	// What is being written. seqs and chains are tentative until the write is durable.
	buf      []byte
	nextSeq  uint64
	nextHead Hash
	batch    *batch           // whose committers wait
	pending  []*signer.Record // to be written
	kept     int              // how many of pending were written
	told     uint64           // lost records that the log tells of
	lost     uint64

	lastWrite time.Time     // of operations
	pace      time.Duration // the least time between writes while operations are in progress

	retry   time.Duration // 0: nothing is wrong
	retryAt time.Time
}

// Run writes until ctx ends and then what is left. It returns after the last record is durable, or says how many are not. It is called once.
func (l *Log) Run(ctx context.Context) error {
	w := l.w
	defer close(w.ended)
	var check sync.WaitGroup
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	for _, o := range w.outputs {
		go o.run(background)
	}
	checking, stopCheck := context.WithCancel(background)
	check.Go(func() { w.check.run(checking) })
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-l.wake:
			w.gather(ctx)
		case <-timer.C:
		case r := <-w.check.results:
			w.signed(r, time.Now())
		case reply := <-l.rotate:
			reply <- w.rotateNow(time.Now())
		}
		now := time.Now()
		w.step(now)
		w.requestCheckpoint(now)
		timer.Reset(w.idle(now))
	}
	stopCheck()
	check.Wait()
	err := w.finish(context.WithoutCancel(ctx))
	stop()
	w.awaitOutputs()
	return err
}

// idle returns how long nothing is to be done unless records come.
func (w *writer) idle(now time.Time) time.Duration {
	next := now.Add(time.Hour)
	sooner := func(t time.Time) {
		if t.Before(next) {
			next = t
		}
	}
	if w.retry > 0 {
		sooner(w.retryAt)
	}
	if w.f != nil && w.records > 0 {
		sooner(w.opened.Add(w.c.RotateEvery))
	}
	if at, due := w.check.due(w.c.Checkpoint); due && w.retry == 0 {
		sooner(at)
	}
	return max(next.Sub(now), time.Millisecond)
}

// step does what there is to do, unless an earlier failure says to wait.
func (w *writer) step(now time.Time) error {
	if w.retry > 0 && now.Before(w.retryAt) {
		return w.l.Fault()
	}
	err := w.work(now)
	if err != nil {
		w.failed(err, now)
	} else {
		w.succeeded(now)
	}
	return err
}

func (w *writer) work(now time.Time) error {
	if err := w.usable(now); err != nil {
		return err
	}
	if why := w.rotationDue(now); why != "" {
		if err := w.rotate(why, now); err != nil {
			return err
		}
	}
	if w.kept == len(w.pending) {
		w.take()
	}
	w.begin()
	for _, r := range w.pending[w.kept:] {
		w.addOp(r)
		if len(w.buf) >= maxWrite {
			if err := w.writeOps(); err != nil {
				return err
			}
		}
	}
	lost := w.lost
	if lost > w.told {
		w.add(&Line{Kind: KindLost, Time: now, Note: Note{Count: lost - w.told,
			Text: "records that found no place while the writer was behind or could not write"}})
	}
	c := w.check.take(w.good)
	if c != nil {
		w.add(c)
	}
	if len(w.buf) > 0 {
		if err := w.writeOps(); err != nil {
			w.check.giveBack(c)
			return err
		}
		w.told = lost
		w.checkpointKept(c)
	}
	if w.batch != nil {
		w.batch.resolve(nil)
		w.batch = nil
	}
	return nil
}

// take takes the gathered batch over.
func (w *writer) take() {
	if len(w.pending) > 1 {
		runtime.Gosched() // those who were just woken may have something for this batch
	}
	clear(w.pending)
	spare := w.pending[:0]
	w.batch, w.lost = w.l.take(spare)
	w.pending, w.kept = spare, 0
	if w.batch != nil {
		w.pending = w.batch.records
	}
}

// begin starts anew to put lines together.
func (w *writer) begin() {
	w.buf, w.nextSeq, w.nextHead = w.buf[:0], w.seq, w.head
}

func (w *writer) add(l *Line) {
	w.nextSeq++
	l.Seq = w.nextSeq
	start := len(w.buf)
	w.buf = l.appendBody(w.buf)
	w.buf, w.nextHead = w.sealer.seal(w.buf, start, &w.nextHead)
	l.Chain = w.nextHead
}

func (w *writer) addOp(r *signer.Record) {
	w.nextSeq++
	start := len(w.buf)
	w.buf = appendOp(w.buf, w.nextSeq, r)
	w.buf, w.nextHead = w.sealer.seal(w.buf, start, &w.nextHead)
}

// writeOps writes the lines, among which are operations, and counts those as kept.
func (w *writer) writeOps() error {
	before := w.seq
	if err := w.write(); err != nil {
		return err
	}
	ops := min(int(w.seq-before), len(w.pending)-w.kept) // the operations come first
	var total time.Duration
	for _, r := range w.pending[w.kept : w.kept+ops] {
		total += r.Duration
	}
	w.paced(ops, total)
	w.kept += ops
	w.records += uint64(ops)
	w.check.ops += uint64(ops)
	waiting := len(w.pending) - w.kept
	w.l.count(func(s *Stats) {
		s.Records += uint64(ops)
		s.Waiting = waiting
	})
	w.begin()
	return nil
}

// write appends the lines to the file and makes them durable. On an error none of them counts.
func (w *writer) write() error {
	n, err := w.f.Write(w.buf)
	if err != nil {
		if n > 0 && w.f.Truncate(w.size) != nil {
			w.giveUp(n, "a write failed and what it left could not be cut off: "+err.Error())
		}
		return w.diskError(err)
	}
	start := time.Now()
	if err := w.f.datasync(); err != nil {
		// What is on the disk is unknown now, and a second fdatasync would not tell. The cut is for readers only.
		_ = w.f.Truncate(w.size)
		w.giveUp(n, "what was written could not be made durable: "+err.Error())
		return w.diskError(err)
	}
	w.durable(n, time.Since(start))
	return nil
}

// durable takes it that the first n bytes of buf, which are all, are on the disk.
func (w *writer) durable(n int, took time.Duration) {
	w.size += int64(n)
	w.seq, w.good, w.head = w.nextSeq, w.nextSeq, w.nextHead
	if len(w.outputs) > 0 {
		chunk := bytes.Clone(w.buf)
		for _, o := range w.outputs {
			o.offer(chunk)
		}
	}
	seq := w.seq
	w.l.count(func(s *Stats) {
		s.Batches++
		s.Bytes += uint64(n)
		s.Seq = seq
		s.SyncLast = took
		s.SyncTotal += took
		s.SyncMax = max(s.SyncMax, took)
	})
}

// giveUp leaves the file, at whose end n bytes of buf may stand that do not count.
func (w *writer) giveUp(n int, why string) {
	w.gap = Note{File: w.name, Bytes: uint64(n), SHA256: sha256.Sum256(w.buf[:n]), Text: why}
	w.leave()
}

// leave closes the file; the next one must be begun.
func (w *writer) leave() {
	if w.f == nil {
		return
	}
	if err := w.f.Close(); err != nil { // all that counts in it is durable
		w.l.logger.Warn("audit file did not close well", "file", w.name, "err", err)
	}
	w.f = nil
}

func (w *writer) path() string { return filepath.Join(w.c.Dir, w.name) }

func (w *writer) diskError(err error) error {
	var p *os.PathError
	if !errors.As(err, &p) {
		err = &os.PathError{Op: "write", Path: w.path(), Err: err}
	}
	return fmt.Errorf("audit: no record can be kept: %w; %s", err, remedy(err))
}

// create begins the next file. Its first line is durable when it returns nil.
func (w *writer) create(now time.Time) error {
	number := w.number + 1
	name := fileName(number)
	path := filepath.Join(w.c.Dir, name)
	if fileNumber(name) != number {
		return fmt.Errorf("audit: no record can be kept: %s would be a file that nobody looks for; move away the file before it, which this server did not make", path)
	}
	if err := w.locked(); err != nil {
		return err
	}
	f, err := w.c.disk.create(path, w.attempted == number)
	if err != nil {
		return w.diskError(err)
	}
	w.attempted = number
	if w.key == (Hash{}) {
		w.key = w.check.keyID()
	}
	w.begin()
	w.add(&Line{Kind: KindOpen, Time: now, Open: Opening{
		Version: Version, Log: w.id, Server: w.c.Server, Key: w.key, PrevFile: w.name, PrevSeq: w.good, PrevHead: w.head,
		Abandoned: w.gap.Bytes, Damage: w.damage,
	}})
	if w.gap.Bytes > 0 {
		w.add(&Line{Kind: KindRecovered, Time: now, Note: w.gap})
	}
	n, err := f.Write(w.buf)
	if err == nil {
		err = f.datasync()
	}
	if err == nil {
		err = w.c.disk.syncDir(w.c.Dir)
	}
	if err != nil {
		return errors.Join(w.diskError(err), f.Close())
	}
	w.f, w.name, w.number, w.size, w.opened, w.records = f, name, number, 0, now, 0
	w.durable(n, 0)
	w.l.logger.Info("audit file begun", "file", path, "seq", w.seq)
	if w.damage != "" {
		w.l.logger.Error("audit log goes on after damage; the damaged files stay as evidence", "file", path, "err", w.damage)
	}
	if w.consented {
		if err := os.Remove(filepath.Join(w.c.Dir, repairFile)); err != nil {
			w.l.logger.Warn("request to repair the audit log could not be removed", "err", err)
		}
	}
	w.gap, w.damage, w.consented, w.check.forced = Note{}, "", false, true
	w.l.count(func(s *Stats) {
		s.Files++
		s.File = name
	})
	return nil
}

// locked sees to it that the directory is still this process's alone, though somebody may have removed the lock.
func (w *writer) locked() error {
	path := filepath.Join(w.c.Dir, lockFile)
	have, err := w.lock.Stat()
	if err == nil {
		if there, lerr := os.Lstat(path); lerr == nil && os.SameFile(have, there) {
			return nil
		}
	}
	held, err := lock(path, true)
	if err != nil {
		return w.diskError(err)
	}
	w.l.logger.Warn("audit lock was removed while the server ran, and is made anew", "file", path)
	_ = w.lock.Close() // nobody can see it any more
	w.lock = held
	return nil
}

func (w *writer) rotationDue(now time.Time) string {
	switch {
	case w.records == 0:
		return ""
	case w.size >= w.c.RotateSize:
		return "size"
	case now.Sub(w.opened) >= w.c.RotateEvery:
		return "time"
	}
	return ""
}

// rotate ends the file and begins the next one.
func (w *writer) rotate(why string, now time.Time) error {
	w.begin()
	w.add(&Line{Kind: KindClose, Time: now, Note: Note{Text: why}})
	if err := w.write(); err != nil {
		return err
	}
	w.leave()
	return w.create(now)
}

// rotateNow is for Rotate.
func (w *writer) rotateNow(now time.Time) error {
	w.retry = 0
	if err := w.step(now); err != nil {
		return err
	}
	err := w.rotate("request", now)
	if err != nil {
		w.failed(err, now)
	}
	return err
}

// failed tells everybody who waits, keeps what they wait for, and sets the time of the next try.
func (w *writer) failed(err error, now time.Time) {
	err = advised(err)
	if before := w.l.Fault(); before == nil || before.Error() != err.Error() {
		w.l.logger.Error("audit log cannot be written", "err", err, "mode", string(w.c.Mode))
	}
	w.retry = min(max(2*w.retry, minRetry), maxRetry)
	w.retryAt = now.Add(w.retry)
	w.l.broken(err, now) // first, so that whoever is woken finds it
	if w.batch != nil {
		w.batch.resolve(err)
		w.batch = nil
	}
	w.l.count(func(s *Stats) { s.Faults++ })
}

func (w *writer) succeeded(now time.Time) {
	w.retry = 0
	if w.l.fault.Load() == nil {
		return
	}
	if f := w.l.fault.Swap(nil); f != nil {
		w.l.logger.Info("audit log can be written again", "dur", now.Sub(f.since))
	}
	select {
	case w.l.wake <- struct{}{}: // for what was gathered meanwhile
	default:
	}
}

// finish writes what is left, ends the file and signs the last checkpoint.
func (w *writer) finish(ctx context.Context) error {
	w.l.mu.Lock()
	w.l.stopped = true
	w.l.makeRoomLocked()
	w.l.mu.Unlock()
	defer w.leave()
	for {
		w.retry = 0
		err := w.step(time.Now())
		left := w.left()
		if err != nil {
			if left == 0 {
				return err
			}
			return fmt.Errorf("%d records were not kept: %w", left, err)
		}
		if left == 0 {
			break
		}
	}
	now := time.Now()
	w.begin()
	w.add(&Line{Kind: KindClose, Time: now, Note: Note{Text: "end"}})
	if err := w.write(); err != nil {
		return err
	}
	r := w.check.sign(ctx, w.statement(now))
	if r.err != nil {
		w.signed(r, now)
		return nil // the log is whole; that it is not signed was logged
	}
	w.begin()
	w.add(&r.line)
	if err := w.write(); err != nil {
		return err
	}
	w.checkpointKept(&r.line)
	w.check.drain()
	return nil
}

// left counts the records that are not written.
func (w *writer) left() int {
	w.l.mu.Lock()
	defer w.l.mu.Unlock()
	return len(w.l.gather.records) + len(w.pending) - w.kept
}

// close lets the directory and the outputs go, once.
func (w *writer) close() error {
	w.closing.Do(func() {
		w.leave()
		for _, o := range w.outputs {
			w.closeErr = errors.Join(w.closeErr, w.closeOutput(o))
		}
		w.closeErr = errors.Join(w.closeErr, w.lock.Close())
	})
	return w.closeErr
}
