//go:build netns

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
)

const socketOrigin = "10.20.0.20:8091"

// A tunnelConfig is what the edge tells of a tunnel's ingress rules.
type tunnelConfig struct {
	Version    uint64
	Connectors []struct {
		Connector        string
		Applied, Refused uint64
		Error            string
	}
}

func (w *world) tunnelConfig(t *testing.T, edge int, tunnel string) (v tunnelConfig) {
	t.Helper()
	out, err := w.EdgeAt(t.Context(), edge, "tunnel", "config", "get", tunnel, "--output", "json")
	must(t, err)
	must(t, json.Unmarshal([]byte(out), &v))
	return v
}

// serveSockets is an origin that sends WebSocket messages back, until the test ends.
func (w *world) serveSockets(t *testing.T, addr string) {
	t.Helper()
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
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
	})}
	ln := w.listen(t, addr)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	t.Cleanup(func() { srv.Close(); <-served })
}

// socket opens a WebSocket at an edge. Its messages must come back for as long as the test runs.
func (w *world) socket(t *testing.T, edge, host string) (speak func(word string)) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: w.trust(host), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return w.visitor.Dial(ctx, edge)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	var c *websocket.Conn
	eventually(t, "a WebSocket", func(ctx context.Context) (err error) {
		c, _, err = websocket.Dial(ctx, "https://"+host+"/ws", &websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}})
		return err
	})
	t.Cleanup(func() { c.CloseNow() })
	return func(word string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err := c.Write(ctx, websocket.MessageText, []byte(word))
		if err == nil {
			var got []byte
			if _, got, err = c.Read(ctx); err == nil && string(got) != word {
				err = fmt.Errorf("got %q", got)
			}
		}
		if err != nil {
			t.Fatalf("the WebSocket of %s does not outlive it: %v", word, err)
		}
	}
}

// configurations hands a tunnel's connectors rules: moved from their own files, stale, bad, refused by them, and several at one
// time through both edges. A WebSocket through each edge outlives all of it.
func (w *twoByTwo) configurations(t *testing.T) {
	w.serveSockets(t, socketOrigin)
	speak1, speak2 := w.socket(t, edgeVisitors, socketHost), w.socket(t, "203.0.113.9:443", socketHost)
	inForce := func(what string, version uint64, status string) {
		t.Helper()
		for edge := range 2 {
			eventually(t, what, func(ctx context.Context) error {
				v := w.tunnelConfig(t, edge, "a")
				applied := 0
				for _, c := range v.Connectors {
					if c.Applied == version {
						applied++
					}
				}
				if applied != 2 {
					return fmt.Errorf("edge %d: %d connectors have version %d: %+v", edge, applied, version, v)
				}
				out, err := w.page(ctx, edge, socketHost, "/elsewhere", "-o", "/dev/null", "-w", "%{http_code}")
				if err == nil && out != status {
					err = fmt.Errorf("edge %d: got %s, want %s", edge, out, status)
				}
				return err
			})
		}
		speak1(what)
		speak2(what)
	}
	speak1("the local file")
	speak2("the local file")
	set := func(edge int, rules string, args ...string) error {
		file := w.Path(fmt.Sprintf("rules-%d.yaml", time.Now().UnixNano()))
		must(t, w.WriteYAML(strings.TrimPrefix(file, w.Path()+"/"), rulesFor(rules)))
		_, err := w.EdgeAt(t.Context(), edge, append([]string{"tunnel", "config", "set", "a", file}, args...)...)
		return err
	}
	w.admin(t, "tunnel", "config", "import", "a", w.Path("connector-a.yaml"))
	inForce("import", 1, "404")
	if err := set(1, "http_status:410", "--if-version", "0"); err == nil || !strings.Contains(err.Error(), "has version 1, not 0") {
		t.Errorf("stale: got %v", err)
	}
	if err := set(1, "gopher://10.20.0.20"); err == nil || !strings.Contains(err.Error(), "is no service") {
		t.Errorf("bad: got %v", err)
	}
	inForce("refused by the edge", 1, "404")

	// What a connector's allow-list does not permit, it refuses as a whole, and says so on both edges.
	must(t, set(0, "http://10.99.0.1:80"))
	for edge := range 2 {
		eventually(t, "the connectors refuse", func(context.Context) error {
			v := w.tunnelConfig(t, edge, "a")
			refused := 0
			for _, c := range v.Connectors {
				if c.Refused == 2 && strings.Contains(c.Error, "10.99.0.1") {
					refused++
				}
			}
			if v.Version != 2 || refused != 2 {
				return fmt.Errorf("edge %d: got %+v", edge, v)
			}
			return nil
		})
	}
	inForce("refused by the connectors", 1, "404")

	// Of changes that know the same version one wins, whichever edge they go through.
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { errs[i] = set(i%2, fmt.Sprint("http_status:", 410+i), "--if-version", "2") })
	}
	wg.Wait()
	won := -1
	for i, err := range errs {
		switch {
		case err == nil && won >= 0:
			t.Errorf("changes %d and %d both won", won, i)
		case err == nil:
			won = i
		case !strings.Contains(err.Error(), "has version 3, not 2"):
			t.Errorf("change %d: got %v", i, err)
		}
	}
	if won < 0 {
		t.Fatal(errors.Join(errs...))
	}
	inForce("concurrent", 3, fmt.Sprint(410+won))
	w.admin(t, "tunnel", "config", "clear", "a")
	inForce("clear", 4, "404")
}

// rulesFor are ingress rules with a service for all but the WebSocket.
func rulesFor(service string) obj {
	return obj{"ingress": []obj{{"hostname": socketHost, "path": "^/ws", "service": "http://" + socketOrigin}, {"service": service}}}
}
