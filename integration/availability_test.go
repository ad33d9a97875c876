//go:build netns

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/internal/testnet"
)

// Each site has its own fault, over its own link, at the same time as the others; see makeLinked for the drawing. Visitors
// come over the edge that all have in common.
func TestLinkFaults(t *testing.T) {
	t.Parallel() // with TestEdgesAway: both mostly wait
	w := makeLinked(t, linkedSites{"drain": 0, "udp": 1, "carrier": 0, "outage": 1, "hole": 0, "small": 0, "toobig": 0, "nat": 0, "asleep": 0, "kill": 1})
	w.sites["udp"].transport(t, "udp-2", map[string]any{"carrier": "tcp"})
	w.sites["nat"].transport(t, "nat", map[string]any{"carrier": "quic"}) // only QUIC outlives a change of address
	w.sites["small"].link.Set(testnet.Conditions{DropUDP: true, DropUDPOver: 300})
	began := time.Now()
	must(t, w.Start(t.Context()))
	t.Logf("%d connectors up after %.1f s", 13, time.Since(began).Seconds())
	together(t, map[string]func(*testing.T){
		"a connector drains":          w.sites["drain"].connectorDrains,
		"UDP blocked":                 w.sites["udp"].udpBlocked,
		"one carrier, or a proxy":     w.sites["carrier"].oneCarrier,
		"network away":                w.sites["outage"].networkAway,
		"black hole":                  w.sites["hole"].blackHole,
		"UDP for small packets alone": w.sites["small"].smallUDP,
		"packet too big":              w.sites["toobig"].packetTooBig,
		"addresses change":            w.sites["nat"].addressesChange,
		"suspended":                   w.sites["asleep"].suspended,
		"killed":                      w.sites["kill"].killed,
	})
	w.edgeDrains(t)
}

// start starts the site's first connector with a configuration of its own.
func (s *linkedSite) start(t *testing.T, transport map[string]any) {
	t.Helper()
	must(t, s.Connector.Stop())
	s.transport(t, s.Name, transport)
	must(t, s.Connector.Start())
}

// exits waits for a process's end, which must be in order.
func exits(t *testing.T, p *lab.Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := p.Wait(ctx); err != nil {
		t.Errorf("%s ended with %v, want exit code 0", p.Name(), err)
	}
}

var stops = []syscall.Signal{syscall.SIGTERM, syscall.SIGINT}

// A connector that is told to stop lets the open stream end and then goes, long before its grace of five minutes is over.
func (s *linkedSite) connectorDrains(t *testing.T) {
	for _, carrier := range []string{"quic", "tcp"} {
		for _, signal := range stops {
			s.start(t, map[string]any{"carrier": carrier})
			s.await(t, "up over "+carrier, map[string]string{s.Name: carrier})
			st := s.watchEvents(t, 20)
			must(t, s.Connector.Signal(signal))
			st.whole(t)
			ended := time.Now()
			exits(t, s.Connector)
			t.Logf("%s, %v: gone %.2f s after the stream's end", carrier, signal, time.Since(ended).Seconds())
		}
	}
	s.down(t)
	must(t, s.Connector.Start())
}

// An edge that is told to stop does the same.
func (w *linked) edgeDrains(t *testing.T) {
	s := w.sites["drain"]
	for _, carrier := range []string{"quic", "tcp"} {
		s.start(t, map[string]any{"carrier": carrier})
		for _, signal := range stops {
			s.await(t, "up over "+carrier, map[string]string{s.Name: carrier})
			eventually(t, "a page", s.page)
			st := s.watchEvents(t, 12)
			must(t, w.EdgeProc.Signal(signal))
			st.whole(t)
			ended := time.Now()
			exits(t, w.EdgeProc)
			t.Logf("edge, %s, %v: gone %.2f s after the stream's end", carrier, signal, time.Since(ended).Seconds())
			must(t, w.EdgeProc.Start())
			must(t, w.AwaitEdge(t.Context()))
		}
	}
}

// UDP comes and goes. The first connector follows, over TCP and back; the second has TCP alone, so that visitors always have
// a way.
func (s *linkedSite) udpBlocked(t *testing.T) {
	both := func(first string) map[string]string { return map[string]string{s.Name: first, "udp-2": "tcp"} }
	must(t, s.Connector.Stop())
	s.link.Set(testnet.Conditions{DropUDP: true})
	must(t, s.Connector.Start())
	s.await(t, "UDP blocked from the start, up over TCP", both("tcp"))
	began := time.Now()

	visitors := startLoop(t.Context(), s.page)
	long := s.watchEvents(t, 350)
	s.link.Set(testnet.Conditions{})
	s.await(t, "UDP passes again, back to QUIC", both("quic"))
	t.Logf("that is %.1f s after the sessions began", time.Since(began).Seconds())
	visitors.end(t, "while the sessions moved to QUIC")

	visitors = startLoop(t.Context(), s.page)
	s.link.Set(testnet.Conditions{DropUDP: true})
	s.await(t, "UDP blocked later, over TCP", both("tcp"))
	visitors.end(t, "while the sessions moved to TCP")
	long.whole(t) // begun over TCP, it has seen both moves
	if up, down := s.link.Counters(); up.UDP+down.UDP == 0 {
		t.Error("the link dropped no packets of UDP")
	}
}

// With one way alone the connector takes that one, and with none it says so and waits.
func (s *linkedSite) oneCarrier(t *testing.T) {
	none := func(what string) {
		t.Helper()
		out, err := s.NS.Command(t.Context(), "curl", "-sS", "--fail-with-body", "http://"+s.Ops+"/readyz").CombinedOutput()
		if err == nil {
			t.Errorf("%s: the connector says that it is ready: %s", what, out)
		}
		v, err := s.w.info(t.Context(), 0, s.Name)
		if err != nil || v.Sessions != 0 {
			t.Errorf("%s: got %d sessions, %v", what, v.Sessions, err)
		}
	}
	says := func(from int, text string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		must(t, s.Connector.WaitLog(ctx, from, text))
	}

	open := s.block(t, "ipproto", protoTCP)
	s.start(t, map[string]any{"carrier": "auto"})
	s.await(t, "TCP blocked, up over QUIC", map[string]string{s.Name: "quic"})
	must(t, s.page(t.Context()))
	from := len(s.Connector.Log())
	s.start(t, map[string]any{"carrier": "tcp"})
	says(from, "no session to the edge")
	none("TCP blocked, carrier tcp")
	open()
	s.await(t, "TCP passes, carrier tcp", map[string]string{s.Name: "tcp"})

	open = s.block(t, "ipproto", protoUDP)
	from = len(s.Connector.Log())
	s.start(t, map[string]any{"carrier": "quic"})
	says(from, "no session to the edge")
	none("UDP blocked, carrier quic")
	open()
	s.await(t, "UDP passes, carrier quic", map[string]string{s.Name: "quic"})

	// A proxy is the only way out.
	closeAll := s.block(t, "to", "192.0.2.1")
	defer closeAll()
	at := fmt.Sprintf("198.18.%d.1:3128", s.net)
	p := startProxy(t, s.w.edge, at, linkedTunnel, "site", "canary-of-the-proxy")
	password := s.w.Path("proxy-password")
	must(t, os.WriteFile(password, []byte("wrong-canary\n"), 0o600))
	proxy := map[string]any{"proxy": map[string]any{"url": "http://" + at, "user": "site", "password_file": password}}
	from = len(s.Connector.Log())
	s.start(t, proxy)
	says(from, "407")
	must(t, os.WriteFile(password, []byte("canary-of-the-proxy\n"), 0o600))
	s.await(t, "a proxy is the only way, up through it", map[string]string{s.Name: "tcp"})
	must(t, s.page(t.Context()))
	if p.refused.Load() == 0 || p.tunnels.Load() < 4 {
		t.Errorf("the proxy refused %d connections and carried %d", p.refused.Load(), p.tunnels.Load())
	}
	if log := s.Connector.Log(); strings.Contains(log, "canary") {
		t.Errorf("a password is in the log:\n%s", log)
	}
}

// The network is away for so long that all sessions are dead and the pauses between attempts have grown.
func (s *linkedSite) networkAway(t *testing.T) {
	all := map[string]string{s.Name: "", "outage-2": ""}
	s.await(t, "up", all)
	before, err := s.w.info(t.Context(), 0, s.Name)
	must(t, err)
	s.link.Set(testnet.Conditions{Down: true})
	s.down(t)
	time.Sleep(20 * time.Second) // how long it lasts is the point
	s.link.Set(testnet.Conditions{})
	s.await(t, "back after the outage, on all connections of both connectors", all)
	after, err := s.w.info(t.Context(), 0, s.Name)
	must(t, err)
	if !after.Since.After(before.Since) {
		t.Errorf("up since %v, want later than %v: no session outlived the outage", after.Since, before.Since)
	}
	must(t, s.page(t.Context()))
}

// download gets 20 MB through the tunnel.
func (s *linkedSite) download(ctx context.Context, args ...string) error {
	const size = "20000000"
	out, err := s.w.curl(ctx, s.host(), "/download?n="+size, append([]string{"-o", "/dev/null", "-w", "%{size_download}", "-m", "60"}, args...)...)
	if err == nil && out != size {
		err = fmt.Errorf("got %s bytes", out)
	}
	return err
}

// heals waits until pages and downloads come again.
func (s *linkedSite) heals(t *testing.T, what string) {
	t.Helper()
	began := time.Now()
	eventually(t, what+": a page", s.page)
	t.Logf("%s: a page after %.1f s", what, time.Since(began).Seconds())
	eventually(t, what+": a download", func(ctx context.Context) error { return s.download(ctx) })
	t.Logf("%s: a download of 20 MB after %.1f s", what, time.Since(began).Seconds())
	eventually(t, what+": healthy", func(ctx context.Context) error {
		v, err := s.w.info(ctx, 0, s.Name)
		if err == nil && (v.Status != "healthy" || len(v.main(s.Name)) != 4) {
			err = fmt.Errorf("%s with %d sessions", v.Status, len(v.main(s.Name)))
		}
		for _, m := range v.main(s.Name) {
			what += " " + m.Carrier
		}
		return err
	})
	t.Logf("%s: healthy after %.1f s", what, time.Since(began).Seconds())
}

// The path begins to lose packets of more than 1,100 bytes, and nobody is told: not even QUIC's smallest first packets pass.
func (s *linkedSite) blackHole(t *testing.T) {
	must(t, s.page(t.Context()))
	s.link.Set(testnet.Conditions{MTU: 1100})
	s.heals(t, "a black hole for 1,100 bytes")
	if up, down := s.link.Counters(); up.TooBig+down.TooBig == 0 {
		t.Error("the link dropped no large packets")
	}
}

// UDP passes only in small packets, from the start.
func (s *linkedSite) smallUDP(t *testing.T) {
	s.await(t, "small packets of UDP alone, up over TCP", map[string]string{s.Name: "tcp"})
	s.heals(t, "small packets of UDP alone")
	if up, _ := s.link.Counters(); up.UDP == 0 {
		t.Error("the link dropped no UDP")
	}
}

// A router on the path has a smaller MTU from now on, and says so.
func (s *linkedSite) packetTooBig(t *testing.T) {
	must(t, s.page(t.Context()))
	st := s.watchEvents(t, 50)
	s.link.Set(testnet.Conditions{MTU: 1400, PacketTooBig: true})
	s.heals(t, "a router with an MTU of 1,400 bytes")
	st.whole(t)
}

// The site's address as the edge sees it changes twice: a translator gives new ports, and then the site gets another address.
func (s *linkedSite) addressesChange(t *testing.T) {
	quic := map[string]string{s.Name: "quic"}
	s.await(t, "up", quic)
	since := func() (list []string) {
		v, err := s.w.info(t.Context(), 0, s.Name)
		must(t, err)
		for _, m := range v.main(s.Name) {
			list = append(list, m.Since.String())
		}
		return list
	}
	from := func(what string, right func(netip.AddrPort) bool) {
		t.Helper()
		began := time.Now()
		eventually(t, what, func(ctx context.Context) error {
			v, err := s.w.info(ctx, 0, s.Name)
			if err == nil {
				err = v.is("healthy", quic)
			}
			for _, m := range v.main(s.Name) {
				if a, perr := netip.ParseAddrPort(m.Remote); perr != nil || !right(a) {
					err = errors.Join(err, fmt.Errorf("a session comes from %s", m.Remote))
				}
			}
			return err
		})
		t.Logf("%s: all sessions after %.1f s", what, time.Since(began).Seconds())
	}
	before := since()
	for i := range 2 { // the first only puts the translator there
		st := s.watchEvents(t, 80)
		visitors := startLoop(t.Context(), s.page)
		s.link.Rebind()
		from(fmt.Sprintf("new ports, time %d", i+1), func(a netip.AddrPort) bool { return a.Port() >= uint16(20_000+4*i) && a.Port() < 30_000 })
		visitors.end(t, "while ports changed")
		st.whole(t)
	}
	st := s.watchEvents(t, 80)
	visitors := startLoop(t.Context(), s.page)
	fresh := netip.MustParsePrefix(fmt.Sprintf("198.18.%d.3/29", s.net))
	must(t, s.link.Readdress(s.NS, netip.MustParsePrefix(fmt.Sprintf("198.18.%d.2/29", s.net)), fresh))
	from("a new address", func(a netip.AddrPort) bool { return a.Addr() == fresh.Addr() })
	visitors.end(t, "while the address changed")
	st.whole(t)
	if after := since(); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("sessions since %v, want the same as before: %v", after, before)
	}
}

// The connector's host sleeps, for longer than sessions live.
func (s *linkedSite) suspended(t *testing.T) {
	four := map[string]string{s.Name: ""}
	s.await(t, "up", four)
	must(t, s.Connector.Signal(syscall.SIGSTOP))
	s.down(t)
	time.Sleep(5 * time.Second)
	must(t, s.Connector.Signal(syscall.SIGCONT))
	s.await(t, "awake", four)
	must(t, s.page(t.Context()))
}

// Two connectors of a tunnel share the load, and the death of one costs no visitor anything.
func (s *linkedSite) killed(t *testing.T) {
	both := map[string]string{s.Name: "", "kill-2": ""}
	s.await(t, "up", both)
	var streams []*stream
	for range 6 {
		streams = append(streams, s.watchEvents(t, 20))
	}
	v, err := s.w.info(t.Context(), 0, s.Name)
	must(t, err)
	for connector := range both {
		flows := 0
		for _, m := range v.main(connector) {
			flows += m.Flows
		}
		if flows == 0 {
			t.Errorf("connector %s carries none of %d streams", connector, len(streams))
		}
		t.Logf("connector %s carries %d flows", connector, flows)
	}
	for _, st := range streams {
		st.whole(t)
	}
	visitors := startLoop(t.Context(), s.page)
	for _, c := range s.Connectors {
		must(t, c.Proc.Kill())
		began := time.Now()
		eventually(t, "the status", func(ctx context.Context) error {
			v, err := s.w.info(ctx, 0, s.Name)
			if err == nil && v.Status != "degraded" {
				err = fmt.Errorf("it is %s", v.Status)
			}
			return err
		})
		t.Logf("%s killed: degraded after %.1f s", c.Name, time.Since(began).Seconds())
		must(t, c.Proc.Start())
		s.await(t, "whole again", both)
	}
	visitors.end(t, "while each of two connectors was killed")
}
