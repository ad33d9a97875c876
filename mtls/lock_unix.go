//go:build unix

package mtls

import (
	"os"
	"syscall"
)

// lockFile waits until no other process has f locked and locks it, until f is closed.
func lockFile(f *os.File) error { return syscall.Flock(int(f.Fd()), syscall.LOCK_EX) }
