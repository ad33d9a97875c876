package worker

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// proc is the pool's side of one worker process.
type proc struct {
	pool *Pool
	pin  int // which reading of the PIN it has
	cmd  *exec.Cmd
	conn net.Conn
	out  *frameWriter
	wait func() error // for the process' end
	text *tail        // what it wrote to its standard output and error

	started  chan error    // the outcome of the start, once
	sick     chan struct{} // closed when the device failed
	gone     chan struct{} // closed when the process has ended and nothing of it is left
	sessions int           // set before started yields nil
	name     string        // the token's, likewise
	born     time.Time     // likewise
	logs     logLimit      // belongs to read
	failures streak        // belongs to read

	inFlight atomic.Int32
	heard    atomic.Int64 // when a frame came last, since start

	mu       sync.Mutex // guards what follows
	pending  map[uint32]*op
	last     uint32 // id
	given    map[uint32]struct{}
	busy     int64 // when pending was empty last, since start
	dead     bool  // nothing is sent any more
	quitting bool
	state    frameType // of the start: the frame that comes next, 0 afterwards
	isSick   bool
	reason   string // of its end, see Reasons; the first counts
	cause    error
}

// op is one operation in a worker's hands. Operations are used again.
type op struct {
	done   chan struct{} // one value when the rest is set
	id     uint32
	typ    frameType
	of     *key // nil for what concerns no key
	result []byte
	err    error
	lost   bool // the worker is gone
	stuck  bool // because of this operation
	listed [][]byte
	size   int // of listed, in bytes
}

var ops = sync.Pool{New: func() any { return &op{done: make(chan struct{}, 1)} }}

func (o *op) reset() { *o = op{done: o.done} }

// spawn starts a process. The caller waits for started.
func (p *Pool) spawn(pin pkcs11.PIN, generation int) (w *proc, err error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	conn, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	files = append(files, theirs)
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	secret, err := pinPipe(pin)
	if err != nil {
		return nil, err
	}
	files = append(files, secret)
	w = &proc{
		pool: p, pin: generation, conn: conn, out: newFrameWriter(), text: newTail(pin),
		started: make(chan error, 1), sick: make(chan struct{}), gone: make(chan struct{}),
		pending: map[uint32]*op{}, given: map[uint32]struct{}{}, state: frameConfined,
	}
	output, err := w.text.pipe()
	if err != nil {
		return nil, err
	}
	files = append(files, output)
	if w.cmd, err = p.command(); err != nil {
		w.text.read.Close()
		return nil, err
	}
	w.cmd.Stdout, w.cmd.Stderr, w.cmd.ExtraFiles = output, output, []*os.File{theirs, secret}
	w.heard.Store(sinceStart())
	if err := w.cmd.Start(); err != nil {
		w.text.read.Close()
		return nil, fmt.Errorf("start worker %s: %w", w.cmd.Path, err)
	}
	w.out.send(frameConfine, 0, encodeJSON(p.confineRequest()))
	w.wait = w.cmd.Wait
	go w.run()
	return w, nil
}

// command is the process to be, without its descriptors.
func (p *Pool) command() (*exec.Cmd, error) {
	var cmd *exec.Cmd
	if len(p.cfg.Command) > 0 {
		cmd = exec.Command(p.cfg.Command[0], p.cfg.Command[1:]...)
	} else {
		self, err := executable()
		if err != nil {
			return nil, fmt.Errorf("find this program: %w", err)
		}
		cmd = &exec.Cmd{Path: self, Args: []string{os.Args[0], "worker"}}
	}
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		switch name {
		case confinedVariable, "GOTRACEBACK", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "WATCHDOG_USEC",
			"WATCHDOG_PID", "CREDENTIALS_DIRECTORY":
			continue // the server's own
		}
		cmd.Env = append(cmd.Env, entry)
	}
	cmd.Env = append(cmd.Env, "GOTRACEBACK=none")
	// A group of its own: signals of a terminal are the server's.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd, nil
}

func socketPair() (net.Conn, *os.File, error) {
	// Not every system makes sockets that are closed by an execution: until they are, none may come.
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "worker"), os.NewFile(uintptr(fds[1]), "pool")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make a socket pair: %w", err)
	}
	return conn, theirs, nil
}

// pinPipe returns the reading end of a pipe that holds the PIN and nothing else.
func pinPipe(pin pkcs11.PIN) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe for the PIN: %w", err)
	}
	defer w.Close()
	if _, err := pin.WriteTo(w); err != nil {
		r.Close()
		return nil, errors.New("the PIN cannot be handed over")
	}
	return r, nil
}

// run is the process' life on this side: it reads what the worker says until it is gone.
func (w *proc) run() {
	var rest sync.WaitGroup
	rest.Go(func() {
		if err := w.out.run(w.conn); err != nil {
			w.end("", err)
		}
	})
	rest.Go(w.text.run)
	w.end("", w.read())
	w.out.close()
	exit := w.reap(leaveWait + reapWait)
	w.text.close()
	rest.Wait()
	w.conclude(exit)
	close(w.gone)
}

// How long a process may live on when its socket is closed, and after it is killed then.
const (
	leaveWait = time.Second
	reapWait  = 2 * time.Second
)

// errLeftBehind is the end of a process that has none: no signal ends one that waits in a device's driver.
var errLeftBehind = errors.New("it cannot be killed: the kernel holds it, as it does while a device's driver waits")

// reap waits for the end of the process, whose socket is closed: one that is well leaves by itself, and others are made to. One
// that the kernel holds for longer than the limit is left behind, or no other could take its place.
func (w *proc) reap(limit time.Duration) error {
	late := time.AfterFunc(leaveWait, func() { _ = w.cmd.Process.Kill() })
	defer late.Stop()
	over := time.NewTimer(limit)
	defer over.Stop()
	exited := make(chan error, 1)
	go func() { exited <- w.wait() }()
	select {
	case exit := <-exited:
		return exit
	case <-over.C:
	}
	p := w.pool
	p.log.Error("worker cannot be killed and is left behind", "pid", w.cmd.Process.Pid, "count", p.behind.Add(1))
	go func() { // for as long as the kernel takes: nobody waits for it
		<-exited
		p.behind.Add(-1)
	}()
	return errLeftBehind
}

// read handles frames until there are no more.
func (w *proc) read() error {
	r := newFrameReader(w.conn)
	for {
		f, err := r.next()
		if err != nil {
			return err
		}
		if len(r.rest) == 0 {
			w.heard.Store(sinceStart())
		}
		if err := w.handle(f); err != nil {
			return err
		}
	}
}

// kill ends the process for a reason. What it has said is still read, but not for long: the socket of one that cannot be killed stays open.
func (w *proc) kill(reason string, cause error) {
	w.blame(reason, cause)
	_ = w.cmd.Process.Kill()
	_ = w.conn.SetReadDeadline(time.Now().Add(leaveWait))
}

// blame records why the process ends. The first reason counts.
func (w *proc) blame(reason string, cause error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.reason == "" {
		w.reason, w.cause = reason, cause
	}
}

// end takes everything out of the worker's hands.
func (w *proc) end(reason string, cause error) {
	if errors.Is(cause, errFrame) {
		reason = "protocol"
	}
	if reason != "" {
		w.blame(reason, cause)
	}
	w.mu.Lock()
	w.dead = true
	lost := w.pending
	w.pending = nil
	w.mu.Unlock()
	w.pool.withdraw(w)
	w.pool.logins.leave(w)
	w.conn.Close()
	for _, o := range lost {
		o.lost = true
		o.done <- struct{}{}
	}
	w.inFlight.Store(0)
}

// conclude finds out why the process ended, if that is not known, and tells who waits for its start.
func (w *proc) conclude(exit error) {
	text := w.text.String()
	var reason string
	cause := errors.New("it left")
	if errors.Is(exit, errLeftBehind) {
		reason, cause = "silent", exit
	}
	var status *exec.ExitError
	if errors.As(exit, &status) {
		reason, cause = "exit", exit
		if ws, ok := status.Sys().(syscall.WaitStatus); ok && (ws.Signaled() || ws.ExitStatus() == 2) {
			reason = "crash" // 2 is how Go programs end when a signal such as SIGSEGV hits them
		}
	}
	w.mu.Lock()
	switch {
	case w.reason != "":
	case w.quitting && reason == "":
	case reason == "":
		w.reason, w.cause = "exit", cause
	default:
		w.reason, w.cause = reason, cause
	}
	if w.cause != nil && text != "" {
		w.cause = fmt.Errorf("%w: %s", w.cause, text)
	}
	err := w.cause
	w.mu.Unlock()
	if err == nil {
		err = errors.New("it left")
	}
	w.report(unavailable{fmt.Errorf("worker %d ended while it started: %w", w.cmd.Process.Pid, err)})
}

// report tells the outcome of the start, the first time.
func (w *proc) report(err error) {
	select {
	case w.started <- err:
	default:
	}
}

// waitStart waits until the worker is logged in.
func (w *proc) waitStart(ctx context.Context, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case err := <-w.started:
		return err
	case <-timer.C:
		err := unavailable{fmt.Errorf("the module was not logged in after %v", limit)}
		w.kill("start", err)
		<-w.gone
		return err
	case <-ctx.Done():
		w.kill("start", context.Cause(ctx))
		<-w.gone
		return context.Cause(ctx)
	}
}

// quit lets the worker finish what it holds and leave, within the limit.
func (w *proc) quit(limit time.Duration) {
	w.mu.Lock()
	if !w.quitting {
		w.quitting = true
		w.out.send(frameQuit, 0)
	}
	w.mu.Unlock()
	w.pool.withdraw(w)
	select {
	case <-w.gone:
	case <-time.After(limit):
		w.kill("silent", errors.New("it did not leave when it was told to"))
		<-w.gone
	}
}
