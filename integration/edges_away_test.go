//go:build netns

package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Two edges with two connectors of one site, as twoEdges draws them. One part after the other is cut off, restarted or
// stopped, while visitors come.
func TestEdgesAway(t *testing.T) {
	t.Parallel() // with TestLinkFaults: both mostly wait
	w := twoEdges(t)
	// Rules that drop what comes from the site must precede the local table.
	must(t, w.edge.IP("rule", "add", "pref", "100", "lookup", "local"))
	must(t, w.edge.IP("rule", "del", "pref", "0", "lookup", "local"))
	w.wholeOnBoth(t)
	t.Run("a change holds at the other edge", w.changesSpread)
	t.Run("a ticket resumes at the other edge", w.ticketsEverywhere)
	t.Run("an edge cut off from the site forwards", w.forwards)
	t.Run("an edge restarted in order", w.edgeRestarts)
	t.Run("etcd away", w.etcdAway)
	t.Run("an edge killed", w.edgeKilled)
}

// wholeOnBoth waits until both edges say that the tunnel is healthy.
func (w *world) wholeOnBoth(t *testing.T) {
	t.Helper()
	began := time.Now()
	eventually(t, "healthy on both edges", func(ctx context.Context) error {
		for i := range w.Edges {
			v, err := w.info(ctx, i, "a")
			if err != nil {
				return err
			}
			for _, c := range w.Sites[0].Connectors {
				if n := len(v.main(c.Name)); n != 2 || v.Status != "healthy" {
					return fmt.Errorf("edge %d: %s, connector %s has %d sessions there, want 2", i+1, v.Status, c.Name, n)
				}
			}
		}
		return nil
	})
	t.Logf("healthy on both edges after %.1f s", time.Since(began).Seconds())
}

// pageAt is nil when the i-th edge serves the page.
func (w *world) pageAt(i int) func(context.Context) error {
	return func(ctx context.Context) error {
		host, _, _ := net.SplitHostPort(w.Edges[i].Visitors)
		out, err := w.curl(ctx, plain, "/", "-f", "--connect-to", plain+":443:"+host+":443")
		if err == nil && !strings.Contains(out, `private origin "a"`) {
			err = fmt.Errorf("got %q", out)
		}
		return err
	}
}

func (w *world) changesSpread(t *testing.T) {
	for i := range w.Edges {
		prefix := fmt.Sprintf("10.%d.0.0/16", 90+i)
		_, err := w.EdgeAt(t.Context(), i, "route", "add", prefix, "--tunnel", "a")
		must(t, err)
		began := time.Now()
		eventually(t, "the route", func(ctx context.Context) error {
			out, err := w.EdgeAt(ctx, 1-i, "route", "list")
			if err == nil && !strings.Contains(out, prefix) {
				err = fmt.Errorf("got\n%s", out)
			}
			return err
		})
		t.Logf("a route added at edge %d is in force at the other after %.2f s, the command's own time included", i+1, time.Since(began).Seconds())
	}
}

func (w *world) ticketsEverywhere(t *testing.T) {
	at := func(i int, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := w.visitor.Command(ctx, "openssl", append([]string{"s_client", "-connect", w.Edges[i].Visitors, "-servername", plain,
			"-CAfile", w.Roots(), "-verify_return_error", "-ign_eof"}, args...)...)
		cmd.Stdin = strings.NewReader("GET / HTTP/1.1\r\nHost: " + plain + "\r\nConnection: close\r\n\r\n")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for i, version := range []string{"-tls1_2", "-tls1_3"} {
		session := w.Path("session-of-edge" + version)
		if out, err := at(i, version, "-sess_out", session); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		out, err := at(1-i, version, "-sess_in", session)
		if err != nil || !strings.Contains(out, "Reused, ") || !strings.Contains(out, `private origin "a"`) {
			t.Errorf("%s: not resumed at the other edge: %v\n%s", version, err, out)
		}
	}
}

// forwards cuts the second edge off from the site. Its visitors do not notice: their flows go over the first.
func (w *world) forwards(t *testing.T) {
	visitors := startLoop(t.Context(), w.pageAt(1))
	second, _, err := net.SplitHostPort(w.Edges[1].Tunnel)
	must(t, err)
	cut := []string{"pref", "10", "iif", w.edgeDev, "to", second, "blackhole"}
	must(t, w.edge.IP(append([]string{"rule", "add"}, cut...)...))
	began := time.Now()
	eventually(t, "the second edge has no session", func(ctx context.Context) error {
		v, err := w.info(ctx, 1, "a")
		for _, c := range w.Sites[0].Connectors {
			if n := len(v.main(c.Name)); err == nil && n > 0 {
				err = fmt.Errorf("it has %d of %s", n, c.Name)
			}
		}
		if err == nil && v.Status != "degraded" {
			err = fmt.Errorf("the tunnel is %s, want degraded", v.Status)
		}
		return err
	})
	t.Logf("the second edge has no session %.1f s after the cut", time.Since(began).Seconds())
	for range 5 {
		check(t, w.pageAt(1)(t.Context()))
	}
	var list struct {
		Flows []struct {
			Edge string `json:"edge"`
		} `json:"flows"`
	}
	out, err := w.EdgeAt(t.Context(), 1, "flow", "list", "--output", "json")
	must(t, err)
	must(t, json.Unmarshal([]byte(out), &list))
	for _, f := range list.Flows {
		if f.Edge != "edge1" {
			t.Errorf("a flow of the second edge goes by %q, want edge1", f.Edge)
		}
	}
	if len(list.Flows) == 0 {
		t.Error("the second edge has no flows: nothing is proved")
	}
	must(t, w.edge.IP(append([]string{"rule", "del"}, cut...)...))
	w.wholeOnBoth(t)
	visitors.end(t, "at an edge that was cut off and came back")
}

// edgeRestarts restarts each edge in order, with a stream open at it, while visitors ask once at whichever edge takes
// connections.
func (w *world) edgeRestarts(t *testing.T) {
	for i, e := range w.Edges {
		visitors := startLoop(t.Context(), w.visit)
		st := &stream{last: "data: 29\n", done: make(chan error, 1)}
		host, _, err := net.SplitHostPort(e.Visitors)
		must(t, err)
		cmd := w.visitor.Command(t.Context(), "curl", "-sSN", "-m", "60", "--cacert", w.Roots(), "--resolve", plain+":443:"+host, "https://"+plain+"/events?n=30")
		cmd.Stdout, cmd.Stderr = &st.out, &st.out
		must(t, cmd.Start())
		go func() { st.done <- cmd.Wait() }()
		eventually(t, "the first event", func(context.Context) error {
			if !strings.Contains(st.out.String(), "data: 0\n") {
				return errors.New("nothing has come")
			}
			return nil
		})
		must(t, e.Proc.Signal(syscall.SIGTERM))
		st.whole(t)
		ended := time.Now()
		exits(t, e.Proc)
		t.Logf("%s gone %.2f s after its last stream's end", e.Name, time.Since(ended).Seconds())
		must(t, w.RestartEdge(t.Context(), i, false))
		w.wholeOnBoth(t)
		visitors.end(t, "while "+e.Name+" was restarted")
	}
}

// etcdAway stops the store. Visitors are served, changes are refused, and when it is back all is as before.
func (w *world) etcdAway(t *testing.T) {
	visitors := startLoop(t.Context(), w.visit)
	must(t, w.EtcdProc.Signal(syscall.SIGSTOP))
	began := time.Now()
	_, err := w.EdgeAt(t.Context(), 0, "route", "add", "10.97.0.0/16", "--tunnel", "a")
	if err == nil || !strings.Contains(err.Error(), "its store does not answer") {
		t.Errorf("a change without the store: got %v, want an error that names it", err)
	}
	t.Logf("a change is refused after %.1f s: %v", time.Since(began).Seconds(), err)
	for i := range w.Edges {
		if out, err := w.EdgeAt(t.Context(), i, "route", "list"); err != nil || !strings.Contains(out, "10.20.0.0/24") {
			t.Errorf("what is known cannot be read at edge %d: %v\n%s", i+1, err, out)
		}
	}
	time.Sleep(5 * time.Second) // with the refusal's own time longer than edges are believed to live without a beat
	must(t, w.EtcdProc.Signal(syscall.SIGCONT))
	must(t, w.AwaitEtcd(t.Context()))
	began = time.Now()
	eventually(t, "a change with the store back", func(ctx context.Context) error {
		_, err := w.EdgeAt(ctx, 0, "route", "add", "10.96.0.0/16", "--tunnel", "a")
		return err
	})
	eventually(t, "it holds at the other edge", func(ctx context.Context) error {
		out, err := w.EdgeAt(ctx, 1, "route", "list")
		if err == nil && !strings.Contains(out, "10.96.0.0/16") {
			err = fmt.Errorf("got\n%s", out)
		}
		return err
	})
	t.Logf("etcd back: a change holds on both edges after %.1f s", time.Since(began).Seconds())
	w.wholeOnBoth(t)
	visitors.end(t, "while etcd was away")
}

// edgeKilled kills an edge. Visitors ask again when a connection breaks, as browsers do.
func (w *world) edgeKilled(t *testing.T) {
	visit := func(ctx context.Context) error {
		cmd, err := w.Curl(ctx, w.visitor, plain, "/", "-f", "-m", "15", "--retry", "2", "--retry-all-errors")
		if err != nil {
			return err
		}
		var out, errs bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("curl: %w: %s", err, errs.String())
		}
		return nil
	}
	visitors := startLoop(t.Context(), visit)
	killed := w.Edges[0]
	must(t, killed.Proc.Kill())
	began := time.Now()
	eventually(t, "the other edge misses it", func(ctx context.Context) error {
		out, err := w.EdgeAt(ctx, 1, "edge", "list", "--output", "json")
		if err != nil {
			return err
		}
		var edges []struct {
			Name  string `json:"name"`
			Alive bool   `json:"alive"`
		}
		if err := json.Unmarshal([]byte(out), &edges); err != nil {
			return err
		}
		for _, k := range edges {
			if k.Name == killed.Name && k.Alive {
				return errors.New("it is listed as alive")
			}
		}
		return nil
	})
	t.Logf("%s killed: the other says so after %.1f s", killed.Name, time.Since(began).Seconds())
	must(t, w.RestartEdge(t.Context(), 0, true))
	w.wholeOnBoth(t)
	visitors.end(t, "while "+killed.Name+" was killed and came back")
}
