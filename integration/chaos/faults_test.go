//go:build netns

package chaos

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

const (
	sigHup  = syscall.SIGHUP
	sigStop = syscall.SIGSTOP
	sigCont = syscall.SIGCONT
)

// A fault is done to one target at a time in its round, and taken back after a while.
type fault struct {
	name, target string
	at, hold     time.Duration
	do           func(ctx context.Context) error
	undo         func(ctx context.Context) error // may be repeated; nil: nothing is to be taken back
}

func (f fault) String() string {
	return fmt.Sprintf("%s at %v for %v", f.name, f.at.Round(time.Millisecond), f.hold.Round(time.Millisecond))
}

// draw chooses the faults of a round.
func (w *world) draw(rng *rand.Rand, match *regexp.Regexp) (round []fault) {
	n, taken := 1+rng.IntN(5), map[string]bool{}
	for try := 0; len(round) < n && try < 1000; try++ {
		f := w.one(rng)
		f.at = time.Duration(rng.IntN(1500)) * time.Millisecond
		f.hold = time.Duration(200+rng.IntN(3800)) * time.Millisecond
		if !taken[f.target] && match.MatchString(f.name) {
			taken[f.target] = true
			round = append(round, f)
		}
	}
	return round
}

// one draws a fault.
func (w *world) one(rng *rand.Rand) fault {
	switch rng.IntN(10) {
	case 0, 1, 2, 3:
		return w.processFault(rng)
	case 4, 5, 6:
		return w.linkFault(rng)
	case 7:
		return w.recordFault(rng)
	case 8:
		return w.siteFault(rng)
	default:
		return w.keyFault(rng)
	}
}

// processFault kills, stops in order, or holds one process.
func (w *world) processFault(rng *rand.Rand) fault {
	all := w.all()
	p := all[rng.IntN(len(all))]
	start := func(context.Context) error {
		if p.Running() {
			return nil
		}
		defer w.want(p, true)
		return p.Start()
	}
	origin := strings.HasPrefix(p.Name(), "origin") // which knows no end in order
	switch n := rng.IntN(4); {
	case n == 0 && !origin:
		return fault{name: "stop " + p.Name(), target: p.Name(), undo: start, do: func(context.Context) error {
			w.want(p, false)
			began := time.Now()
			if err := p.Stop(); err != nil {
				w.violate("%v", err)
			}
			w.note("%s took %.1f s to end", p.Name(), time.Since(began).Seconds())
			return nil
		}}
	case n == 1:
		return fault{name: "hold " + p.Name(), target: p.Name(), do: func(context.Context) error { return p.Signal(sigStop) },
			undo: func(context.Context) error { return p.Signal(sigCont) }}
	default:
		return fault{name: "kill " + p.Name(), target: p.Name(), undo: start, do: func(context.Context) error {
			w.want(p, false)
			return p.Kill()
		}}
	}
}

// linkFault makes a link bad, or gives its host another address.
func (w *world) linkFault(rng *rand.Rand) fault {
	names := []string{"edge1", "edge2", "sitea", "sitea2", "siteb"}
	name := names[rng.IntN(len(names))]
	l := w.links[name]
	set := func(what string, c testnet.Conditions) fault {
		return fault{name: what + " on the link of " + name, target: name, do: func(context.Context) error { l.Set(c); return nil },
			undo: func(context.Context) error { l.Set(testnet.Conditions{}); return nil }}
	}
	loss := 0.01 + 0.2*rng.Float64()
	mtu := 1100 + rng.IntN(300)
	delay := time.Duration(rng.IntN(150)) * time.Millisecond
	site := strings.HasPrefix(name, "site")
	switch n := rng.IntN(9); {
	case n == 0 || n == 1:
		return set("cut", testnet.Conditions{Down: true})
	case n == 2:
		return set(fmt.Sprintf("loss of %.0f%%", 100*loss), testnet.Conditions{Loss: loss})
	case n == 3:
		return set("no UDP", testnet.Conditions{DropUDP: true})
	case n == 4:
		return set(fmt.Sprintf("black hole above %d bytes", mtu), testnet.Conditions{MTU: mtu})
	case n == 5:
		return set(fmt.Sprintf("MTU of %d", mtu), testnet.Conditions{MTU: mtu, PacketTooBig: true})
	case n == 6 && site:
		return fault{name: "new ports for UDP of " + name, target: name, do: func(context.Context) error { l.Rebind(); return nil }}
	case n == 7 && site:
		return fault{name: "another address for " + name, target: name, do: func(context.Context) error { return l.move() }}
	default:
		return set(fmt.Sprintf("delay of %v", delay), testnet.Conditions{Delay: delay, Jitter: delay / 4, Rate: 20e6})
	}
}

// move gives the host another address of its link's network.
func (c *cable) move() error {
	c.moves++
	a := c.addr.Addr().As4()
	a[3] = byte(10 + c.moves%200)
	next := netip.PrefixFrom(netip.AddrFrom4(a), c.addr.Bits())
	if err := c.Readdress(c.end, c.addr, next); err != nil {
		return err
	}
	c.addr = next
	return nil
}

// admin runs an administration command at any edge that does it. A text in fine makes a refusal a success.
func (w *world) admin(ctx context.Context, fine string, args ...string) (err error) {
	for i := range w.Edges {
		actx, cancel := context.WithTimeout(ctx, patience)
		_, err = w.EdgeAt(actx, i, args...)
		cancel()
		if err == nil || fine != "" && strings.Contains(err.Error(), fine) {
			return nil
		}
	}
	return err
}

// recordFault changes what the store tells edges.
func (w *world) recordFault(rng *rand.Rand) fault {
	endpoint := []string{"one", "two"}[rng.IntN(2)]
	weight := strconv.FormatFloat(rng.Float64(), 'f', 2, 64)
	run := func(fine string, args ...string) func(context.Context) error {
		return func(ctx context.Context) error { return w.admin(ctx, fine, args...) }
	}
	both := func(a, b func(context.Context) error) func(context.Context) error {
		return func(ctx context.Context) error {
			if err := a(ctx); err != nil {
				return err
			}
			return b(ctx)
		}
	}
	switch rng.IntN(6) {
	case 0:
		return fault{name: "weight of " + endpoint + " is " + weight, target: "pool", do: run("", "pool", "endpoint", "weight", "web", endpoint, weight),
			undo: run("", "pool", "endpoint", "weight", "web", endpoint, "1")}
	case 1:
		return fault{name: endpoint + " is disabled", target: "pool", do: run("", "pool", "endpoint", "disable", "web", endpoint),
			undo: run("", "pool", "endpoint", "enable", "web", endpoint)}
	case 2:
		return fault{name: "the pool has another steering", target: "pool", do: run("", "pool", "set", "web", "--steering", "least_connections"),
			undo: run("", "pool", "set", "web", "--steering", "random")}
	case 3:
		return fault{name: "no route to b", target: "route b", do: run("", "route", "delete", "10.20.0.0/24", "--vnet", branch),
			undo: run("already has the route", "route", "add", "10.20.0.0/24", "--vnet", branch, "--tunnel", "b")}
	case 4:
		return fault{name: "no route to a", target: "route a", do: run("", "route", "delete", "10.20.0.0/24"),
			undo: run("already has the route", "route", "add", "10.20.0.0/24", "--tunnel", "a")}
	default:
		// The connectors know better: flows of one network have no business at the other's site.
		return fault{name: "hosts of each network are led to the other's site", target: "mislead",
			do:   both(run("", "route", "add", "10.20.0.20/32", "--tunnel", "b"), run("", "route", "add", "10.20.0.20/32", "--vnet", branch, "--tunnel", "a")),
			undo: both(run("has no route", "route", "delete", "10.20.0.20/32"), run("has no route", "route", "delete", "10.20.0.20/32", "--vnet", branch))}
	}
}

// siteFault changes what a site permits, or whom an edge admits, or ends a worker of a key server.
func (w *world) siteFault(rng *rand.Rand) fault {
	site := w.Sites[rng.IntN(len(w.Sites))]
	c := site.Connectors[rng.IntN(len(site.Connectors))]
	e := rng.IntN(len(w.Edges))
	k := w.KeyServers[rng.IntN(len(w.KeyServers))]
	turn := rng.IntN(1000)
	switch rng.IntN(3) {
	case 0:
		return fault{name: "connector " + c.Name + " permits no echo", target: c.Proc.Name(),
			do: func(context.Context) error { return w.permit(site, c, false) }, undo: func(context.Context) error { return w.permit(site, c, true) }}
	case 1:
		file, proc := w.Edges[e].Proc.Name()+".yaml", w.Edges[e].Proc
		admit := func(open bool) func(context.Context) error {
			return func(context.Context) error {
				err := w.rewrite(file, func(cfg obj) { cfg["visitors"].(obj)["ports"] = edgePorts(open) })
				if err != nil {
					return err
				}
				return proc.Signal(sigHup)
			}
		}
		return fault{name: w.Edges[e].Name + " admits nobody to its ports", target: proc.Name(), do: admit(false), undo: admit(true)}
	default:
		return fault{name: "kill a worker of " + k.Name, target: k.Proc.Name(), do: func(context.Context) error {
			kids := children(k.Proc.PID())
			if len(kids) == 0 {
				return nil
			}
			return syscall.Kill(kids[turn%len(kids)], syscall.SIGKILL)
		}}
	}
}

// keyFault takes some rules from a key server.
func (w *world) keyFault(rng *rand.Rand) fault {
	server, p, left := rng.IntN(len(w.KeyServers)), everything(), 0
	for e := range 2 {
		for _, h := range hosts {
			if rng.IntN(2) == 0 {
				p[grant{clientID(e), h}] = false
			} else {
				left++
			}
		}
	}
	k := w.KeyServers[server]
	return fault{name: fmt.Sprintf("%s has %d of 6 rules", k.Name, left), target: k.Proc.Name(),
		do: func(ctx context.Context) error { return w.enforce(ctx, server, p) }, undo: func(ctx context.Context) error { return w.enforce(ctx, server, everything()) }}
}

// children are the processes that pid has started.
func children(pid int) (pids []int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	tasks, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	for _, t := range tasks {
		more, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
		b = append(append(b, ' '), more...)
	}
	for _, f := range strings.Fields(string(b)) {
		if n, err := strconv.Atoi(f); err == nil {
			pids = append(pids, n)
		}
	}
	return pids
}

// undoTime is how long a fault may take to be taken back, once the parts are there that it takes.
const undoTime = 60 * time.Second

// round does faults at their times, each for its while, and returns when all have been taken back.
func (w *world) round(ctx context.Context, faults []fault) {
	var wg sync.WaitGroup
	for _, f := range faults {
		wg.Go(func() {
			sleep(ctx, f.at)
			w.note("begin: %s", f.name)
			if err := f.do(ctx); err != nil {
				w.note("       %s: %v", f.name, err)
			}
			if f.undo == nil {
				return
			}
			sleep(ctx, f.hold)
			uctx, cancel := context.WithTimeout(ctx, undoTime)
			defer cancel()
			if err := lab.Eventually(uctx, f.undo); err != nil && ctx.Err() == nil {
				w.violate("%s cannot be taken back: %v", f.name, err)
			}
			w.note("end:   %s", f.name)
		})
	}
	wg.Wait()
}
