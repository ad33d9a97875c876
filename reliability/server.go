package reliability

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// A server is the key server of one row.
type server struct {
	cmd     *exec.Cmd
	started string        // when the kernel says that the process began
	done    chan struct{} // closed when it has ended and all its output was read

	mu  sync.Mutex // guards log
	log bytes.Buffer
}

// startServer runs the program and waits until it serves.
func startServer(ctx context.Context, program, config string) (*server, error) {
	s := &server{done: make(chan struct{})}
	s.cmd = exec.Command(program, "run", "--config", config, "--log-format", "json")
	s.cmd.Stdout, s.cmd.Stderr = s, s
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("reliability: start the key server: %w", err)
	}
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait() // the state is read from ProcessState
	}()
	err := poll(ctx, "the key server serves", func() bool { return s.address("serving") != "" || s.ended() })
	if err == nil && s.ended() {
		err = errors.New("the key server ended")
	}
	if err == nil {
		s.started, err = startTime(s.cmd.Process.Pid)
	}
	if err != nil {
		s.kill()
		return nil, fmt.Errorf("reliability: %w; it said:\n%s", err, s.story())
	}
	return s, nil
}

// Write keeps what the server and its workers print.
func (s *server) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(b)
}

func (s *server) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// story is the log without the operations that went well, and not all of what is left.
func (s *server) story() string {
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(s.text()), "\n"), func(l string) bool { return strings.Contains(l, `"result":"ok"`) })
	const most = 25
	if len(lines) > 2*most {
		lines = slices.Concat(lines[:most], []string{"…"}, lines[len(lines)-most:])
	}
	return strings.Join(lines, "\n")
}

func (s *server) ended() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// address returns the address in the log line with the message, or "".
func (s *server) address(msg string) string {
	for line := range strings.Lines(s.text()) {
		var l struct{ Msg, Addr string }
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == msg {
			return l.Addr
		}
	}
	return ""
}

// get asks the operations endpoint and returns the status and the text.
func (s *server) get(ctx context.Context, path string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.address("serving health and metrics")+path, nil)
	if err != nil {
		return 0, "", err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

// same reports whether the process is the one that was started.
func (s *server) same() bool {
	now, err := startTime(s.cmd.Process.Pid)
	return !s.ended() && err == nil && now == s.started
}

// stop sends SIGTERM and returns the exit status.
func (s *server) stop(ctx context.Context) (int, error) {
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return -1, fmt.Errorf("reliability: stop the key server: %w", err)
	}
	err := poll(ctx, "the key server ends after SIGTERM", s.ended)
	s.kill()
	return s.cmd.ProcessState.ExitCode(), err
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill() // it may have ended
	<-s.done
}

// statFields returns the fields of /proc/PID/stat behind the name, beginning with the state.
func statFields(pid int) ([]string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(f) < 20 {
		return nil, fmt.Errorf("/proc/%d/stat is short", pid)
	}
	return f, nil
}

func startTime(pid int) (string, error) {
	f, err := statFields(pid)
	if err != nil {
		return "", err
	}
	return f[19], nil
}

func parent(pid int) string {
	f, err := statFields(pid)
	if err != nil {
		return ""
	}
	return f[1]
}
