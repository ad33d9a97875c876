//go:build netns

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A manager stands in for the service manager of one program: it follows which process is the main one, and hears from that
// process alone.
type manager struct {
	path string
	conn *net.UnixConn

	mu    sync.Mutex // guards the fields below
	main  int
	ready int  // how often a process has said that it serves
	ended bool // the main process has said that the unit stops
}

// manage starts a program of the lab anew, under a manager. What runs of it when the test ends is stopped.
func manage(t *testing.T, p *lab.Process) *manager {
	t.Helper()
	dir, err := os.MkdirTemp("", "khit")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &manager{path: filepath.Join(dir, "notify")}
	m.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: m.path, Net: "unixgram"})
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(m.read)
	t.Cleanup(func() {
		if pid := m.pid(); pid != p.PID() {
			syscall.Kill(pid, syscall.SIGTERM)
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute) // the test's own has ended
			defer cancel()
			check(t, lab.Eventually(ctx, func(context.Context) error { return gone(pid) }))
		}
		m.conn.Close()
		wg.Wait()
	})
	must(t, p.Stop())
	p.Setenv("NOTIFY_SOCKET=" + m.path)
	must(t, p.Start())
	m.mu.Lock()
	m.main = p.PID()
	m.mu.Unlock()
	m.await(t, p.PID(), 1)
	return m
}

func (m *manager) read() {
	buf := make([]byte, 4096)
	for {
		n, err := m.conn.Read(buf)
		if err != nil {
			return
		}
		m.mu.Lock()
		for line := range strings.Lines(string(buf[:n])) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			switch key {
			case "MAINPID":
				m.main, _ = strconv.Atoi(value)
			case "READY":
				m.ready++
			case "STOPPING":
				m.ended = true
			}
		}
		m.mu.Unlock()
	}
}

func (m *manager) pid() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.main
}

// await waits until another process than the one given is the main one, or that one itself when it is the first, and has
// said so many times that it serves.
func (m *manager) await(t *testing.T, pid, ready int) {
	t.Helper()
	eventually(t, "a process that serves", func(context.Context) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.ended {
			t.Fatal("the main process says that the unit stops, upon which the service manager ends all of it")
		}
		if m.ready < ready || ready > 1 && m.main == pid {
			return fmt.Errorf("process %d is the main one, ready %d times", m.main, m.ready)
		}
		return nil
	})
}

// gone returns an error while a process lives. One that nobody has waited for does not.
func gone(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil || strings.Contains(string(b), ") Z ") {
		return nil
	}
	return fmt.Errorf("process %d lives", pid)
}

// upgrade has the main process replaced and returns the one before, which may still drain.
func (m *manager) upgrade(t *testing.T) (before int) {
	t.Helper()
	before = m.pid()
	m.mu.Lock()
	ready := m.ready
	m.mu.Unlock()
	must(t, syscall.Kill(before, syscall.SIGUSR2))
	m.await(t, before, ready+1)
	return before
}

// load asks for a page, again and again, over connections that are kept and over new ones, until stop is called, which
// returns how many pages came.
func (w *world) load(t *testing.T) (stop func() int64) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var pages atomic.Int64
	for i := range 6 {
		client := w.client(i%2 == 0)
		wg.Go(func() {
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				if err := page(client); err != nil {
					t.Errorf("a request failed: %v", err)
					return
				}
				pages.Add(1)
			}
		})
	}
	return func() int64 {
		cancel()
		wg.Wait()
		return pages.Load()
	}
}

// client returns a visitor.
func (w *world) client(keep bool) *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: w.trust(plain), DisableKeepAlives: !keep,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return w.visitor.Dial(ctx, edgeVisitors) }}}
}

func page(client *http.Client) error {
	resp, err := client.Get("https://" + plain + "/")
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != http.StatusOK || !strings.Contains(string(b), `private origin "a"`)) {
		err = fmt.Errorf("status %s, %q", resp.Status, b)
	}
	return err
}

// webSocket is one to an origin that echoes.
func (w *world) webSocket(t *testing.T) *websocket.Conn {
	t.Helper()
	client := w.client(true)
	client.Timeout = 0
	c, _, err := websocket.Dial(t.Context(), "https://"+plain+"/ws", &websocket.DialOptions{HTTPClient: client})
	must(t, err)
	t.Cleanup(func() {
		c.CloseNow()
		client.CloseIdleConnections()
	})
	return c
}

func say(ctx context.Context, c *websocket.Conn, text string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := c.Write(ctx, websocket.MessageText, []byte(text)); err != nil {
		return err
	}
	_, got, err := c.Read(ctx)
	if err == nil && string(got) != text {
		err = fmt.Errorf("got %q, want %q", got, text)
	}
	return err
}

// echoOrigin takes the place of site a's origin with one that also has WebSockets.
func (w *world) echoOrigin(t *testing.T) {
	t.Helper()
	must(t, w.Sites[0].Origin.Stop())
	mux := http.NewServeMux()
	mux.Handle("/", lab.Origin("a"))
	mux.HandleFunc("/ws", func(rw http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(rw, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			typ, msg, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), typ, msg) != nil {
				return
			}
		}
	})
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: mux}
	ln := w.listen(t, origin)
	var wg sync.WaitGroup
	wg.Go(func() { srv.Serve(ln) })
	t.Cleanup(func() {
		srv.Close()
		wg.Wait()
	})
}

// A single connector and a single edge: while visitors come, the connector is replaced twice in a row, and then by one that
// cannot start. No request fails, and what was open before goes on until it ends.
func TestConnectorTakeover(t *testing.T) {
	programs := linkPrograms(t)
	w := upWith(t, programs, onePlainZone, (*world).siteA)
	w.echoOrigin(t)
	eventually(t, "a page", func(ctx context.Context) error { _, err := w.curl(ctx, plain, "/", "-f"); return err })
	m := manage(t, w.Sites[0].Connector)
	eventually(t, "a page", func(ctx context.Context) error { _, err := w.curl(ctx, plain, "/", "-f"); return err })
	stop := w.load(t)
	c := w.webSocket(t)
	must(t, say(t.Context(), c, "before"))
	events, err := w.client(true).Get("https://" + plain + "/events?n=60")
	must(t, err)
	defer events.Body.Close()

	first := m.upgrade(t)
	second := m.upgrade(t)
	if third := m.pid(); first == second || second == third {
		t.Errorf("processes %d, %d, %d: want three", first, second, third)
	}
	must(t, say(t.Context(), c, "over the first process"))
	if err := gone(first); err == nil {
		t.Error("the first process has not waited for its flows")
	}
	b, err := io.ReadAll(events.Body)
	if n := strings.Count(string(b), "data:"); err != nil || n != 60 {
		t.Errorf("got %d events, %v, want 60", n, err)
	}
	must(t, c.Close(websocket.StatusNormalClosure, ""))
	for _, pid := range []int{first, second} {
		eventually(t, "a process that was replaced", func(context.Context) error { return gone(pid) })
	}

	third := m.pid()
	mend := breakProgram(t, filepath.Join(programs, "keyhaven-connector"))
	must(t, syscall.Kill(third, syscall.SIGUSR2))
	eventually(t, "the failure", func(context.Context) error {
		if !strings.Contains(w.Sites[0].Connector.Log(), "no other process takes over, this one goes on") {
			return errors.New("not logged")
		}
		return nil
	})
	mend()
	if err := gone(third); err == nil || m.pid() != third {
		t.Errorf("process %d ended for one that cannot start", third)
	}
	time.Sleep(time.Second) // with visitors
	fourth := m.pid()
	m.upgrade(t)
	eventually(t, "the last process that was replaced", func(context.Context) error { return gone(fourth) })
	t.Logf("%d pages", stop())
	w.opsAnswers(t, w.sites[0], "127.0.0.1:9601")
}

// opsAnswers asks for health where the first process opened the socket.
func (w *world) opsAnswers(t *testing.T, ns *testnet.Namespace, addr string) {
	t.Helper()
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return ns.Dial(ctx, addr) }}}
	resp, err := client.Get("http://" + addr + "/readyz")
	must(t, err)
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("/readyz of the process that took over: %s", resp.Status)
	}
}

// linkPrograms returns a directory through which the programs are called, so that they can be replaced there.
func linkPrograms(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	entries, err := os.ReadDir(bin)
	must(t, err)
	for _, e := range entries {
		must(t, os.Symlink(filepath.Join(bin, e.Name()), filepath.Join(dir, e.Name())))
	}
	return dir
}

// breakProgram puts one in place of a program that ends at once, until mend is called.
func breakProgram(t *testing.T, path string) (mend func()) {
	t.Helper()
	must(t, os.Rename(path, path+".good"))
	must(t, os.WriteFile(path, []byte("#!/bin/sh\nexit 3\n"), 0o755))
	return func() { must(t, os.Rename(path+".good", path)) }
}

// The key server is replaced while visitors make handshakes: none fails, and the audit log is one chain.
func TestKeyServerTakeover(t *testing.T) {
	programs := linkPrograms(t)
	w := upWith(t, programs, onePlainZone, (*world).siteA)
	m := manage(t, w.KeyServer)
	eventually(t, "a page", func(ctx context.Context) error { _, err := w.curl(ctx, plain, "/", "-f"); return err })
	// The edge does not wait for a key server whose connections come and go, which they did when this one was started anew.
	time.Sleep(3 * time.Second)
	stop := w.load(t)
	for range 2 {
		before := m.upgrade(t)
		eventually(t, "the end of the process that was replaced", func(context.Context) error { return gone(before) })
	}
	pid := m.pid()
	mend := breakProgram(t, filepath.Join(programs, "keyhaven-keyserver"))
	must(t, syscall.Kill(pid, syscall.SIGUSR2))
	eventually(t, "the failure", func(context.Context) error {
		if !strings.Contains(w.KeyServer.Log(), "no other process takes over, this one goes on") {
			return errors.New("not logged")
		}
		return nil
	})
	mend()
	time.Sleep(time.Second) // with visitors
	t.Logf("%d pages", stop())
	if m.pid() != pid {
		t.Errorf("process %d is the main one after one could not start, want %d", m.pid(), pid)
	}
	w.opsAnswers(t, w.sites[0], "127.0.0.1:9602")
}

// A single edge is replaced while visitors come, over kept connections and new ones: each waits at most, and none is refused.
func TestEdgeTakeover(t *testing.T) {
	programs := linkPrograms(t)
	w := upWith(t, programs, onePlainZone, (*world).siteA)
	m := manage(t, w.EdgeProc)
	eventually(t, "a page", func(ctx context.Context) error { _, err := w.curl(ctx, plain, "/", "-f"); return err })
	stop := w.load(t)
	for range 2 {
		before := m.upgrade(t)
		eventually(t, "the end of the process that was replaced", func(context.Context) error { return gone(before) })
	}
	t.Logf("%d pages", stop())
	if out, err := w.Edge(t.Context(), "status"); err != nil {
		t.Errorf("status of the edge that took over: %v: %s", err, out)
	}
	w.opsAnswers(t, w.edge, "127.0.0.1:9600")
}
