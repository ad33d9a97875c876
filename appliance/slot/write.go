package slot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
)

const (
	// sector is what a card writes whole, or in tests half.
	sector = 512
	// chunk is how much is read and written at once, and syncEvery how much may wait in memory, in bytes.
	chunk     = 1 << 20
	syncEvery = 8 << 20
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
	err = writeDevice(ctx, dev, r, size, progress)
	if cerr := dev.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("%w: %w", ErrCard, cerr)
	}
	return err
}

func writeDevice(ctx context.Context, dev device, r io.Reader, size int64, progress func(int64)) error {
	have, err := dev.Size()
	if err != nil {
		return cardError("read", 0, err)
	}
	if size < 2*sector || size%sector != 0 || size > have {
		return fmt.Errorf("slot: an image of %d bytes does not go into a slot of %d", size, have)
	}
	if err := writeSynced(dev, make([]byte, sector)); err != nil {
		return err
	}
	head, sum, err := stream(ctx, dev, r, size, progress)
	if err != nil {
		return err
	}
	if err := readBack(ctx, dev, head, sum, size); err != nil {
		return err
	}
	return writeSynced(dev, head)
}

// writeSynced writes the first sector and sees that it is on the card.
func writeSynced(dev device, b []byte) error {
	if _, err := dev.WriteAt(b, 0); err != nil {
		return cardError("write", 0, err)
	}
	if err := errors.Join(dev.Sync(), dev.Drop()); err != nil {
		return cardError("write", 0, err)
	}
	got := make([]byte, len(b))
	if _, err := dev.ReadAt(got, 0); err != nil {
		return cardError("read", 0, err)
	}
	if !bytes.Equal(got, b) {
		return cardError("read", 0, errors.New("it gives back something else than was written"))
	}
	return nil
}

// stream writes all of r but its first sector, which it returns with the hash of all.
func stream(ctx context.Context, dev device, r io.Reader, size int64, progress func(int64)) (head, sum []byte, err error) {
	buf, h := make([]byte, chunk), sha256.New()
	for off, unsynced := int64(0), int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return nil, nil, context.Cause(ctx)
		}
		b := buf[:min(chunk, size-off)]
		if n, err := io.ReadFull(r, b); err != nil {
			return nil, nil, short(err, off+int64(n), size)
		}
		h.Write(b)
		skip := 0
		if off == 0 {
			head, skip = bytes.Clone(b[:sector]), sector
		}
		if _, err := dev.WriteAt(b[skip:], off+int64(skip)); err != nil {
			return nil, nil, cardError("write", off, err)
		}
		off += int64(len(b))
		if unsynced += int64(len(b)); unsynced >= syncEvery || off == size {
			if err := dev.Sync(); err != nil {
				return nil, nil, cardError("write", off, err)
			}
			unsynced = 0
		}
		if progress != nil {
			progress(off)
		}
	}
	// The reader's last word: only now a bundle knows whether it was whole.
	if n, err := io.ReadFull(r, buf[:1]); n > 0 {
		return nil, nil, fmt.Errorf("slot: the image has more than %d bytes", size)
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

// readBack reads from the card what was written and compares its hash. The first sector there must be empty still.
func readBack(ctx context.Context, dev device, head, sum []byte, size int64) error {
	if err := dev.Drop(); err != nil {
		return cardError("read", 0, err)
	}
	h := sha256.New()
	h.Write(head)
	if err := hashRest(ctx, dev, h, size); err != nil {
		return err
	}
	if !bytes.Equal(h.Sum(nil), sum) {
		return fmt.Errorf("%w: it gives back something else than was written; write another card", ErrCard)
	}
	return nil
}

func hashRest(ctx context.Context, dev device, h hash.Hash, size int64) error {
	buf := make([]byte, chunk)
	for off := int64(sector); off < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(chunk, size-off)]
		if _, err := dev.ReadAt(b, off); err != nil {
			return cardError("read", off, err)
		}
		h.Write(b)
		off += int64(len(b))
	}
	return nil
}

func cardError(op string, off int64, err error) error {
	return fmt.Errorf("%w: %s at %d KiB of the idle slot: %w; try again, and if it stays so write another card", ErrCard, op, off>>10, err)
}
