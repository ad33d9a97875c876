package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A contender carries a TCP and a UDP port of the public side to the site over one link.
type contender struct {
	name string
	ours bool
	link *benchLink
	site *site
	from *testnet.Namespace // where visitors are
	// start makes it ready, or says why it cannot be. It adds its processes by spawn.
	start    func(ctx context.Context, c *contender) error
	tcp, udp string // where visitors go; udp is empty if it carries none
	dir      string // its files
	procs    []spawned
	failed   string // why it takes no part
}

// spawned is a process; done is closed when it has ended.
type spawned struct {
	*exec.Cmd
	done chan struct{}
}

// benchLink is one way between the two namespaces, with an address on each side.
type benchLink struct {
	name         string
	public, site netip.Addr
	warmUp       time.Duration
	inFlight     int // UDP packets
	subnet       string
}

// The namespaces' addresses. The tunnels' servers listen on the public side; the site dials them.
var benchLinks = []*benchLink{
	{name: "clean link", public: netip.MustParseAddr("198.51.100.1"), site: netip.MustParseAddr("198.51.100.2"), inFlight: 128, subnet: "198.51.100.0/30"},
	{name: "1 % loss, 40 ms", public: netip.MustParseAddr("203.0.113.1"), site: netip.MustParseAddr("203.0.113.2"), warmUp: 1500 * time.Millisecond, inFlight: 1024, subnet: "203.0.113.0/30"},
}

// lossy is what the second link does in each direction.
var lossy = testnet.Conditions{Delay: 20 * time.Millisecond, Loss: 0.01, Rate: 1e9, Queue: 4 << 20}

const (
	sitePort  = "127.0.0.1:9000"
	allStream = 1000 // streams open at once for the memory row
)

// tunnelPeers compares the tunnel with others, and with plain TCP and UDP over the same links.
func (b *bench) tunnelPeers(ctx context.Context) (err error) {
	n, err := testnet.New("khbp")
	if err != nil {
		return notRun{fmt.Sprintf("namespaces are needed: %v", err)}
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	public, err := n.Namespace("public")
	if err != nil {
		return err
	}
	private, err := n.Namespace("site")
	if err != nil {
		return err
	}
	control, err := b.setCongestion(public, private)
	if err != nil {
		return err
	}
	b.report.note("TCP of both namespaces uses %s", control)
	at := func(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, 30) }
	if _, _, err := n.Link(public, private, at(benchLinks[0].public), at(benchLinks[0].site)); err != nil {
		return err
	}
	shaped, err := n.Shaped(public, private, at(benchLinks[1].public), at(benchLinks[1].site), 1)
	if err != nil {
		return notRun{err.Error()}
	}
	defer func() { err = errors.Join(err, shaped.Close()) }()
	if err := b.buildPeers(ctx); err != nil {
		return err
	}
	inside, err := startSite(private, sitePort)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, inside.stop()) }()
	var all []*contender
	defer func() {
		for _, c := range all {
			err = errors.Join(err, c.stop())
		}
	}()
	for li, link := range benchLinks {
		direct, err := startSite(private, netip.AddrPortFrom(link.site, 9000).String())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, direct.stop()) }()
		for i, c := range b.contenders(public, private) {
			c.link, c.site, c.from, c.dir = link, inside, public, filepath.Join(b.dir, fmt.Sprintf("contender-%d-%d", li, i))
			c.tcp = fmt.Sprintf("127.0.0.1:%d", 20000+1000*li+10*i)
			c.udp = c.tcp
			if c.name == plainName {
				c.site, c.tcp, c.udp = direct, direct.addr, direct.addr
			}
			if err := os.Mkdir(c.dir, 0o700); err != nil {
				return err
			}
			all = append(all, c)
			if err := b.ready(ctx, c); err != nil {
				c.failed = err.Error()
				b.report.note("NOT RUN: %s over the %s: %v", c.name, link.name, err)
			}
		}
	}
	shaped.Set(lossy)
	if err := b.race(ctx, all); err != nil {
		return err
	}
	out, back := shaped.Counters()
	b.report.note("the lossy link: 20 ms and 1 %% each way, 1 Gb/s with a queue of 4 MiB; it carried %d and %d packets and lost %d and %d at random, %d and %d by overflow",
		out.Passed, back.Passed, out.Lost, back.Lost, out.Overflow, back.Overflow)
	if out.Lost == 0 || back.Lost == 0 {
		return errors.New("the lossy link has lost nothing")
	}
	return nil
}

// setCongestion puts the chosen congestion control in force, and returns what is.
func (b *bench) setCongestion(spaces ...*testnet.Namespace) (name string, err error) {
	const file = "/proc/sys/net/ipv4/tcp_congestion_control" // of the namespace of the thread that opens it
	for _, ns := range spaces {
		err := ns.Do(func() error {
			if b.congestion != "" {
				if err := os.WriteFile(file, []byte(b.congestion), 0); err != nil {
					return err
				}
			}
			text, err := os.ReadFile(file)
			name = strings.TrimSpace(string(text))
			return err
		})
		if err != nil {
			return "", err
		}
	}
	return name, nil
}

// ready starts a contender and waits until it carries an exchange.
func (b *bench) ready(ctx context.Context, c *contender) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if c.start != nil {
		if err := c.start(ctx, c); err != nil {
			return err
		}
	}
	return c.until(ctx, func() error {
		conn, err := c.dial(ctx)
		if err != nil {
			return err
		}
		defer conn.Close()
		return exchange(conn, 1, 1)
	})
}

// until calls f until it succeeds, a process of the contender ends, or ctx does.
func (c *contender) until(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		for _, p := range c.procs {
			select {
			case <-p.done:
				return fmt.Errorf("%s has ended: %v%s", p.Path, p.ProcessState, c.lastLines())
			default:
			}
		}
		if sleep(ctx, 50*time.Millisecond) != nil {
			return fmt.Errorf("not ready in time: %w%s", err, c.lastLines())
		}
	}
}

func (c *contender) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return dialIn(ctx, c.from, c.tcp)
}

// spawn starts a program of the contender.
func (c *contender) spawn(cmd *exec.Cmd) error {
	log, err := os.OpenFile(filepath.Join(c.dir, fmt.Sprintf("process-%d.log", len(c.procs))), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = c.dir, log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.Cancel = func() error { return nil } // stop ends it
	if err := cmd.Start(); err != nil {
		return err
	}
	p := spawned{cmd, make(chan struct{})}
	go func() { defer close(p.done); cmd.Wait() }() // stop waits for it
	c.procs = append(c.procs, p)
	return nil
}

func (c *contender) pids() (pids []int) {
	for _, p := range c.procs {
		pids = append(pids, p.Process.Pid)
	}
	return pids
}

// stop kills the contender's processes: what they leave behind goes with the bench's directory.
func (c *contender) stop() error {
	for _, p := range c.procs {
		p.Process.Kill()
		<-p.done
	}
	c.procs = nil
	return nil
}

func (c *contender) lastLines() string {
	var b strings.Builder
	for i := range c.procs {
		text, err := os.ReadFile(filepath.Join(c.dir, fmt.Sprintf("process-%d.log", i)))
		if err == nil {
			lines := strings.Split(strings.TrimSpace(string(text)), "\n")
			fmt.Fprintf(&b, "\n%s", strings.Join(lines[max(0, len(lines)-4):], "\n"))
		}
	}
	return b.String()
}

// buildPeers builds the other tunnels out of their module.
func (b *bench) buildPeers(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", b.dir, "tool")
	cmd.Dir = b.peers
	if out, err := cmd.CombinedOutput(); err != nil {
		return notRun{fmt.Sprintf("go build in %s: %v: %s", b.peers, err, strings.TrimSpace(string(out)))}
	}
	return nil
}

const plainName = "plain TCP, UDP"

// contenders are those of one link, not started.
func (b *bench) contenders(public, private *testnet.Namespace) []*contender {
	all := []*contender{{name: plainName}}
	for _, p := range []string{"tcp", "quic", "kcp"} {
		all = append(all, &contender{name: "frp, " + p, start: func(ctx context.Context, c *contender) error {
			return b.startFRP(ctx, c, public, private, p)
		}})
	}
	all = append(all, &contender{name: "chisel", start: func(ctx context.Context, c *contender) error {
		return b.startChisel(ctx, c, public, private)
	}})
	for _, carrier := range []string{"quic", "tcp", "auto"} {
		all = append(all, &contender{name: "ours, " + carrier, ours: true, start: func(ctx context.Context, c *contender) error {
			return b.startOwn(ctx, c, public, private, carrier)
		}})
	}
	return all
}

// startFRP runs frps and frpc with their defaults but for the transport between them.
func (b *bench) startFRP(ctx context.Context, c *contender, public, private *testnet.Namespace, protocol string) error {
	ap := netip.MustParseAddrPort(c.tcp)
	port := ap.Port() + 1
	server := fmt.Sprintf("bindAddr = %q\nproxyBindAddr = %q\nbindPort = %d\n", c.link.public, ap.Addr(), port)
	if protocol != "tcp" {
		server = fmt.Sprintf("bindAddr = %q\nproxyBindAddr = %q\nbindPort = %d\n%sBindPort = %d\n", c.link.public, ap.Addr(), port+1, protocol, port)
	}
	client := fmt.Sprintf("serverAddr = %q\nserverPort = %d\ntransport.protocol = %q\n", c.link.public, port, protocol)
	for _, kind := range []string{"tcp", "udp"} {
		client += fmt.Sprintf("[[proxies]]\nname = %q\ntype = %q\nlocalIP = \"127.0.0.1\"\nlocalPort = 9000\nremotePort = %d\n", kind, kind, ap.Port())
	}
	for name, text := range map[string]string{"frps.toml": server, "frpc.toml": client} {
		if err := os.WriteFile(filepath.Join(c.dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := c.spawn(public.Command(ctx, filepath.Join(b.dir, "frps"), "-c", "frps.toml")); err != nil {
		return err
	}
	control := port
	if protocol != "tcp" {
		control++
	}
	err := lab.Eventually(ctx, func(ctx context.Context) error { // frpc gives up if frps does not listen yet
		conn, err := public.Dial(ctx, netip.AddrPortFrom(c.link.public, control).String())
		if err == nil {
			conn.Close()
		}
		return err
	})
	if err != nil {
		return err
	}
	return c.spawn(private.Command(ctx, filepath.Join(b.dir, "frpc"), "-c", "frpc.toml"))
}

func (b *bench) startChisel(ctx context.Context, c *contender, public, private *testnet.Namespace) error {
	port := netip.MustParseAddrPort(c.tcp).Port()
	program := filepath.Join(b.dir, "chisel")
	if err := c.spawn(public.Command(ctx, program, "server", "--host", c.link.public.String(), "--port", fmt.Sprint(port+1), "--reverse")); err != nil {
		return err
	}
	return c.spawn(private.Command(ctx, program, "client", fmt.Sprintf("http://%s:%d", c.link.public, port+1),
		fmt.Sprintf("R:%s:%s", c.tcp, sitePort), fmt.Sprintf("R:%s:%s/udp", c.udp, sitePort)))
}

// running returns those that take part, in order.
func running(all []*contender, link *benchLink) []*contender {
	return slices.DeleteFunc(slices.Clone(all), func(c *contender) bool { return c.failed != "" || c.link != link })
}
