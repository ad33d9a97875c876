package audit

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// signTimeout bounds one try to sign a checkpoint.
const signTimeout = 5 * time.Second

// The pauses between tries to sign a checkpoint.
const (
	minSignRetry = time.Second
	maxSignRetry = time.Minute
)

// checkpointer has checkpoints signed beside the writer, since a key in an HSM takes its time. All but its channels and what
// run needs belongs to the writer.
type checkpointer struct {
	signer  CheckpointSigner
	head    string // path of the head file
	l       *Log
	jobs    chan checkJob
	results chan signedLine

	inFlight bool
	ready    *Line // signed, to be written
	ops      uint64
	forced   bool
	last     time.Time
	retry    time.Duration
	retryAt  time.Time
}

// checkJob is a line to sign, or one to put into the head file.
type checkJob struct {
	line    Line
	publish []byte
}

// signedLine is the result of signing.
type signedLine struct {
	line Line
	err  error
}

func newCheckpointer(l *Log, c Config) checkpointer {
	return checkpointer{signer: c.Signer, head: filepath.Join(c.Dir, headFile), l: l,
		jobs: make(chan checkJob, 4), results: make(chan signedLine, 1)}
}

// run works until ctx ends.
func (c *checkpointer) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case j := <-c.jobs:
			if j.publish != nil {
				c.publish(j.publish)
				continue
			}
			r := c.sign(ctx, j.line)
			select {
			case c.results <- r:
			case <-ctx.Done():
			}
		}
	}
}

// drain publishes what run left.
func (c *checkpointer) drain() {
	for {
		select {
		case j := <-c.jobs:
			if j.publish != nil {
				c.publish(j.publish)
			}
		default:
			return
		}
	}
}

func (c *checkpointer) publish(line []byte) {
	if err := writeAtomic(c.head, line, 0o600); err != nil {
		c.l.logger.Warn("audit head file could not be written", "file", c.head, "err", err)
		c.l.count(func(s *Stats) { s.CheckpointErr = err.Error() })
	}
}

// keyID returns the id of the audit key, zero while it is not known.
func (c *checkpointer) keyID() Hash {
	pub := c.signer.Public()
	if pub == nil {
		return Hash{}
	}
	id, err := KeyID(pub)
	if err != nil {
		return Hash{}
	}
	return id
}

// sign signs a checkpoint line and checks the signature, so that a wrong one never gets into the log.
func (c *checkpointer) sign(ctx context.Context, line Line) signedLine {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	msg := line.Checkpoint.message(line.Time)
	alg, sig, err := c.signer.Sign(ctx, msg)
	if err != nil {
		return signedLine{err: err}
	}
	pub := c.signer.Public()
	if pub == nil {
		return signedLine{err: fmt.Errorf("audit: the audit key went away: %w", signer.ErrUnavailable)}
	}
	if err := verifySignature(pub, alg, msg, sig); err != nil {
		return signedLine{err: fmt.Errorf("audit: the audit key's home gave a checkpoint that does not verify: %w", err)}
	}
	line.Checkpoint.Alg, line.Checkpoint.Sig = alg, sig
	line.Checkpoint.Key, err = KeyID(pub)
	return signedLine{line, err}
}

// due reports whether a checkpoint is wanted, and from when on.
func (c *checkpointer) due(interval time.Duration) (time.Time, bool) {
	if c.inFlight || c.ready != nil || !c.forced && c.ops == 0 {
		return time.Time{}, false
	}
	at := c.retryAt
	if next := c.last.Add(interval); !c.forced && at.Before(next) {
		at = next
	}
	return at, true
}

// take returns the signed checkpoint that waits to be written, if it does not come too late.
func (c *checkpointer) take(seq uint64) *Line {
	l := c.ready
	c.ready = nil
	if l != nil && seq-l.Checkpoint.Covers >= maxLag/2 {
		c.forced = true
		return nil
	}
	return l
}

// giveBack is for a checkpoint that could not be written.
func (c *checkpointer) giveBack(l *Line) { c.ready = l }

// statement returns the checkpoint line for the log as it is, unsigned.
func (w *writer) statement(now time.Time) Line {
	return Line{Kind: KindCheckpoint, Time: now.UTC().Round(0), Checkpoint: Checkpoint{Log: w.id, Server: w.c.Server, Covers: w.seq, Head: w.head}}
}

// requestCheckpoint has a checkpoint signed if one is due.
func (w *writer) requestCheckpoint(now time.Time) {
	c := &w.check
	at, due := c.due(w.c.Checkpoint)
	if !due || now.Before(at) || w.f == nil || w.retry > 0 {
		return
	}
	select {
	case c.jobs <- checkJob{line: w.statement(now)}:
		c.inFlight, c.forced, c.ops, c.last = true, false, 0, now
	default:
		c.retryAt = now.Add(minSignRetry)
	}
}

var errOtherKey = errors.New("audit: the audit key is another than the one this log began with; go on with the old key, or consent to a new one with keyhaven-keyserver audit repair and a restart")

// signed takes the result of signing over.
func (w *writer) signed(r signedLine, now time.Time) {
	c := &w.check
	c.inFlight = false
	if r.err == nil && w.key != (Hash{}) && w.key != r.line.Checkpoint.Key {
		r.err = errOtherKey
	}
	if r.err != nil {
		if c.retry == 0 {
			w.l.logger.Warn("audit checkpoint is late: it could not be signed; records go on", "err", r.err)
		}
		c.retry = min(max(2*c.retry, minSignRetry), maxSignRetry)
		c.retryAt, c.forced = now.Add(c.retry), true
		w.l.count(func(s *Stats) { s.CheckpointErr = r.err.Error() })
		return
	}
	if c.retry > 0 {
		w.l.logger.Info("audit checkpoints are signed again")
	}
	c.retry, c.retryAt = 0, time.Time{}
	w.key = r.line.Checkpoint.Key
	c.ready = &r.line
}

// checkpointKept takes it that the checkpoint line is durable.
func (w *writer) checkpointKept(l *Line) {
	if l == nil {
		return
	}
	w.l.count(func(s *Stats) {
		s.Checkpoints++
		s.Covered = l.Checkpoint.Covers
		s.LastCheckpoint = l.Time
		s.CheckpointErr = ""
	})
	select {
	case w.check.jobs <- checkJob{publish: l.encode()}:
	default: // the next one will be published
	}
}

// encode returns the whole line. Its chain must be set.
func (l *Line) encode() []byte {
	b := append(l.appendBody(nil), chainMember...)
	b = hex.AppendEncode(b, l.Chain[:])
	return append(b, "\"}\n"...)
}
