// Package takeover lets a new process of a program take the place of one that runs, without a connection being refused: the
// old one starts the new one, hands it the listening sockets, and ends its work when the new one is ready. A new process
// that fails changes nothing.
//
// The two agree over a pair of pipes, a byte each time: the new process says that it is ready; the old one, once it no longer
// accepts, says that the new one may begin. A pipe that closes before is the other's end.
package takeover

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"
)

// What is said over the pipes.
const (
	sayReady byte = 'r'
	sayBegin byte = 'g'
)

// variable names what a successor has from its predecessor, as JSON.
const variable = "KEYHAVEN_TAKEOVER"

// ReadyTimeout is how long a new process may take to be ready.
const ReadyTimeout = time.Minute

// ErrPredecessor says that the process that was to be replaced ended, or gave up, before it handed over.
var ErrPredecessor = errors.New("the process that was to be replaced did not hand over; it may run on, or the service manager starts another")

// A bequest is what a process gets from its predecessor.
type bequest struct {
	In      int      `json:"in"`  // the pipe from the predecessor
	Out     int      `json:"out"` // the pipe to it
	Idle    bool     `json:"idle,omitempty"`
	Sockets []socket `json:"sockets"`
}

type socket struct {
	Network string `json:"network"`
	Addr    string `json:"addr"` // as configured
	FD      int    `json:"fd"`
}

// fileListener is what can be handed on: a TCP or Unix listener.
type fileListener interface {
	net.Listener
	syscall.Conn
}

type opened struct {
	network, addr string
	ln            fileListener
}

// A Process is this process, which may have a predecessor and a successor. Its methods may be called by several goroutines.
type Process struct {
	path    string // what to execute for a successor
	request chan os.Signal
	idle    bool // the predecessor was

	mu      sync.Mutex // guards the fields below
	in, out *os.File   // pipes of the predecessor; nil: there is none, or it has handed over
	left    []socket   // inherited, and not asked for yet
	opened  []opened
}

// Succeeds reports whether a predecessor waits for this process.
func (p *Process) Succeeds() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.in != nil
}

// Idle reports whether the predecessor does nothing that this process, to take its place, would have to do as well.
func (p *Process) Idle() bool { return p.idle }

// Requests receives a value when somebody wants this process replaced, by SIGUSR2. It never does on systems without that.
func (p *Process) Requests() <-chan os.Signal { return p.request }

// Listen returns the predecessor's socket for the network and address, if there is one, else a new one. Its successor will
// have it. Networks are tcp and unix; a Unix socket is private to the user.
func (p *Process) Listen(network, addr string) (net.Listener, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ln, err := p.inheritLocked(network, addr)
	if ln == nil && err == nil {
		if ln, err = bind(network, addr); err != nil && len(p.left) > 0 {
			// One of those may be in the way, under the name that the configuration had for it.
			p.discardLocked()
			ln, err = bind(network, addr)
		}
	}
	if err != nil {
		return nil, err
	}
	if f, ok := ln.(fileListener); ok {
		p.opened = append(slices.DeleteFunc(p.opened, opened.closed), opened{network, addr, f})
	}
	return ln, nil
}

func (p *Process) inheritLocked(network, addr string) (net.Listener, error) {
	for i, s := range p.left {
		if s.Network != network || s.Addr != addr {
			continue
		}
		p.left = append(p.left[:i], p.left[i+1:]...)
		f := os.NewFile(uintptr(s.FD), network+" "+addr)
		defer f.Close()
		ln, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("take over %s %s: %w", network, addr, err)
		}
		if u, ok := ln.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(p.in == nil) // until it has handed over, the file is the predecessor's
		}
		return ln, nil
	}
	return nil, nil
}

// closed reports whether the listener is.
func (o opened) closed() bool {
	raw, err := o.ln.SyscallConn()
	return err != nil || raw.Control(func(uintptr) {}) != nil
}

// Discard closes the predecessor's sockets that nobody has asked for: the configuration no longer names them.
func (p *Process) Discard() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.discardLocked()
}

func (p *Process) discardLocked() {
	for _, s := range p.left {
		os.NewFile(uintptr(s.FD), s.Addr).Close() //nolint:errcheck // it is given up
	}
	p.left = nil
}
