package audit

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

func (f realFile) datasync() error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
	}
}

// noFollow has a link not opened.
const noFollow = unix.O_NOFOLLOW

var errLocked = errors.New("another process writes to it")

// lock takes the directory for this process until the result is closed or the process ends. If the lock's file is not there, it is made if create is set.
func lock(path string, create bool) (*os.File, error) {
	flags := os.O_RDONLY | noFollow
	if create {
		flags |= os.O_CREATE
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w (flock of %s); stop it, or give this server a directory of its own", errLocked, path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
