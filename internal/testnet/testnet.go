// Package testnet makes network namespaces and links between them, so that one machine can play several hosts: cables, and
// links that delay, lose, limit and rewrite packets as a test tells them to. It needs root, if only of a user namespace,
// the ip command, and for such links /dev/net/tun.
package testnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNotRoot says that namespaces cannot be made because the process is not root.
var ErrNotRoot = errors.New("testnet: network namespaces need root")

// A Net is a set of namespaces that live and go together. Its methods are safe for concurrent use.
type Net struct {
	prefix string

	mu     sync.Mutex // guards the fields below
	spaces []*Namespace
	links  int
}

// A Namespace is one host of a [Net].
type Namespace struct {
	name string // as ip netns knows it
}

// New starts an empty net. The namespaces' names begin with prefix and the process id, so that two runs at the same
// time do not meet.
func New(prefix string) (*Net, error) {
	if os.Geteuid() != 0 {
		return nil, ErrNotRoot
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return nil, fmt.Errorf("testnet: %w: install iproute2", err)
	}
	return &Net{prefix: fmt.Sprintf("%s%d", prefix, os.Getpid())}, nil
}

func ip(args ...string) error {
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("testnet: ip %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Namespace adds a host with only loopback up.
func (n *Net) Namespace(name string) (*Namespace, error) {
	ns := &Namespace{name: n.prefix + "-" + name}
	if err := ip("netns", "add", ns.name); err != nil {
		return nil, err
	}
	n.mu.Lock()
	n.spaces = append(n.spaces, ns)
	n.mu.Unlock()
	return ns, ip("-n", ns.name, "link", "set", "lo", "up")
}

// Link joins a and b by a virtual Ethernet cable. Each end gets its first address's interface name back; b may be nil
// for the namespace that the process itself is in, where the interface goes away with a.
func (n *Net) Link(a, b *Namespace, aAddr, bAddr netip.Prefix) (aDev, bDev string, err error) {
	n.mu.Lock()
	n.links++
	id := n.links
	n.mu.Unlock()
	aDev, bDev = fmt.Sprintf("kh%da", id), fmt.Sprintf("kh%db", id)
	if b == nil {
		bDev = fmt.Sprintf("%s-%d", n.prefix, id) // must be unique among the machine's own
	}
	add := []string{"-n", a.name, "link", "add", aDev, "type", "veth", "peer", "name", bDev}
	if b != nil {
		add = append(add, "netns", b.name)
	} else {
		add = append(add, "netns", fmt.Sprint(os.Getpid()))
	}
	steps := [][]string{
		add,
		append(in(a), "addr", "add", aAddr.String(), "dev", aDev, "nodad"),
		append(in(b), "addr", "add", bAddr.String(), "dev", bDev, "nodad"),
		append(in(a), "link", "set", aDev, "up"),
		append(in(b), "link", "set", bDev, "up"),
	}
	for _, s := range steps {
		if err := ip(noDAD(s)...); err != nil {
			return "", "", err
		}
	}
	return aDev, bDev, nil
}

// noDAD leaves nodad out for IPv4, which does not know it.
func noDAD(args []string) []string {
	for _, a := range args {
		if p, err := netip.ParsePrefix(a); err == nil && p.Addr().Is4() {
			return args[:len(args)-1]
		}
	}
	return args
}

func in(ns *Namespace) []string {
	if ns == nil {
		return nil
	}
	return []string{"-n", ns.name}
}

// Name is what ip netns calls the namespace.
func (ns *Namespace) Name() string { return ns.name }

// IP runs an ip command on the namespace.
func (ns *Namespace) IP(args ...string) error { return ip(append([]string{"-n", ns.name}, args...)...) }

// AddAddr gives a device one more address.
func (ns *Namespace) AddAddr(dev string, p netip.Prefix) error {
	return ns.IP(noDAD([]string{"addr", "add", p.String(), "dev", dev, "nodad"})...)
}

// Route sends dst through the neighbour via.
func (ns *Namespace) Route(dst netip.Prefix, via netip.Addr) error {
	return ns.IP("route", "add", dst.String(), "via", via.String())
}

// OutwardOnly closes the namespace to what comes in by dev, but for packets to the address own: whatever routes a
// neighbour sets, the other addresses of the namespace are not to be had through dev. Answers to what was sent from
// own still arrive. The kernel's own routing rules do it, so that no packet filter is needed.
func (ns *Namespace) OutwardOnly(dev string, own netip.Addr) error {
	fam := "-4"
	if own.Is6() {
		fam = "-6"
	}
	for _, s := range [][]string{
		// The local table normally comes before all rules. Move it behind ours.
		{fam, "rule", "add", "pref", "100", "lookup", "local"},
		{fam, "rule", "del", "pref", "0", "lookup", "local"},
		{fam, "rule", "add", "pref", "10", "iif", dev, "to", own.String(), "lookup", "local"},
		{fam, "rule", "add", "pref", "11", "iif", dev, "blackhole"},
	} {
		if err := ns.IP(s...); err != nil {
			return err
		}
	}
	return nil
}

// Command makes a command that runs in the namespace. Its process is the command itself, so signals reach it.
func (ns *Namespace) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if ns == nil {
		return exec.CommandContext(ctx, name, args...)
	}
	return exec.CommandContext(ctx, "ip", append([]string{"netns", "exec", ns.name, name}, args...)...)
}

// Close removes all namespaces and with them their links. Processes in them must have ended.
func (n *Net) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var errs []error
	for _, ns := range n.spaces {
		errs = append(errs, ip("netns", "del", ns.name))
	}
	n.spaces = nil
	return errors.Join(errs...)
}

// Exists reports whether the namespace has not been removed.
func (ns *Namespace) Exists() bool {
	_, err := os.Stat("/run/netns/" + ns.name)
	return err == nil
}

// Sweep removes namespaces that earlier runs with the same prefix left behind because they were killed: those whose
// process is gone.
func Sweep(prefix string) {
	names, err := filepath.Glob("/run/netns/" + prefix + "*-*")
	if err != nil {
		return
	}
	for _, path := range names {
		pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), prefix), "-")
		if n, err := strconv.Atoi(pid); err == nil && syscall.Kill(n, 0) == syscall.ESRCH {
			ip("netns", "del", filepath.Base(path))
		}
	}
}

// Do runs f in the namespace. Sockets that f opens stay there after it returns. It holds for what f does itself, not
// for goroutines that it starts.
func (ns *Namespace) Do(f func() error) error {
	runtime.LockOSThread()
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return err
	}
	defer own.Close()
	other, err := os.Open("/run/netns/" + ns.name)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("testnet: %w", err)
	}
	defer other.Close()
	if err := unix.Setns(int(other.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("testnet: enter %s: %w", ns.name, err)
	}
	err = f()
	if back := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); back != nil {
		// The thread stays locked, so it ends with its goroutine and nobody else runs on it.
		return errors.Join(err, back)
	}
	runtime.UnlockOSThread()
	return err
}

// Dial opens a TCP connection from the namespace. addr must have an IP address.
func (ns *Namespace) Dial(ctx context.Context, addr string) (c net.Conn, err error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	err = ns.Do(func() (err error) {
		c, err = new(net.Dialer).DialContext(ctx, "tcp", ap.String())
		return err
	})
	return c, err
}
