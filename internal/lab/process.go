package lab

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A Process is one program of the lab. Its methods are safe for concurrent use.
type Process struct {
	name string
	ns   *testnet.Namespace
	path string
	args []string
	env  []string
	sink func(process, line string)
	file string // takes the output if there is no sink

	mu   sync.Mutex // guards the fields below
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended and its output is read
	err  error
	log  bytes.Buffer // all output of all runs, if there is a sink
}

// Setenv adds NAME=value to the environment of the runs that follow.
func (p *Process) Setenv(kv ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.env = append(p.env, kv...)
}

// Start runs the program. It is an error to start one that runs.
func (p *Process) Start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running() {
		return fmt.Errorf("lab: %s runs already", p.name)
	}
	cmd := p.ns.Command(context.Background(), p.path, p.args...)
	cmd.Env = append(os.Environ(), p.env...)
	// A Ctrl-C on the terminal must reach the lab alone, which then stops its processes in order; and should the lab
	// itself be killed, they must not outlive it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	r, w, err := p.output()
	if err != nil {
		return err
	}
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		if r != nil {
			r.Close()
		}
		return fmt.Errorf("lab: start %s: %w", p.name, err)
	}
	done := make(chan struct{})
	p.cmd, p.done, p.err = cmd, done, nil
	go func() {
		defer close(done)
		if r != nil {
			p.read(r)
			r.Close()
		}
		err := cmd.Wait()
		p.mu.Lock()
		p.err = err
		p.mu.Unlock()
	}()
	return nil
}

// output returns where the process writes, and where its lines are read if somebody wants them as they come.
func (p *Process) output() (r, w *os.File, err error) {
	if p.sink != nil {
		return os.Pipe()
	}
	w, err = os.OpenFile(p.file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	return nil, w, err
}

func (p *Process) running() bool {
	if p.done == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

func (p *Process) read(r io.Reader) {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		p.mu.Lock()
		p.log.Write(sc.Bytes())
		p.log.WriteByte('\n')
		p.mu.Unlock()
		p.sink(p.name, sc.Text())
	}
	io.Copy(io.Discard, r) // after a line too long, so that the process does not block
}

// Signal sends a signal to a running process.
func (p *Process) Signal(s os.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.running() {
		return fmt.Errorf("lab: %s does not run", p.name)
	}
	return p.cmd.Process.Signal(s)
}

// Kill ends the process without a chance to clean up, and waits for its end.
func (p *Process) Kill() error { return p.end(syscall.SIGKILL, 10*time.Second) }

// Stop ends the process by SIGTERM, and by SIGQUIT and SIGKILL if it has not ended after two minutes, when every grace that programs give
// by default is long over; that is an error.
func (p *Process) Stop() error { return p.end(syscall.SIGTERM, 2*time.Minute) }

func (p *Process) end(s os.Signal, patience time.Duration) error {
	p.mu.Lock()
	if !p.running() {
		p.mu.Unlock()
		return nil
	}
	cmd, done := p.cmd, p.done
	p.mu.Unlock()
	if err := cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-done:
		return nil
	case <-time.After(patience):
		cmd.Process.Signal(syscall.SIGQUIT) // a Go program tells what it was doing
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			cmd.Process.Kill()
			<-done
		}
		return fmt.Errorf("lab: %s did not end within %v of %v", p.name, patience, s)
	}
}

// Wait returns how the process ended.
func (p *Process) Wait(ctx context.Context) error {
	p.mu.Lock()
	done := p.done
	p.mu.Unlock()
	if done == nil {
		return fmt.Errorf("lab: %s was never started", p.name)
	}
	select {
	case <-done:
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Running reports whether the process has not ended.
func (p *Process) Running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.running()
}

// Name is what the lab calls the process.
func (p *Process) Name() string { return p.name }

// PID is the process id of the newest run, 0 before the first.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return 0
	}
	return p.cmd.Process.Pid
}

// Log returns what the process has printed so far, over all its runs.
func (p *Process) Log() string {
	if p.sink == nil {
		b, err := os.ReadFile(p.file)
		if err != nil {
			return err.Error()
		}
		return string(b)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.log.String()
}

// WaitLog waits until the output after offset from holds text, and fails if the process ends first.
func (p *Process) WaitLog(ctx context.Context, from int, text string) error {
	for {
		if strings.Contains(p.Log()[from:], text) {
			return nil
		}
		if !p.Running() {
			return fmt.Errorf("lab: %s ended before it said %q; it said:\n%s", p.name, text, tail(p.Log(), 15))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("lab: %s did not say %q: %w; it said:\n%s", p.name, text, ctx.Err(), tail(p.Log(), 15))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func tail(s string, lines int) string {
	parts := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(parts[max(0, len(parts)-lines):], "\n")
}
