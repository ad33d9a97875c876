//go:build netns

package testnet

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os/exec"
	"regexp"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	aAddr, bAddr   = netip.MustParsePrefix("198.51.100.1/24"), netip.MustParsePrefix("198.51.100.2/24")
	aAddr6, bAddr6 = netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("2001:db8::2/64")
)

// shaped makes two hosts on a shaped link, with addresses of both families.
//
//	a 198.51.100.1, 2001:db8::1 ════ 198.51.100.2, 2001:db8::2 b
func shaped(t *testing.T) (l *Link, a, b *Namespace) {
	t.Helper()
	n, err := New("khtn")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	a, b = must(n.Namespace("a"))(t), must(n.Namespace("b"))(t)
	l, err = n.Shaped(a, b, aAddr, bAddr, 1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	aDev, bDev := l.Devices()
	check(t, a.AddAddr(aDev, aAddr6))
	check(t, b.AddAddr(bDev, bAddr6))
	return l, a, b
}

var pingResult = regexp.MustCompile(`(\d+) received(?s:.*) = ([\d.]+)/([\d.]+)/`)

// ping sends packets from ns and returns how many were answered, and the least and the mean time in ms.
func ping(t *testing.T, ns *Namespace, args ...string) (received int, least, mean float64) {
	t.Helper()
	out, err := ns.Command(t.Context(), "ping", append([]string{"-n"}, args...)...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) { // 1: no answer
		t.Fatalf("ping %v: %v\n%s", args, err, out)
	}
	m := pingResult.FindSubmatch(out)
	if m == nil {
		return 0, 0, 0
	}
	received, _ = strconv.Atoi(string(m[1]))
	least, _ = strconv.ParseFloat(string(m[2]), 64)
	mean, _ = strconv.ParseFloat(string(m[3]), 64)
	return received, least, mean
}

func TestDelayAndLoss(t *testing.T) {
	l, a, _ := shaped(t)
	for _, to := range []string{"198.51.100.2", "2001:db8::2"} {
		for try := 0; try < 10; try++ { // on a busy machine the devices need a moment
			if got, _, _ := ping(t, a, "-c", "1", "-W", "1", to); got == 1 {
				break
			}
		}
		if got, _, mean := ping(t, a, "-c", "20", "-i", "0.01", "-W", "5", to); got != 20 {
			t.Errorf("%s: %d of 20 answered, in %g ms", to, got, mean)
		}
	}
	l.Set(Conditions{Delay: 25 * time.Millisecond, Jitter: 5 * time.Millisecond})
	if got, least, _ := ping(t, a, "-c", "5", "-i", "0.05", "-W", "5", "198.51.100.2"); got != 5 || least < 50 {
		t.Errorf("25 ms each way: got %d answers, the first after %g ms", got, least)
	}
	l.SetDirections(Conditions{Loss: 0.3}, Conditions{})
	before, _ := l.Counters()
	got, _, _ := ping(t, a, "-c", "300", "-i", "0.002", "-W", "1", "198.51.100.2")
	after, back := l.Counters()
	lost := int(after.Lost - before.Lost)
	if lost < 50 || lost > 140 || got != 300-lost || back.Dropped() != 0 {
		t.Errorf("loss of 30 %%: got %d answers, lost %d, lost on the way back %d", got, lost, back.Dropped())
	}
	l.Set(Conditions{Down: true})
	if got, _, _ := ping(t, a, "-c", "3", "-i", "0.01", "-W", "1", "198.51.100.2"); got != 0 {
		t.Errorf("link down: got %d answers", got)
	}
	if c, _ := l.Counters(); c.Blocked < 3 {
		t.Errorf("link down: counted %d packets", c.Blocked)
	}
	l.Set(Conditions{})
	if got, _, _ := ping(t, a, "-c", "3", "-i", "0.01", "-W", "5", "198.51.100.2"); got != 3 {
		t.Errorf("link up again: got %d answers", got)
	}
}

func TestMTU(t *testing.T) {
	l, a, b := shaped(t)
	l.Set(Conditions{MTU: 1300})
	for _, tt := range []struct {
		size string
		want int
	}{{"1272", 2}, {"1273", 0}} { // 28 bytes of headers besides
		if got, _, _ := ping(t, a, "-c", "2", "-i", "0.01", "-W", "1", "-M", "do", "-s", tt.size, "198.51.100.2"); got != tt.want {
			t.Errorf("black hole above 1300: got %d answers to %s bytes, want %d", got, tt.size, tt.want)
		}
	}
	if c, _ := l.Counters(); c.TooBig != 2 {
		t.Errorf("counted %d packets as too big, want 2", c.TooBig)
	}
	// With ICMP the kernel learns the path's MTU, so that a transfer passes.
	l.Set(Conditions{MTU: 1300, PacketTooBig: true})
	for _, to := range []netip.AddrPort{netip.AddrPortFrom(bAddr.Addr(), 5001), netip.AddrPortFrom(bAddr6.Addr(), 5001)} {
		transfer(t, a, b, to, 1<<20)
		out, err := a.Command(t.Context(), "ip", "route", "get", to.Addr().String()).Output()
		if err != nil || !regexp.MustCompile(`mtu 1300`).Match(out) {
			t.Errorf("route to %v: %v\n%s", to.Addr(), err, out)
		}
	}
	if c, _ := l.Counters(); c.TooBig < 3 {
		t.Errorf("counted %d packets as too big", c.TooBig)
	}
}

func listenIn(t *testing.T, ns *Namespace, addr netip.AddrPort) (ln net.Listener) {
	t.Helper()
	check(t, ns.Do(func() (err error) { ln, err = net.Listen("tcp", addr.String()); return err }))
	t.Cleanup(func() { ln.Close() })
	return ln
}

func packetIn(t *testing.T, ns *Namespace, addr string) (pc net.PacketConn) {
	t.Helper()
	check(t, ns.Do(func() (err error) { pc, err = net.ListenPacket("udp", addr); return err }))
	t.Cleanup(func() { pc.Close() })
	return pc
}

// transfer sends random bytes over TCP, compares their digests and returns the time that it took.
func transfer(t *testing.T, from, to *Namespace, addr netip.AddrPort, size int) time.Duration {
	t.Helper()
	ln := listenIn(t, to, addr)
	defer ln.Close()
	got := make(chan string, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			got <- err.Error()
			return
		}
		defer c.Close()
		h := sha256.New()
		n, err := io.Copy(h, c)
		got <- fmt.Sprintf("%d %x %v", n, h.Sum(nil), err)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	start := time.Now()
	c, err := from.Dial(ctx, addr.String())
	check(t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	h, rng := sha256.New(), rand.NewChaCha8([32]byte{1})
	_, err = io.CopyN(io.MultiWriter(c, h), rng, int64(size))
	check(t, err)
	check(t, c.(*net.TCPConn).CloseWrite())
	if want := fmt.Sprintf("%d %x %v", size, h.Sum(nil), nil); want != <-got {
		t.Errorf("transfer: got another digest than %s", want)
	}
	return time.Since(start)
}

func TestRate(t *testing.T) {
	l, a, b := shaped(t)
	to := netip.AddrPortFrom(bAddr.Addr(), 5001)
	t.Logf("no limit: 256 MiB in %v", transfer(t, a, b, to, 256<<20))
	l.Set(Conditions{Rate: 80e6, Queue: 64 << 10, Delay: 2 * time.Millisecond})
	if got := transfer(t, a, b, to, 10<<20); got < time.Second {
		t.Errorf("10 MiB at 10 MB/s took %v", got)
	}
	if c, _ := l.Counters(); c.Overflow == 0 {
		t.Error("the queue of 64 KiB never overflowed")
	}
}

// Packets per second through the link, small ones over UDP, for the log.
func TestPackets(t *testing.T) {
	l, a, b := shaped(t)
	out, in := packetIn(t, a, "198.51.100.1:0"), packetIn(t, b, "198.51.100.2:7000")
	done := make(chan int)
	go func() {
		buf, n := make([]byte, 2048), 0
		for {
			if _, _, err := in.ReadFrom(buf); err != nil {
				done <- n
				return
			}
			n++
		}
	}()
	start, msg := time.Now(), make([]byte, 64)
	const packets = 200_000
	for range packets {
		out.WriteTo(msg, in.LocalAddr())
	}
	in.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	n := <-done
	c, _ := l.Counters()
	t.Logf("%d packets, %d arrived, %v in all; the link carried %d: %.0f packets/s", packets, n, time.Since(start), c.Passed,
		float64(c.Passed)/time.Since(start).Seconds())
	if c.Passed == 0 {
		t.Error("no packet passed")
	}
}

func TestUDP(t *testing.T) {
	l, a, b := shaped(t)
	for _, fam := range []string{"198.51.100.%d:%d", "[2001:db8::%d]:%d"} {
		out, in := packetIn(t, a, fmt.Sprintf(fam, 1, 0)), packetIn(t, b, fmt.Sprintf(fam, 2, 7000))
		// send reports whether a packet of so many bytes arrives, from where, and answers it.
		send := func(size int) (from net.Addr, ok bool) {
			buf := make([]byte, 2048)
			if _, err := out.WriteTo(buf[:size], in.LocalAddr()); err != nil {
				t.Fatal(err)
			}
			in.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			n, from, err := in.ReadFrom(buf)
			if err == nil && n != size {
				t.Errorf("got %d bytes of %d", n, size)
			}
			return from, err == nil
		}
		answered := func(to net.Addr) bool {
			if _, err := in.WriteTo([]byte("answer"), to); err != nil {
				t.Fatal(err)
			}
			out.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			_, _, err := out.ReadFrom(make([]byte, 100))
			return err == nil
		}
		direct, ok := send(1000)
		if !ok {
			t.Fatal("a perfect link dropped a packet")
		}
		l.Rebind()
		first, ok := send(1000)
		if !ok || first.String() == direct.String() || !answered(first) {
			t.Errorf("translated: got %v from %v, or no answer; directly from %v", ok, first, direct)
		}
		l.Rebind()
		if answered(first) {
			t.Error("a forgotten mapping still leads to a")
		}
		second, ok := send(100)
		if !ok || second.String() == first.String() || !answered(second) {
			t.Errorf("bound anew: got %v from %v, or no answer; before from %v", ok, second, first)
		}
		if _, c := l.Counters(); c.Unmapped == 0 {
			t.Error("no packet counted as unmapped")
		}
		for _, tt := range []struct {
			name         string
			c            Conditions
			small, large bool
		}{
			{"all", Conditions{DropUDP: true}, false, false},
			{"large", Conditions{DropUDP: true, DropUDPOver: 600}, true, false},
			{"later", Conditions{DropUDP: true, DropUDPAfter: time.Hour}, true, true},
		} {
			l.Set(tt.c)
			_, small := send(100)
			_, large := send(1000)
			if small != tt.small || large != tt.large {
				t.Errorf("drop %s: got small %v, large %v", tt.name, small, large)
			}
		}
		if c, _ := l.Counters(); c.UDP == 0 {
			t.Error("no packet counted as dropped UDP")
		}
		l.Set(Conditions{})
	}
}

func TestReaddress(t *testing.T) {
	l, a, b := shaped(t)
	check(t, b.AddAddr("lo", netip.MustParsePrefix("10.9.0.1/32")))
	check(t, a.Route(netip.MustParsePrefix("10.9.0.0/16"), bAddr.Addr()))
	moved := netip.MustParsePrefix("198.51.100.77/24")
	check(t, l.Readdress(a, aAddr, moved))
	for from, want := range map[string]int{"198.51.100.77": 1, "198.51.100.2": 1} {
		ns := b
		if from == "198.51.100.2" {
			ns = a
		}
		if got, _, _ := ping(t, ns, "-c", "1", "-W", "2", from); got != want {
			t.Errorf("ping %s: got %d answers", from, got)
		}
	}
	if got, _, _ := ping(t, a, "-c", "1", "-W", "2", "10.9.0.1"); got != 1 {
		t.Error("the route through the device did not survive")
	}
	if got, _, _ := ping(t, b, "-c", "1", "-W", "1", "198.51.100.1"); got != 0 {
		t.Error("the old address still answers")
	}
}
