package audit

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// Output is a place that lines go to besides the log. Its methods are called by one goroutine at a time.
type Output interface {
	// Name is what operators call the place.
	Name() string
	// Write hands over one line, with its newline. After an error the line is tried again, after a pause. It does not keep line.
	Write(ctx context.Context, line []byte) error
	// Close lets the place go.
	Close() error
}

// OutputStats is how an [Output] is doing.
type OutputStats struct {
	Name    string
	Written uint64 // lines
	Lost    uint64 // lines that found the queue full, or were left at the end
	Err     string // why the last try failed; "" if it did not
}

// maxOutputBytes bounds what waits for an output, in bytes. What comes when it is full is lost there, and counted.
const maxOutputBytes = 8 << 20

// outputQueue stands before an output, so that it holds nothing up.
type outputQueue struct {
	out     Output
	chunks  chan []byte
	bytes   atomic.Int64
	written atomic.Uint64
	lost    atomic.Uint64
	err     atomic.Pointer[string]
	logger  *slog.Logger

	ended    chan struct{} // closed when run returns
	closeErr error         // of out; after ended
}

func newOutputQueue(out Output, logger *slog.Logger) *outputQueue {
	return &outputQueue{out: out, chunks: make(chan []byte, 4096), logger: logger, ended: make(chan struct{})}
}

func (q *outputQueue) stats() OutputStats {
	s := OutputStats{Name: q.out.Name(), Written: q.written.Load(), Lost: q.lost.Load()}
	if e := q.err.Load(); e != nil {
		s.Err = *e
	}
	return s
}

// offer queues whole lines. It never waits, and nobody may change chunk afterwards.
func (q *outputQueue) offer(chunk []byte) {
	if q.bytes.Add(int64(len(chunk))) <= maxOutputBytes {
		select {
		case q.chunks <- chunk:
			return
		default:
		}
	}
	q.drop(chunk, chunk)
}

// drop counts the rest of a chunk as lost.
func (q *outputQueue) drop(chunk, rest []byte) {
	q.bytes.Add(-int64(len(chunk)))
	q.lost.Add(uint64(bytes.Count(rest, []byte{'\n'})))
}

// outputGrace is how long an output may take for what is left at the end.
const outputGrace = 2 * time.Second

// run hands lines over until ctx ends, and then those that are there, within outputGrace. Then it lets the output go.
func (q *outputQueue) run(ctx context.Context) {
	defer func() {
		q.closeErr = q.out.Close()
		close(q.ended)
	}()
	grace, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(outputGrace, cancel) })
	defer stop()
	for {
		select {
		case chunk := <-q.chunks:
			q.hand(grace, chunk)
			continue
		case <-ctx.Done():
		}
		for {
			select {
			case chunk := <-q.chunks:
				q.hand(grace, chunk)
			default:
				return
			}
		}
	}
}

// hand writes a chunk's lines.
func (q *outputQueue) hand(ctx context.Context, chunk []byte) {
	rest := chunk
	for len(rest) > 0 {
		end := bytes.IndexByte(rest, '\n') + 1
		if !q.write(ctx, rest[:end]) {
			q.drop(chunk, rest)
			return
		}
		q.written.Add(1)
		rest = rest[end:]
	}
	q.bytes.Add(-int64(len(chunk)))
}

// write tries a line until it is written or ctx ends.
func (q *outputQueue) write(ctx context.Context, line []byte) bool {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 10*time.Second) {
		if ctx.Err() != nil {
			return false
		}
		err := q.out.Write(ctx, line)
		if err == nil {
			if q.err.Swap(nil) != nil {
				q.logger.Info("audit output works again", "output", q.out.Name())
			}
			return true
		}
		text := err.Error()
		if q.err.Swap(&text) == nil {
			q.logger.Warn("audit output fails; lines wait for it", "output", q.out.Name(), "err", err)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

type jsonLines struct {
	path string
	f    *os.File
}

// JSONLines returns an output that appends the lines to a file, which is opened anew after a failure or when it was moved away, or to standard output if path is "-".
func JSONLines(path string) Output { return &jsonLines{path: path} }

func (j *jsonLines) Name() string { return "jsonl:" + j.path }

func (j *jsonLines) Write(_ context.Context, line []byte) error {
	if j.path == "-" {
		_, err := os.Stdout.Write(line)
		return err
	}
	f, err := j.open()
	if err != nil {
		return err
	}
	n, err := f.Write(line)
	if err != nil {
		// A part of a line must not become the beginning of the next one.
		if st, serr := f.Stat(); n > 0 && serr == nil {
			err = errors.Join(err, f.Truncate(st.Size()-int64(n)))
		}
		return errors.Join(err, j.Close())
	}
	return nil
}

// open returns the file that the path names now.
func (j *jsonLines) open() (*os.File, error) {
	if f := j.f; f != nil {
		have, err1 := f.Stat()
		want, err2 := os.Stat(j.path)
		if err1 == nil && err2 == nil && os.SameFile(have, want) {
			return f, nil
		}
		_ = j.Close() // whatever it says, the file is not the one to write to
	}
	f, err := os.OpenFile(j.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	j.f = f
	return f, nil
}

func (j *jsonLines) Close() error {
	if j.f == nil {
		return nil
	}
	err := j.f.Close()
	j.f = nil
	return err
}

// outputPatience is how long Run waits at its end for an output that takes more than outputGrace.
const outputPatience = outputGrace + time.Second

// awaitOutputs waits until the outputs have ended. One that is stuck, as in a write to a pipe that nobody reads, is left behind: it ends when the write does.
func (w *writer) awaitOutputs() {
	patience := time.NewTimer(outputPatience)
	defer patience.Stop()
	for _, o := range w.outputs {
		select {
		case <-o.ended:
			continue
		default:
		}
		select {
		case <-o.ended:
		case <-patience.C:
			patience.Reset(0) // for those after it
			w.l.logger.Error("audit output is stuck and was left behind; what it was to write is in the log", "output", o.out.Name(), "bytes", o.bytes.Load())
		}
	}
}

// closeOutput lets an output go. One that Run left behind does so itself.
func (w *writer) closeOutput(o *outputQueue) error {
	select {
	case <-w.ended:
	default:
		return o.out.Close() // Run was not called
	}
	select {
	case <-o.ended:
		return o.closeErr
	default:
		return nil
	}
}
