package qemu

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// qmp is a connection to QEMU's monitor, over which one command goes at a time.
type qmp struct {
	c       net.Conn
	replies chan qmpMessage
	done    chan struct{} // closed when QEMU has hung up

	mu sync.Mutex // held during a command
}

type qmpMessage struct {
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Desc string `json:"desc"`
	} `json:"error"`
	Event string `json:"event"`
	QMP   any    `json:"QMP"`
}

var errQMPGone = errors.New("qemu: QEMU has ended")

// dialQMP connects to the monitor's socket, for which it waits as long as running says that QEMU has not ended.
func dialQMP(socket string, running func() bool) (*qmp, error) {
	for {
		c, err := net.Dial("unix", socket)
		if err == nil {
			q := &qmp{c: c, replies: make(chan qmpMessage, 1), done: make(chan struct{})}
			go q.read()
			_, err = q.do("qmp_capabilities", nil)
			return q, err
		}
		if !running() {
			return nil, errQMPGone
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func (q *qmp) read() {
	defer close(q.done)
	defer q.c.Close()
	sc := bufio.NewScanner(q.c)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var m qmpMessage
		if json.Unmarshal(sc.Bytes(), &m) != nil || m.Event != "" || m.QMP != nil {
			continue
		}
		q.replies <- m // somebody waits, as QEMU only answers
	}
}

func (q *qmp) do(command string, args map[string]any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b, err := json.Marshal(map[string]any{"execute": command, "arguments": args})
	if args == nil {
		b, err = json.Marshal(map[string]any{"execute": command})
	}
	if err != nil {
		return nil, err
	}
	if _, err := q.c.Write(append(b, '\n')); err != nil {
		return nil, errQMPGone
	}
	select {
	case m := <-q.replies:
		if m.Error != nil {
			return nil, fmt.Errorf("qemu: %s: %s", command, m.Error.Desc)
		}
		return m.Return, nil
	case <-q.done:
		return nil, errQMPGone
	}
}

// close hangs up and waits for the reader.
func (q *qmp) close() {
	q.c.Close()
	<-q.done
}
