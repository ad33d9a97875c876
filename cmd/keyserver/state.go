package main

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// Files in state_dir.
const (
	quotaFile = "quotas.json"    // what clients have used of their budgets
	stateLock = "keyserver.lock" // held by the server whose state it is
)

// lockState keeps other servers out of state_dir until release: two of them would each grant the whole of a client's budget, and write over what
// the other has counted.
func (p *plan) lockState() (release func(), err error) {
	path := p.cfg.beside(stateLock)
	if path == "" {
		return func() {}, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, p.file.Errorf("state_dir", "%v; let this user write there, or name another directory", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = errors.New("another key server keeps its state there; stop it, or give each a directory of its own")
		}
		return nil, p.file.Errorf("state_dir", "%v", fmt.Errorf("%s: %w", path, err))
	}
	return func() { f.Close() }, nil
}
