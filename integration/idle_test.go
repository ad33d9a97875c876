//go:build netns

package integration

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// crowd is how many idle WebSockets and UDP sessions there are, for how long they are watched, and after what time the port
// ends those of UDP, of which nobody says that they are over: 10,000 if KEYHAVEN_FULL is set, as make idle does, and fewer
// otherwise, since opening so many takes minutes.
func crowd() (n int, watch, udpIdle time.Duration) {
	if os.Getenv("KEYHAVEN_FULL") != "" {
		return 10_000, 20 * time.Second, 40 * time.Second
	}
	return 1_000, 2 * time.Second, 5 * time.Second
}

// A cost is what a program takes.
type cost struct {
	rss         int // KiB
	descriptors int
}

func costOf(t *testing.T, p *lab.Process) (c cost) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &c.rss) //nolint:errcheck // other lines
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.PID()))
	must(t, err)
	c.descriptors = len(fds)
	return c
}

// goroutines is how many a program has, by its metrics.
func goroutines(ctx context.Context, t *testing.T, ns *testnet.Namespace, ops string) (n int) {
	t.Helper()
	out, err := ns.Command(ctx, "curl", "-sS", "-m", "5", "http://"+ops+"/metrics").Output()
	must(t, err)
	for line := range strings.Lines(string(out)) {
		fmt.Sscanf(line, "go_goroutines %d", &n) //nolint:errcheck // other lines
	}
	if n == 0 {
		t.Fatal("the metrics have no go_goroutines")
	}
	return n
}

// Idle WebSockets and UDP sessions cost memory and descriptors that stay the same while nothing happens; all of them still
// work then; and when they are closed everything is given back: goroutines too, and as many again take about what the first did.
func TestIdle(t *testing.T) {
	w := hosts(t)
	n, watch, udpIdle := crowd()
	var err error
	w.Lab, err = lab.New(t.Context(), lab.Plan{Dir: t.TempDir(), Bin: plainPrograms(t), Tools: filepath.Join(plainPrograms(t), "keyhaven-demo"), Zones: onePlainZone,
		Sites: []lab.SitePlan{w.siteA()}, Quiet: true, Edge: lab.EdgePlan{NS: w.edge, Tunnel: edgeTunnel, Visitors: edgeVisitors, Ops: "127.0.0.1:9600"},
		Adapt: func(file string, cfg map[string]any) {
			switch file {
			case "edge.yaml":
				cfg["visitors"].(obj)["limits"] = obj{"connections_per_address": 2 * n, "connections": 2 * n}
			case "connector-a.yaml":
				cfg["limits"] = obj{"max_flows": 2 * n}
			}
		}})
	must(t, err)
	t.Cleanup(func() {
		check(t, w.Stop())
		if t.Failed() {
			t.Log(w.Logs())
		}
	})
	must(t, w.Start(t.Context()))
	must(t, w.Sites[0].Origin.Stop())
	must(t, w.Process("swarm", w.sites[0], filepath.Join(plainPrograms(t), "keyhaven-swarm"), "serve", origin).Start())
	const addr = "203.0.113.1:7600"
	w.port(t, "crowd", "--protocol", "udp", "--listen", addr, "--to", origin, "--allow", "203.0.113.0/24", "--max-connections", fmt.Sprint(20*n), "--idle-timeout", udpIdle.String())
	t.Run("UDP sessions", func(t *testing.T) { w.idle(t, n, watch, 64, "udp", addr, fmt.Sprint(n)) })
	// So that what the first crowd left in the heaps hides nothing.
	must(t, w.RestartEdge(t.Context(), 0, false))
	must(t, w.Restart(t.Context(), w.Sites[0].Connectors[0], false))
	eventually(t, "the tunnel", func(ctx context.Context) error { return w.packetThere(ctx, addr, []byte("back"), "") })
	eventually(t, "handshakes", func(ctx context.Context) error {
		_, err := w.curl(ctx, plain, "/", "-o", "/dev/null")
		return err
	})
	t.Run("WebSockets", func(t *testing.T) {
		w.idle(t, n, watch, 192, "ws", edgeVisitors, plain, w.Roots(), fmt.Sprint(n))
	})
}

// idle has two crowds, one after the other, that take at most some KiB each in either program.
func (w *world) idle(t *testing.T, n int, watch time.Duration, most int, args ...string) {
	programs := []*lab.Process{w.EdgeProc, w.Sites[0].Connector}
	before, peak := make([]cost, 2), make([]cost, 2)
	where, ops, routines := []*testnet.Namespace{w.edge, w.sites[0]}, []string{"127.0.0.1:9600", "127.0.0.1:9601"}, make([]int, 2)
	for i, p := range programs {
		before[i], routines[i] = costOf(t, p), goroutines(t.Context(), t, where[i], ops[i])
	}
	for round := range 2 {
		began := time.Now()
		c := w.swarm(t, args...)
		c.await(t, "open")
		t.Logf("round %d: %d open after %.1f s", round, n, time.Since(began).Seconds())
		open := []cost{costOf(t, programs[0]), costOf(t, programs[1])}
		for end := time.Now().Add(watch); time.Now().Before(end); time.Sleep(time.Second) {
			for i, p := range programs {
				now := costOf(t, p)
				if now.descriptors > open[i].descriptors+16 || now.rss > open[i].rss+open[i].rss/10+8<<10 {
					t.Errorf("%s: had %+v, has %+v while nothing happens", p.Name(), open[i], now)
				}
			}
		}
		c.say(t)
		c.await(t, "good")
		for i, p := range programs {
			now := costOf(t, p)
			each := float64(now.rss-before[i].rss) / float64(n)
			t.Logf("round %d: %s: %d MiB before, %d MiB with %d: %.1f KiB each; descriptors %d, then %d", round, p.Name(), before[i].rss>>10, now.rss>>10, n, each,
				before[i].descriptors, now.descriptors)
			if each > float64(most) {
				t.Errorf("%s: %.1f KiB each, want %d at most", p.Name(), each, most)
			}
			if round == 0 {
				peak[i] = now
			} else if now.rss > 2*peak[i].rss { // the collector lets garbage of the first crowd stay for a while
				t.Errorf("%s: %d KiB with the second crowd, %d KiB with the first: something is left of that", p.Name(), now.rss, peak[i].rss)
			}
		}
		must(t, c.in.Close())
		c.await(t, "closed")
		check(t, c.cmd.Wait())
		for i, p := range programs {
			eventually(t, "descriptors of "+p.Name(), func(context.Context) error {
				// What is kept for reuse is bounded: 64 idle connections to an origin.
				if now := costOf(t, p); now.descriptors > before[i].descriptors+80 {
					return fmt.Errorf("%d before, %d after", before[i].descriptors, now.descriptors)
				}
				return nil
			})
			eventually(t, "goroutines of "+p.Name(), func(ctx context.Context) error {
				if now := goroutines(ctx, t, where[i], ops[i]); now > routines[i]+200 {
					return fmt.Errorf("%d before, %d after", routines[i], now)
				}
				return nil
			})
			t.Logf("round %d: %s: %+v after the close", round, p.Name(), costOf(t, p))
		}
		eventually(t, "flows", func(context.Context) error {
			out := w.admin(t, "flow", "list", "--limit", "1")
			if strings.Contains(out, "udp") || strings.Count(out, "\n") > 64 {
				return fmt.Errorf("still open:\n%.2000s", out)
			}
			return nil
		})
	}
}

// A swarm is a running client; see the program.
type swarmClient struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
	errs bytes.Buffer
}

func (w *world) swarm(t *testing.T, args ...string) *swarmClient {
	t.Helper()
	c := &swarmClient{cmd: w.visitor.Command(t.Context(), filepath.Join(plainPrograms(t), "keyhaven-swarm"), args...)}
	c.cmd.Stderr = &c.errs
	var err error
	c.in, err = c.cmd.StdinPipe()
	must(t, err)
	out, err := c.cmd.StdoutPipe()
	must(t, err)
	c.out = bufio.NewScanner(out)
	must(t, c.cmd.Start())
	return c
}

func (c *swarmClient) say(t *testing.T) {
	t.Helper()
	_, err := io.WriteString(c.in, "\n")
	must(t, err)
}

func (c *swarmClient) await(t *testing.T, word string) {
	t.Helper()
	if !c.out.Scan() || c.out.Text() != word {
		c.cmd.Wait()
		t.Fatalf("swarm: got %q, want %q: %s", c.out.Text(), word, c.errs.String())
	}
}
