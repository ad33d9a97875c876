package audit

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// maxTail is the size above which what stands behind the last whole line is damage and no torn write, in bytes.
const maxTail = maxWrite + maxLine

// start takes the directory and finds out where the log in it ends.
func start(ctx context.Context, l *Log, c Config) (w *writer, err error) {
	if err := makeDir(c); err != nil {
		return nil, fmt.Errorf("audit: directory: %w", err)
	}
	held, err := lock(filepath.Join(c.Dir, lockFile), true)
	if err != nil {
		return nil, fmt.Errorf("audit: directory %s: %w", c.Dir, err)
	}
	w = &writer{l: l, c: c, lock: held, sealer: newSealer(), ended: make(chan struct{}), check: newCheckpointer(l, c)}
	defer func() {
		if err != nil {
			_ = held.Close() // the error before counts
		}
	}()
	for _, o := range c.Outputs {
		w.outputs = append(w.outputs, newOutputQueue(o, c.Logger))
	}
	names, err := listFiles(c.Dir)
	if err != nil {
		return nil, fmt.Errorf("audit: directory: %w", err)
	}
	if err := w.resume(ctx, names); err != nil {
		return nil, err
	}
	if w.id == (ID{}) {
		rand.Read(w.id[:])
	}
	if w.damaged == nil {
		// Consent is to damage that was seen, not to what may come.
		if err := os.Remove(filepath.Join(c.Dir, repairFile)); err == nil {
			c.Logger.Warn("request to repair the audit log dropped: nothing is damaged", "file", c.Dir)
		}
	}
	return w, nil
}

// makeDir makes the directory if it is not there, durably, since records in it are of no use without it.
func makeDir(c Config) error {
	st, err := os.Stat(c.Dir)
	if err == nil && st.Mode().Perm()&0o022 != 0 {
		c.Logger.Warn("others than the server may write to the audit directory; chmod 700 it", "file", c.Dir, "mode", st.Mode().Perm().String())
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(filepath.Clean(c.Dir))
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return err
	}
	if err := c.disk.syncDir(parent); err != nil && !errors.Is(err, fs.ErrPermission) { // the parent need not be readable
		return err
	}
	return nil
}

// resume takes over how the log ends.
func (w *writer) resume(ctx context.Context, names []string) error {
	var last *ending
	for i := len(names) - 1; i >= 0 && (last == nil || !last.open); i-- {
		path := filepath.Join(w.c.Dir, names[i])
		e, err := readEnding(ctx, path)
		if err != nil {
			return fmt.Errorf("audit: %w", err)
		}
		number := fileNumber(names[i])
		switch {
		case i == len(names)-1 && !e.open && e.damage == nil:
			w.attempted, w.number = number, number-1 // begun in vain: nothing in it counts
			continue
		case w.number == 0:
			w.number = number
		}
		if last != nil {
			e.damage = last.damage // what comes after it cannot be trusted
			e.lines += last.lines
		}
		e.name, last = names[i], e
	}
	head, err := readAnchor(filepath.Join(w.c.Dir, headFile))
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrNotExist):
	default:
		w.found(&damageError{filepath.Join(w.c.Dir, headFile), "cannot be read: " + err.Error()})
	}
	if last != nil {
		if err := w.continueFrom(last); err != nil {
			return err
		}
	}
	if head != nil {
		return w.compareHead(head, last)
	}
	return nil
}

// continueFrom goes on behind the last file.
func (w *writer) continueFrom(e *ending) error {
	w.name, w.good, w.seq, w.head = e.name, e.seq, e.seq, e.head
	w.id, w.key = e.opening.Log, e.opening.Key
	if err := w.owned(&e.opening); err != nil {
		return err
	}
	if e.damage != nil {
		w.damaged = e.damage
		w.seq += e.lines // so that no seq is given twice
		return nil
	}
	if len(e.tail) > 0 {
		path := filepath.Join(w.c.Dir, e.name)
		w.gap = Note{File: e.name, Bytes: uint64(len(e.tail)), SHA256: sha256.Sum256(e.tail),
			Text: "a torn line, as a crash leaves it, was cut off; it was never acknowledged"}
		if err := cut(path, e.size); err != nil {
			w.gap.Text = "a torn line, as a crash leaves it, could not be cut off: " + err.Error()
		}
		w.l.logger.Warn("audit file ended in a torn line", "file", path, "bytes", len(e.tail))
	}
	return nil
}

// owned fails if the log is not this server's, unless an operator consents to go on.
func (w *writer) owned(o *Opening) error {
	var what string
	switch id := w.check.keyID(); {
	case o.Server != w.c.Server:
		what = fmt.Sprintf("holds the log of server %q; this is %q", o.Server, w.c.Server)
	case id != (Hash{}) && o.Key != (Hash{}) && id != o.Key:
		what = fmt.Sprintf("holds a log signed by audit key %s; the key now is %s", o.Key, id)
	default:
		return nil
	}
	d := &damageError{w.c.Dir, what}
	if _, err := readRepair(w.c.Dir); err != nil {
		return fmt.Errorf("%w: give this server a directory of its own, or, if that is meant, keyhaven-keyserver audit repair", d)
	}
	w.damaged, w.key = d, Hash{}
	return nil
}

// compareHead finds out whether lines that the head file tells of are missing.
func (w *writer) compareHead(head *Line, last *ending) error {
	path := filepath.Join(w.c.Dir, headFile)
	c := &head.Checkpoint
	if pub := w.check.signer.Public(); pub != nil && w.check.keyID() == c.Key {
		ring, err := newKeyring([]crypto.PublicKey{pub})
		if err != nil {
			return err
		}
		if err := ring.check(head); err != nil {
			w.found(&damageError{path, "was forged: " + err.Error()})
			return nil
		}
	}
	switch {
	case last == nil:
		w.id, w.good, w.seq, w.head = c.Log, head.Seq, head.Seq, head.Chain
		if err := w.owned(&Opening{Log: c.Log, Server: c.Server, Key: c.Key}); err != nil {
			return err
		}
		w.found(&damageError{w.c.Dir, fmt.Sprintf("has no log file, but %s tells of seq %d: files were removed", headFile, head.Seq)})
	case c.Log != w.id:
		w.found(&damageError{path, "is of another log"})
	case head.Seq > w.good:
		w.seq = max(w.seq, head.Seq)
		w.found(&damageError{filepath.Join(w.c.Dir, last.name), fmt.Sprintf("ends at seq %d, but %s tells of seq %d: lines at the end were removed", w.good, headFile, head.Seq)})
	case c.Covers >= last.first && last.chains[c.Covers-last.first] != c.Head, head.Seq >= last.first && last.chains[head.Seq-last.first] != head.Chain:
		w.found(&damageError{filepath.Join(w.c.Dir, last.name), fmt.Sprintf("was changed up to seq %d: %s has another chain", c.Covers, headFile)})
	}
	return nil
}

// found notes damage unless some was found before.
func (w *writer) found(d *damageError) {
	if w.attempted > 0 { // perhaps that file was not begun in vain, but emptied
		w.number, w.attempted = w.attempted, 0
	}
	if w.damaged == nil {
		w.damaged = d
	}
}

// ending is how a file ends.
type ending struct {
	name    string
	open    bool // the file has a right first line
	opening Opening
	first   uint64 // seq of the first line
	seq     uint64 // of the last right line
	head    Hash   // its chain
	chains  []Hash // of all right lines
	size    int64  // of the right lines
	tail    []byte // a torn write behind them
	damage  error  // why not all lines are right
	lines   uint64 // behind the right ones, if there is damage
}

// readEnding goes through a file. What is wrong in it is no error.
func readEnding(ctx context.Context, path string) (*ending, error) {
	r, err := openLines(path, false)
	if err != nil {
		return nil, err
	}
	defer r.close()
	e := new(ending)
	sealer := newSealer()
	var l Line
	for ctx.Err() == nil {
		line, err := r.next()
		switch {
		case errors.Is(err, io.EOF):
			return e, nil
		case err != nil && !errors.Is(err, errTorn):
			return nil, err
		}
		what := err
		if what == nil {
			what = e.take(&l, line, sealer)
		}
		if what == nil {
			e.size = r.offset
			continue
		}
		if err := e.tell(path, r, what); err != nil {
			return nil, err
		}
		return e, nil
	}
	return nil, context.Cause(ctx)
}

// take checks a line against those before it.
func (e *ending) take(l *Line, line []byte, sealer *sealer) error {
	if err := l.parse(line); err != nil {
		return err
	}
	body := line[:len(line)-lineTail]
	if !e.open {
		if l.Kind != KindOpen {
			return errors.New("file does not begin with an open line")
		}
		if l.Open.Version != Version {
			return fmt.Errorf("format version %d; this program knows %d", l.Open.Version, Version)
		}
		if sealer.chain(&l.Open.PrevHead, body) != l.Chain {
			return errors.New("line was changed: its chain does not fit")
		}
		e.open, e.opening, e.first = true, l.Open, l.Seq
	} else if l.Seq != e.seq+1 || sealer.chain(&e.head, body) != l.Chain {
		return errors.New("line was changed, or does not belong here: its chain does not fit")
	}
	e.seq, e.head = l.Seq, l.Chain
	e.chains = append(e.chains, l.Chain)
	return nil
}

// tell decides whether what stands behind the right lines is a torn write or damage. r stands behind the first wrong line.
func (e *ending) tell(path string, r *lineReader, what error) error {
	number := r.number
	if _, err := r.f.Seek(e.size, io.SeekStart); err != nil {
		return err
	}
	tail, err := io.ReadAll(io.LimitReader(r.f, int64(maxTail)+1))
	if err != nil {
		return err
	}
	first, _, _ := bytes.Cut(tail, []byte{'\n'})
	if len(tail) <= maxTail && (!bytes.Contains(tail, []byte{'\n'}) || bytes.IndexByte(first, 0) >= 0) {
		e.tail = tail
		return nil
	}
	e.damage = &damageError{path, fmt.Sprintf("is damaged in line %d (seq %d): %v", number, e.seq+1, what)}
	e.lines = uint64(bytes.Count(tail, []byte{'\n'})) + 1
	buf := make([]byte, 64<<10)
	for {
		n, err := r.f.Read(buf)
		e.lines += uint64(bytes.Count(buf[:n], []byte{'\n'}))
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// cut takes off what stands behind size.
func cut(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|noFollow, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Sync(), f.Close())
}
