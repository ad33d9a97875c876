package connector

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const pingRange = "/proc/sys/net/ipv4/ping_group_range"

// Ping sockets are tested in a user and network namespace of its own, whose sysctl can be written.
func TestEchoSockets(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInNamespace$", "-test.v", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), "KEYHAVEN_TEST_NAMESPACE=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: TestInNamespace")) {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
}

// TestInNamespace does nothing by itself; TestEchoSockets runs it.
func TestInNamespace(t *testing.T) {
	if os.Getenv("KEYHAVEN_TEST_NAMESPACE") == "" {
		return
	}
	setUp(t, "ip link set lo up")
	e, _ := udpSite(t, Config{Allow: mustAllow(t, Rule{To: "127.0.0.0/8", Ports: []Ports{AllPorts}}, Rule{To: "::1", Ports: []Ports{AllPorts}},
		Rule{To: "10.0.0.0/8", Ports: []Ports{{First: 443, Last: 443}}}, Rule{To: "fd00::/8", Ports: []Ports{AllPorts}})})
	ping := tunnel.Flow{Kind: tunnel.KindICMP, VNet: "default", Host: "127.0.0.1"}

	// A new namespace forbids pings, as the kernel's default does.
	if err := CheckEcho(); err == nil || !strings.Contains(err.Error(), "sysctl -w net.ipv4.ping_group_range=") {
		t.Errorf("CheckEcho where pings are forbidden: got %v, want the remedy", err)
	}
	if _, err := tryPackets(t, e.session(t), ping); !errors.Is(err, tunnel.ErrForbidden) {
		t.Errorf("ping where it is forbidden: got %v, want ErrForbidden", err)
	}
	if err := os.WriteFile(pingRange, []byte("0 0"), 0); err != nil {
		t.Fatal(err)
	}
	if err := CheckEcho(); err != nil {
		t.Errorf("CheckEcho: %v", err)
	}

	for _, host := range []string{"127.0.0.1", "::1"} {
		ping.Host = host
		f := openPackets(t, e.session(t), ping)
		for _, n := range []int{0, 56, 1472, 3000, 20000} {
			want := bytes.Repeat([]byte{9}, n)
			r, err := pingUntil(t, f, tunnel.EchoRequest{Seq: uint16(n), Payload: want})
			if err != nil || r.Type != tunnel.EchoReplied || r.From.String() != host || !bytes.Equal(r.Payload, want) || r.TTL != 64 || r.HostRTT <= 0 || r.HostRTT > r.RTT {
				t.Errorf("ping %s with %d bytes: got %+v, %v", host, n, r, err)
			}
		}
		if r, err := pingUntil(t, f, tunnel.EchoRequest{Seq: 1, TTL: 7}); err != nil || r.Type != tunnel.EchoReplied {
			t.Errorf("ping %s with TTL 7: got %+v, %v", host, r, err)
		}
		// Rubbish, and what is no echo, is dropped.
		for _, b := range [][]byte{nil, {1}, {2, 0, 0, 0, 0, 0, 0, 0, 0}, bytes.Repeat([]byte{255}, 100)} {
			f.WritePacket(b)
		}
		if _, err := pingUntil(t, f, tunnel.EchoRequest{Seq: 2}); err != nil {
			t.Errorf("ping %s after rubbish: %v", host, err)
		}
	}

	// The same sequence number from two sources: each gets its own answer.
	ping.Host = "127.0.0.1"
	a, b := openPackets(t, e.session(t), ping), openPackets(t, e.session(t), ping)
	for name, f := range map[string]tunnel.PacketConn{"a": a, "b": b} {
		f.WritePacket(tunnel.AppendEchoRequest(nil, tunnel.EchoRequest{Seq: 5, Payload: []byte(name), Timeout: time.Second}))
	}
	for name, f := range map[string]tunnel.PacketConn{"a": a, "b": b} {
		f.SetReadDeadline(time.Now().Add(patience))
		p, err := tunnel.ReceivePacket(f)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := tunnel.ParseEchoReply(p); err != nil || string(r.Payload) != name {
			t.Errorf("source %s: got %+v, %v", name, r, err)
		}
	}
	ping.Host = "192.0.2.1"
	if _, err := tryPackets(t, e.session(t), ping); !errors.Is(err, tunnel.ErrDenied) {
		t.Errorf("outside of the allow-list: got %v, want ErrDenied", err)
	}
	unreachable(t)
	routers(t, e)
}

// setUp runs commands.
func setUp(t *testing.T, lines ...string) {
	t.Helper()
	for _, line := range lines {
		if out, err := exec.Command("sh", "-c", line).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", line, err, out)
		}
	}
}

// routers looks at the answers of a router between this host and another.
//
//	here 10.0.1.1 ─── 10.0.1.2 router 10.0.2.1 ─── 10.0.2.2 host
func routers(t *testing.T, e *edge) {
	setUp(t, "mount -t tmpfs none /run", "ip netns add r", "ip netns add h",
		"ip link add name va type veth peer name vb netns r", "ip -n r link add name vc type veth peer name vd netns h",
		"ip addr add 10.0.1.1/24 dev va", "ip addr add fd00:1::1/64 dev va nodad", "ip link set va up",
		"ip -n r addr add 10.0.1.2/24 dev vb", "ip -n r addr add fd00:1::2/64 dev vb nodad", "ip -n r link set vb up",
		"ip -n r addr add 10.0.2.1/24 dev vc", "ip -n r addr add fd00:2::1/64 dev vc nodad", "ip -n r link set vc up",
		"ip -n h addr add 10.0.2.2/24 dev vd", "ip -n h addr add fd00:2::2/64 dev vd nodad", "ip -n h link set vd up", "ip -n h link set lo up",
		"ip route add default via 10.0.1.2", "ip -6 route add default via fd00:1::2",
		"ip -n h route add default via 10.0.2.1", "ip -n h -6 route add default via fd00:2::1",
		"ip -n r route add prohibit 10.9.0.0/16", "ip -n r -6 route add prohibit fd00:9::/64",
		"ip netns exec r sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'")
	for _, c := range []struct{ router, host, prohibited string }{{"10.0.1.2", "10.0.2.2", "10.9.0.1"}, {"fd00:1::2", "fd00:2::2", "fd00:9::1"}} {
		f := openPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindICMP, VNet: "default", Host: c.host})
		ping := func(f tunnel.PacketConn, seq uint16, ttl uint8) tunnel.EchoReply {
			r, err := pingUntil(t, f, tunnel.EchoRequest{Seq: seq, TTL: ttl, Payload: []byte("trace")})
			if err != nil {
				t.Errorf("ping %s with TTL %d: %v", c.host, ttl, err)
			}
			return r
		}
		for round := range uint16(3) { // an error must not spoil what comes after it
			if r := ping(f, 2*round, 1); r.Type != tunnel.EchoTimeExceeded || r.From.String() != c.router || r.HostRTT <= 0 {
				t.Errorf("TTL 1: got %+v, want time exceeded from %s", r, c.router)
			}
			if r := ping(f, 2*round+1, 2); r.Type != tunnel.EchoReplied || r.From.String() != c.host || r.TTL != 63 {
				t.Errorf("TTL 2: got %+v, want a reply of %s", r, c.host)
			}
		}
		p := openPackets(t, e.session(t), tunnel.Flow{Kind: tunnel.KindICMP, VNet: "default", Host: c.prohibited})
		if r := ping(p, 1, 0); r.Type != tunnel.EchoUnreachable || r.Code != tunnel.UnreachableProhibited || r.From.String() != c.router {
			t.Errorf("prohibited: got %+v, want that from %s", r, c.router)
		}
	}
}

// pingUntil pings until there is an answer: kernels drop pings, and their answers, when they are short of something.
func pingUntil(t *testing.T, f tunnel.PacketConn, r tunnel.EchoRequest) (reply tunnel.EchoReply, err error) {
	r.Timeout = 3 * time.Second
	for range 6 {
		if reply, err = tunnel.Echo(t.Context(), f, r); err != tunnel.ErrEchoTimeout {
			break
		}
	}
	return reply, err
}

// unreachable looks at what the kernel's own refusal becomes: the namespace has no route but those of loopback.
func unreachable(t *testing.T) {
	s, err := openEcho(netip.MustParseAddr("192.0.2.1"))
	if err == nil {
		defer s.close()
		err = s.send(tunnel.EchoRequest{Seq: 1})
	}
	if r := resultOf(err); r != tunnel.ResultNoRoute {
		t.Errorf("no route: got %v, want that", err)
	}
}
