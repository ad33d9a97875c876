package worker

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// maxTail is how much of what a worker wrote is kept, in bytes.
const maxTail = 1024

// tail keeps the end of what a process writes to its standard output and error, without the PIN and without the stacks that a
// Go program writes when it crashes: what counts stands before them.
type tail struct {
	pin  pkcs11.PIN
	read *os.File

	mu     sync.Mutex // guards what follows
	b      []byte
	stacks bool // the rest is stacks
}

// firstStack is how they begin.
var firstStack = []byte("\ngoroutine ")

func newTail(pin pkcs11.PIN) *tail { return &tail{pin: pin} }

// pipe returns what the process is to write to.
func (t *tail) pipe() (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe for the worker's output: %w", err)
	}
	t.read = r
	return w, nil
}

// run reads until the pipe ends or close is called.
func (t *tail) run() {
	defer t.read.Close()
	buf := make([]byte, 4096)
	for {
		n, err := t.read.Read(buf)
		t.add(buf[:n])
		if err != nil {
			return
		}
	}
}

func (t *tail) add(some []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.stacks {
		return
	}
	t.b = append(t.b, some...)
	if i := bytes.Index(t.b, firstStack); i >= 0 {
		t.b, t.stacks = t.b[:i], true
	}
	if len(t.b) > 4*maxTail {
		// Twice of what is shown, so that no part of a PIN that is cut here is.
		t.b = append(t.b[:0], t.b[len(t.b)-2*maxTail:]...)
	}
}

// close makes run return, even if something that the module started still holds the pipe.
func (t *tail) close() {
	if t.read.SetReadDeadline(time.Now().Add(10*time.Millisecond)) != nil {
		t.read.Close()
	}
}

func (t *tail) redact(text string) string { return t.pin.Redact(text) }

// String returns the last lines as one.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.ToValidUTF8(t.redact(string(t.b)), "?")
	if len(text) > maxTail {
		text = text[len(text)-maxTail:]
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	return strings.Join(strings.Fields(text), " ")
}
