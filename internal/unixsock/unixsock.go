// Package unixsock binds Unix sockets for local administration: private from their first moment on, bounded in
// connections, and with the kernel's word on who calls.
package unixsock

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

var umaskMu sync.Mutex // held while the process's umask is not its own

// Listen is Limit of Bind.
func Listen(path string, conns int) (net.Listener, error) {
	ln, err := Bind(path)
	if err != nil {
		return nil, err
	}
	return Limit(ln, conns), nil
}

// Limit takes at most conns connections of ln at one time; further callers wait in the socket's queue.
func Limit(ln net.Listener, conns int) net.Listener {
	return &limited{Listener: ln, slots: make(chan struct{}, conns), done: make(chan struct{})}
}

// Bind binds path with mode 0600. A socket that a dead process left there is replaced; one that is answered is an error, as
// is a file that is no socket.
func Bind(path string) (net.Listener, error) {
	if err := clearStale(path); err != nil {
		return nil, err
	}
	umaskMu.Lock()
	old := syscall.Umask(0o177)
	ln, err := net.Listen("unix", path)
	syscall.Umask(old)
	umaskMu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w: does its directory exist, and may this user write there?", path, err)
	}
	return ln, nil
}

// clearStale removes a socket that nobody answers.
func clearStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s is there and is no socket; move it away, or choose another path", path)
	}
	conn, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		conn.Close()
		return fmt.Errorf("another process answers on %s; stop it, or choose another path", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("somebody holds %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the stale socket: %w", err)
	}
	return nil
}

// limited is a listener with at most so many connections at a time.
type limited struct {
	net.Listener
	slots chan struct{}
	done  chan struct{}
	once  sync.Once
}

// Accept waits for a free slot, then for a caller.
func (l *limited) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &slotConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

// Close implements net.Listener.
func (l *limited) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type slotConn struct {
	net.Conn
	release func()
}

// Close implements net.Conn.
func (c *slotConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}
