package worker

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// send hands an operation to the worker, with the key's description if the worker does not have it yet. It is false if the
// worker takes nothing any more. It does not wait.
func (w *proc) send(o *op, r *request) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead || w.quitting || len(w.pending) >= maxInFlight {
		return false
	}
	if len(w.pending) == 0 {
		w.busy = sinceStart()
	}
	if w.last++; w.last == 0 {
		w.last = 1
	}
	o.id, o.typ, o.of = w.last, r.typ, r.of
	w.pending[o.id] = o
	w.inFlight.Store(int32(len(w.pending)))
	w.out.mu.Lock()
	switch r.typ {
	case frameSign, frameDecrypt:
		if _, known := w.given[r.key]; !known {
			w.given[r.key] = struct{}{}
			w.out.buf = appendFrame(w.out.buf, frameKey, r.key, r.description)
		}
		w.out.buf = appendRequest(w.out.buf, r.typ, o.id, &r.signRequest)
	default:
		w.out.buf = appendFrame(w.out.buf, r.typ, o.id)
	}
	w.out.mu.Unlock()
	w.out.flush()
	return true
}

// forget takes an operation back. It is false if its end has come or is about to.
func (w *proc) forget(o *op) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.pending[o.id] != o {
		return false
	}
	delete(w.pending, o.id)
	w.inFlight.Store(int32(len(w.pending)))
	if !w.quitting {
		w.out.send(frameCancel, o.id)
	}
	return true
}

// finish ends an operation with its result. A result that cannot be one is an error: workers check what their module yields.
func (w *proc) finish(id uint32, result []byte) error {
	w.mu.Lock()
	o := w.pending[id]
	if o != nil && !o.admits(result) {
		w.mu.Unlock()
		return fmt.Errorf("%w: a result of %d bytes for type %d", errFrame, len(result), o.typ)
	}
	w.dropLocked(id)
	w.mu.Unlock()
	if o != nil {
		if o.of != nil {
			w.failures = streak{}
		}
		o.result = bytes.Clone(result)
		o.done <- struct{}{}
	}
	return nil
}

// admits reports whether result has the form of one of the operation.
func (o *op) admits(result []byte) bool {
	if o.typ == frameSign || o.typ == frameDecrypt {
		return o.of.admits(o.typ, result)
	}
	return len(result) == 0
}

func (w *proc) dropLocked(id uint32) {
	delete(w.pending, id)
	w.inFlight.Store(int32(len(w.pending)))
}

// take returns the operation of an id, which is no longer in the worker's hands, or nil if nobody waits for it.
func (w *proc) take(id uint32) *op {
	w.mu.Lock()
	defer w.mu.Unlock()
	o := w.pending[id]
	w.dropLocked(id)
	return o
}

// list adds a key's description to what an operation has.
func (w *proc) list(f frame) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	o := w.pending[f.id]
	if o == nil {
		return nil
	}
	o.size += len(f.body)
	if o.typ != frameList || len(o.listed) == maxKeys || o.size > maxList {
		return fmt.Errorf("%w: keys that were not asked for, more than %d of them, or more than %d bytes", errFrame, maxKeys, maxList)
	}
	o.listed = append(o.listed, bytes.Clone(f.body))
	return nil
}

// handle acts on a frame of the worker. It does not block.
func (w *proc) handle(f frame) error {
	switch f.typ {
	case frameDone:
		return w.finish(f.id, f.body)
	case frameError:
		err, bad := decodeError(f.body)
		if bad != nil {
			return bad
		}
		w.failed(f.id, err)
	case frameListed:
		return w.list(f)
	case frameStuck:
		w.stuck(f.id)
	case framePulse:
	case frameAsk:
		w.pool.logins.ask(w, f.id)
		return w.backlog()
	case frameLogin:
		return w.loggedIn(f)
	case frameLog:
		var r logRecord
		if err := decodeJSON("log", f.body, &r); err != nil {
			return err
		}
		w.pool.relay(w, &r)
	default:
		return w.handleStart(f)
	}
	return nil
}

// Bounds of a list of keys.
const (
	maxKeys = 10000
	maxList = 64 << 20 // bytes
)

// maxBacklog bounds what waits to be sent to a worker, in bytes.
const maxBacklog = maxInFlight * maxFrame / 2

// backlog finds a worker that does not read what it is sent.
func (w *proc) backlog() error {
	if n := w.out.waiting(); n > maxBacklog {
		return fmt.Errorf("%w: it does not read: %d bytes wait for it", errFrame, n)
	}
	return nil
}

func (w *proc) loggedIn(f frame) error {
	if len(f.body) == 0 {
		w.pool.logins.done(w, f.id, nil)
		return nil
	}
	err, bad := decodeError(f.body)
	if bad == nil {
		w.pool.logins.done(w, f.id, err)
	}
	return bad
}

// failed ends an operation with an error, or reports that of a keep-alive. A device that failed takes the worker with it.
func (w *proc) failed(id uint32, err *remoteError) {
	if errors.Is(err, pkcs11.ErrDevice) {
		w.ail(err)
	} else if err.rv != 0 && !refusesPIN(err) && w.failures.add(time.Now()) {
		w.ail(fmt.Errorf("nothing has worked for %v: %w", streakTime, err))
	}
	if o := w.take(id); o != nil {
		o.err = err
		o.done <- struct{}{}
	} else if id == 0 && w.logs.admit(time.Now()) {
		w.pool.log.Warn("idle token does not answer", "err", err, "pid", w.cmd.Process.Pid)
	}
}

// streak counts what the module has failed in a row. Modules have been seen to answer everything with one general error, or to run out of
// memory, until they are loaded anew. One client's input cannot cause that while anything else works.
type streak struct {
	since time.Time
	n     int
}

// How long and how often a module fails before it is loaded anew.
const (
	streakTime   = 30 * time.Second
	streakLength = 5
)

// add counts a failure. It is true when it is time to load the module anew.
func (s *streak) add(now time.Time) bool {
	if s.n == 0 {
		s.since = now
	}
	s.n++
	return s.n >= streakLength && now.Sub(s.since) >= streakTime
}

// ail marks the worker as one to be replaced, because its device failed. Nothing is given to it any more: what it has failed must
// not come to it again.
func (w *proc) ail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.isSick || w.quitting {
		return
	}
	w.isSick = true
	w.pool.withdraw(w)
	if w.reason == "" {
		w.reason, w.cause = "device", err
	}
	close(w.sick)
}

// stuck ends the worker, as the module holds an operation for too long.
func (w *proc) stuck(id uint32) {
	w.mu.Lock()
	if o := w.pending[id]; o != nil {
		o.stuck = true
	}
	w.mu.Unlock()
	w.kill("deadline", fmt.Errorf("the module held an operation for more than %v", w.pool.cfg.Deadline))
}

// handleStart acts on the frames of the start, which come in one order only.
func (w *proc) handleStart(f frame) error {
	if f.typ == frameFailed {
		err, bad := decodeError(f.body)
		if bad != nil {
			return bad
		}
		w.blame("start", err)
		w.report(err)
		return errFailed
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.state == 0 || f.typ != w.state {
		return fmt.Errorf("%w: unexpected type %d", errFrame, f.typ)
	}
	if f.typ == frameConfined {
		var c confinement
		if err := decodeJSON("confined", f.body, &c); err != nil {
			return err
		}
		if len(c.Lacks) > 0 {
			w.pool.log.Warn("kernel confines worker in part", "landlock", c.Landlock, "lacks", c.Lacks)
		}
		w.state = frameReady
		w.out.send(frameOpen, 0, encodeJSON(w.pool.openRequest()))
		return nil
	}
	var r readyReply
	if err := decodeJSON("ready", f.body, &r); err != nil {
		return err
	}
	if r.Sessions < 1 || r.Sessions > w.pool.cfg.Token.Sessions || r.Token == "" || len(r.Token) > maxName {
		return fmt.Errorf("%w: ready with %d sessions and a name of %d bytes", errFrame, r.Sessions, len(r.Token))
	}
	w.sessions, w.name, w.state = r.Sessions, r.Token, 0
	w.report(nil)
	return nil
}

// maxName bounds the name of a token, in bytes: labels have 32.
const maxName = 256

// errFailed means that the worker has said why it leaves.
var errFailed = errors.New("the worker failed to start")

// request is what a key asks a worker for.
type request struct {
	typ frameType
	signRequest
	description []byte
	of          *key // nil for what concerns no key
}

// maxMoves bounds how often an operation is given to another worker: one that makes modules crash must not take all of them along.
const maxMoves = 2

// do has a worker do an operation and returns the result, and what was listed.
func (p *Pool) do(ctx context.Context, r *request) ([]byte, [][]byte, error) {
	var last error
	for moves := 0; ; {
		w, err := p.pick(ctx)
		if err != nil {
			return nil, nil, cmp.Or(last, err)
		}
		o := ops.Get().(*op)
		if !w.send(o, r) {
			ops.Put(o)
			continue
		}
		select {
		case <-o.done:
		case <-ctx.Done():
			if w.forget(o) {
				o.reset()
				ops.Put(o)
				return nil, nil, context.Cause(ctx)
			}
			<-o.done
		}
		result, listed, err, move := o.result, o.listed, o.err, false
		switch {
		case o.lost && p.cfg.OnLoss == Fail:
			err = ErrLost
		case o.lost:
			err = unavailable{ErrLost}
			move = !o.stuck
		case err != nil:
			move = errors.Is(err, pkcs11.ErrDevice) && p.cfg.OnLoss == Move
		}
		o.reset()
		ops.Put(o)
		if moves++; !move || moves > maxMoves {
			return result, listed, err
		}
		last = err
	}
}

// logLimit lets a worker write so many log records a second: one whose module has taken over must not fill the server's log.
type logLimit struct {
	second  time.Time
	n       int
	dropped int
}

const maxLogRate = 50

// admit reports whether a record may be written. Only the goroutine that reads what the worker says calls it.
func (l *logLimit) admit(now time.Time) bool {
	if now.Sub(l.second) >= time.Second {
		l.second, l.n = now, 0
	}
	l.n++
	if l.n > maxLogRate {
		l.dropped++
		return false
	}
	return true
}

// relay writes a worker's log record to the pool's log.
func (p *Pool) relay(w *proc, r *logRecord) {
	if !w.logs.admit(time.Now()) {
		return
	}
	if n := w.logs.dropped; n > 0 {
		w.logs.dropped = 0
		p.log.Warn("worker logs too much; records were left out", "pid", w.cmd.Process.Pid, "count", n)
	}
	attrs := make([]slog.Attr, 0, len(r.Attrs)+1)
	for i, a := range r.Attrs {
		if i == maxLogAttrs {
			break
		}
		attrs = append(attrs, slog.String(cut(a[0]), w.text.redact(cut(a[1]))))
	}
	attrs = append(attrs, slog.Int("pid", w.cmd.Process.Pid))
	p.cfg.Logger.LogAttrs(context.Background(), r.Level, w.text.redact(cut(r.Message)), attrs...)
}
