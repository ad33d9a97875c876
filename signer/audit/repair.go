package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// repairPoll is how often Repair looks whether the server took the request.
const repairPoll = 100 * time.Millisecond

// Repair consents to going on after damage; reason goes into the log, whose next file says what was damaged. Nothing is changed or removed. A server that runs
// is given until ctx ends to take the request, and taken says that it did; it takes none while nothing is damaged, and the request is withdrawn. If no
// server runs, the next start takes it, or drops it if nothing is damaged.
func Repair(ctx context.Context, dir, reason string) (taken bool, err error) {
	if reason == "" || clean(reason) != reason {
		return false, fmt.Errorf("audit: give a reason, of at most %d bytes of text; it goes into the log", maxString)
	}
	if err := holdsLog(dir); err != nil {
		return false, fmt.Errorf("audit: %w", err)
	}
	path := filepath.Join(dir, repairFile)
	// The server may be another user, who must be able to read it. The directory keeps others out.
	if err := writeAtomic(path, []byte(reason+"\n"), 0o644); err != nil {
		return false, fmt.Errorf("audit: request to repair: %w", err)
	}
	held, err := lock(filepath.Join(dir, lockFile), false)
	switch {
	case err == nil:
		return false, held.Close()
	case errors.Is(err, fs.ErrNotExist):
		return false, nil // nobody has the directory
	}
	if !errors.Is(err, errLocked) {
		return false, errors.Join(fmt.Errorf("audit: %w", err), os.Remove(path))
	}
	for {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			return true, nil
		}
		select {
		case <-time.After(repairPoll):
		case <-ctx.Done():
			if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
				return true, nil
			}
			return false, fmt.Errorf("audit: the server did not take the request; is its log damaged? /readyz says so: %w", context.Cause(ctx))
		}
	}
}

// holdsLog returns an error if nothing of a log is in dir.
func holdsLog(dir string) error {
	names, err := listFiles(dir)
	if err != nil || len(names) > 0 {
		return err
	}
	for _, name := range []string{headFile, lockFile} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return nil
		}
	}
	return fmt.Errorf("directory %s holds no log", dir)
}
