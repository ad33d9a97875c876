//go:build unix

package takeover

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/notify"
	"github.com/keyhaven/keyhaven/internal/unixsock"
)

// maxFD bounds the descriptors that a predecessor names.
const maxFD = 1 << 20

// Begin takes what a predecessor left, if there was one, and has SIGUSR2 reported by Requests. To be called once, early: the
// signal ends a process that does not know it.
func Begin() (*Process, error) {
	p := &Process{request: make(chan os.Signal, 1)}
	signal.Notify(p.request, syscall.SIGUSR2)
	var err error
	// The path as the program was called by, since that is where a new version is put; the file that runs may be gone.
	if p.path, err = filepath.Abs(os.Args[0]); err != nil || !strings.Contains(os.Args[0], "/") {
		if p.path, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	text := os.Getenv(variable)
	if text == "" {
		return p, nil
	}
	if err := os.Unsetenv(variable); err != nil {
		return nil, err
	}
	b, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", variable, err)
	}
	for _, fd := range b.fds() {
		syscall.CloseOnExec(fd)
	}
	for _, fd := range []int{b.In, b.Out} {
		if err := syscall.SetNonblock(fd, true); err != nil { // so that reads can end
			return nil, fmt.Errorf("%s: descriptor %d: %w", variable, fd, err)
		}
	}
	p.in, p.out = os.NewFile(uintptr(b.In), "predecessor"), os.NewFile(uintptr(b.Out), "predecessor")
	p.left, p.idle = b.Sockets, b.Idle
	return p, nil
}

func parse(text string) (*bequest, error) {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.DisallowUnknownFields()
	b := &bequest{}
	if err := dec.Decode(b); err != nil {
		return nil, err
	}
	fds := b.fds()
	slices.Sort(fds)
	if fds[0] < 3 || fds[len(fds)-1] > maxFD || len(slices.Compact(slices.Clone(fds))) != len(fds) {
		return nil, errors.New("descriptors are out of range, or named twice")
	}
	for _, s := range b.Sockets {
		if s.Network != "tcp" && s.Network != "unix" {
			return nil, fmt.Errorf("a socket of network %q", s.Network)
		}
	}
	return b, nil
}

func (b *bequest) fds() []int {
	fds := []int{b.In, b.Out}
	for _, s := range b.Sockets {
		fds = append(fds, s.FD)
	}
	return fds
}

func bind(network, addr string) (net.Listener, error) {
	if network == "unix" {
		return unixsock.Bind(addr)
	}
	return net.Listen(network, addr)
}

// Ready tells the predecessor that this process can take its place, and waits until it no longer accepts. Without a
// predecessor Ready returns at once.
func (p *Process) Ready(ctx context.Context) error {
	p.mu.Lock()
	in, out := p.in, p.out
	p.mu.Unlock()
	if in == nil {
		return nil
	}
	defer in.Close()
	defer out.Close()
	if _, err := out.Write([]byte{sayReady}); err != nil {
		return fmt.Errorf("%w: %w", ErrPredecessor, err)
	}
	if b, err := hear(ctx, in, time.Time{}); err != nil || b != sayBegin {
		return errors.Join(ErrPredecessor, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.in, p.out = nil, nil
	p.unlinkLocked(true)
	return nil
}

// hear reads a byte, until the deadline or the end of ctx.
func hear(ctx context.Context, f *os.File, deadline time.Time) (byte, error) {
	if err := f.SetReadDeadline(deadline); err != nil {
		return 0, err
	}
	over := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(over)
		f.SetReadDeadline(time.Unix(1, 0)) //nolint:errcheck // the pipe may be closed
	})
	defer func() {
		if !stop() {
			<-over
		}
	}()
	var b [1]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return 0, errors.Join(err, ctx.Err())
	}
	return b[0], nil
}

// A Successor is a process that waits to take the place of this one.
type Successor struct {
	p       *Process
	process *os.Process
	in, out *os.File // from it, to it
}

// PID is the number of the process.
func (s *Successor) PID() int { return s.process.Pid }

// Start executes the program anew, from the path and with the arguments that this process was started with, hands it all
// sockets, and returns when it is ready. If it is not ready after ReadyTimeout it is ended. It is told whether this process is
// idle. With an error there is no new process. The caller then stops accepting, and calls Release.
func (p *Process) Start(ctx context.Context, idle bool) (*Successor, error) {
	if os.Getpid() == 1 {
		return nil, errors.New("the first process of a container cannot be replaced, as the container ends with it; start a container of the new image")
	}
	s, err := p.execute(idle)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.path, err)
	}
	b, err := hear(ctx, s.in, time.Now().Add(ReadyTimeout))
	switch {
	case err == nil && b == sayReady:
		return s, nil
	case err == nil:
		return nil, s.failed(fmt.Errorf("process %d says %q, which this version does not know", s.PID(), b))
	case ctx.Err() != nil:
		return nil, s.failed(context.Cause(ctx))
	}
	return nil, s.failed(err)
}

// execute starts the process. The sockets' descriptors are copied without the detours of os.File, which would make them
// block in this process as well.
func (p *Process) execute(idle bool) (*Successor, error) {
	fromNew, newOut, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	newIn, toNew, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, fromNew.Close(), newOut.Close())
	}
	defer newOut.Close()
	defer newIn.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, errors.Join(err, fromNew.Close(), toNew.Close())
	}
	defer null.Close()

	b := bequest{In: 3, Out: 4, Idle: idle}
	files := []uintptr{null.Fd(), 1, 2, newIn.Fd(), newOut.Fd()}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.opened {
		fd, err := duplicate(o.ln)
		if err != nil { // closed since
			continue
		}
		defer syscall.Close(fd)
		b.Sockets = append(b.Sockets, socket{Network: o.network, Addr: o.addr, FD: len(files)})
		files = append(files, uintptr(fd))
	}
	text, err := json.Marshal(b)
	if err != nil {
		return nil, err
	}
	env := slices.DeleteFunc(os.Environ(), func(kv string) bool {
		// The watchdog's variable names the process that it is for.
		return strings.HasPrefix(kv, "WATCHDOG_PID=") || strings.HasPrefix(kv, variable+"=")
	})
	pid, err := syscall.ForkExec(p.path, os.Args, &syscall.ProcAttr{Env: append(env, variable+"="+string(text)), Files: files})
	if err != nil {
		return nil, errors.Join(err, fromNew.Close(), toNew.Close())
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return nil, errors.Join(err, fromNew.Close(), toNew.Close())
	}
	p.unlinkLocked(false)
	return &Successor{p: p, process: process, in: fromNew, out: toNew}, nil
}

// unlinkLocked says whether the files of Unix sockets go when this process closes them.
func (p *Process) unlinkLocked(on bool) {
	for _, o := range p.opened {
		if u, ok := o.ln.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(on)
		}
	}
}

func duplicate(ln fileListener) (fd int, err error) {
	raw, err := ln.SyscallConn()
	if err != nil {
		return -1, err
	}
	var dupErr error
	if err := raw.Control(func(old uintptr) {
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		if fd, dupErr = syscall.Dup(int(old)); dupErr == nil {
			syscall.CloseOnExec(fd)
		}
	}); err != nil {
		return -1, err
	}
	return fd, dupErr
}

// killAfter is how long a process that is not wanted may take to end.
const killAfter = 5 * time.Second

// failed ends the process and says how it went.
func (s *Successor) failed(why error) error {
	s.in.Close()
	s.out.Close() // it hears that it is not wanted
	s.p.mu.Lock()
	s.p.unlinkLocked(true)
	s.p.mu.Unlock()
	s.process.Signal(syscall.SIGTERM) //nolint:errcheck // it may have ended
	kill := time.AfterFunc(killAfter, func() { s.process.Kill() })
	defer kill.Stop()
	state, err := s.process.Wait()
	switch {
	case err != nil:
		return fmt.Errorf("process %d: %w", s.process.Pid, err)
	case errors.Is(why, io.EOF):
		return fmt.Errorf("process %d ended before it was ready: %v; its log says why", s.process.Pid, state)
	case errors.Is(why, os.ErrDeadlineExceeded):
		return fmt.Errorf("process %d was not ready after %v; its log says why", s.process.Pid, ReadyTimeout)
	}
	return why
}

// Release makes the process the service manager's main process and lets it begin. This process no longer accepts by then,
// and finishes what it has.
func (s *Successor) Release(n notify.Notifier) error {
	defer s.in.Close()
	defer s.out.Close()
	n.Main(s.process.Pid)
	select {
	case again := <-s.p.request: // for what was installed after the process was started
		s.process.Signal(again) //nolint:errcheck // the next write says whether it is gone
	default:
	}
	if _, err := s.out.Write([]byte{sayBegin}); err != nil {
		return fmt.Errorf("process %d, which was to take over, is gone: %w", s.process.Pid, err)
	}
	return s.process.Release()
}
