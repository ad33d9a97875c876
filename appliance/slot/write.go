package slot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
)

const (
	// sector is the least that a card writes.
	sector = 512
	// defaultChunk is how much is read and written at once, and defaultUnsynced how much may wait in memory, in bytes.
	defaultChunk    = 1 << 20
	defaultUnsynced = 8 << 20
)

// WriteIdle writes the image of size bytes that r gives to the idle slot, and reads it back from the card. The slot is no
// file system until all of it is on the card and r has ended with io.EOF: its first sector is emptied first and written
// last. So whatever cuts it off leaves no slot that looks whole. It never touches the slot that runs nor the default one.
// After each chunk progress, if not nil, gets the number of bytes written.
//
// Errors of r are passed on; others are [ErrTrial], [ErrCard], [ErrNoAppliance] and those of ctx.
func (s *Slots) WriteIdle(ctx context.Context, r io.Reader, size int64, progress func(int64)) error {
	st, err := s.State()
	switch {
	case err != nil:
		return err
	case st.Default == 0:
		return fmt.Errorf("%w; restart the machine", ErrAutoboot)
	case st.Idle == 0:
		return ErrTrial
	}
	if err := s.checkDisk(); err != nil {
		return err
	}
	dev, err := s.m.open(st.Idle, true)
	if err != nil {
		return fmt.Errorf("%w: open partition %d to write: %w", ErrCard, st.Idle, err)
	}
	w := &writer{dev: dev, size: size, progress: progress, buf: make([]byte, s.chunk), unsynced: s.unsynced}
	err = w.write(ctx, r)
	if cerr := dev.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("%w: %w", ErrCard, cerr)
	}
	return err
}

// A writer writes one image to a partition.
type writer struct {
	dev      device
	size     int64
	progress func(int64)
	buf      []byte
	unsynced int64
}

func (w *writer) write(ctx context.Context, r io.Reader) error {
	have, err := w.dev.Size()
	if err != nil {
		return cardError("read", 0, err)
	}
	if w.size < 2*sector || w.size%sector != 0 || w.size > have {
		return fmt.Errorf("slot: an image of %d bytes does not go into a slot of %d", w.size, have)
	}
	if err := w.first(make([]byte, sector)); err != nil {
		return err
	}
	head, sum, err := w.stream(ctx, r)
	if err != nil {
		return err
	}
	if err := w.readBack(ctx, head, sum); err != nil {
		return err
	}
	return w.first(head)
}

// first writes the first sector and sees that it is on the card.
func (w *writer) first(b []byte) error {
	if _, err := w.dev.WriteAt(b, 0); err != nil {
		return cardError("write", 0, err)
	}
	if err := errors.Join(w.dev.Sync(), w.dev.Drop()); err != nil {
		return cardError("write", 0, err)
	}
	got := make([]byte, len(b))
	if _, err := w.dev.ReadAt(got, 0); err != nil {
		return cardError("read", 0, err)
	}
	if !bytes.Equal(got, b) {
		return cardError("read", 0, errors.New("it gives back something else than was written"))
	}
	return nil
}

// stream writes all of r but its first sector, which it returns with the hash of all.
func (w *writer) stream(ctx context.Context, r io.Reader) (head, sum []byte, err error) {
	h := sha256.New()
	for off, unsynced := int64(0), int64(0); off < w.size; {
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		b := w.buf[:min(int64(len(w.buf)), w.size-off)]
		if n, err := io.ReadFull(r, b); err != nil {
			return nil, nil, short(err, off+int64(n), w.size)
		}
		h.Write(b)
		skip := 0
		if off == 0 {
			head, skip = bytes.Clone(b[:sector]), sector
		}
		if _, err := w.dev.WriteAt(b[skip:], off+int64(skip)); err != nil {
			return nil, nil, cardError("write", off, err)
		}
		off += int64(len(b))
		if unsynced += int64(len(b)); unsynced >= w.unsynced || off == w.size {
			if err := w.dev.Sync(); err != nil {
				return nil, nil, cardError("write", off, err)
			}
			unsynced = 0
		}
		if w.progress != nil {
			w.progress(off)
		}
	}
	// The reader's last word: only now a bundle knows whether it was whole.
	if n, err := io.ReadFull(r, w.buf[:1]); n > 0 {
		return nil, nil, fmt.Errorf("slot: the image has more than %d bytes", w.size)
	} else if err != io.EOF {
		return nil, nil, err
	}
	return head, h.Sum(nil), nil
}

// short makes the early end of an image an error that says so.
func short(err error, got, size int64) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return fmt.Errorf("slot: the image ends after %d of %d bytes", got, size)
	}
	return err
}

// readBack reads from the card what was written and compares its hash. The first sector is not there yet.
func (w *writer) readBack(ctx context.Context, head, sum []byte) error {
	if err := w.dev.Drop(); err != nil {
		return cardError("read", 0, err)
	}
	h := sha256.New()
	h.Write(head)
	for off := int64(sector); off < w.size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := w.buf[:min(int64(len(w.buf)), w.size-off)]
		if _, err := w.dev.ReadAt(b, off); err != nil {
			return cardError("read", off, err)
		}
		h.Write(b)
		off += int64(len(b))
	}
	if !bytes.Equal(h.Sum(nil), sum) {
		return fmt.Errorf("%w: it gives back something else than was written; write another card", ErrCard)
	}
	return nil
}

func cardError(op string, off int64, err error) error {
	return fmt.Errorf("%w: %s at %d KiB of the idle slot: %w; try again, and if it stays so write another card", ErrCard, op, off>>10, err)
}
