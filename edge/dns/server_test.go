package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// site is a name server behind a tunnel, reached by flows in memory. It knows names below site.internal.
type site struct {
	asked   atomic.Int64
	mute    atomic.Bool // over UDP
	refuses atomic.Bool
}

func (s *site) find(q control.Query) error {
	switch {
	case !q.Resolver && q.Host != "10.0.0.53":
		return control.ErrNoRoute
	case q.Resolver && !strings.HasSuffix(q.Host, ".site.internal"):
		return control.ErrNoRoute
	case s.refuses.Load():
		return tunnel.ErrDenied
	}
	return nil
}

func (s *site) answer(b []byte, udp bool) []byte {
	s.asked.Add(1)
	q := new(mdns.Msg)
	if q.Unpack(b) != nil {
		return nil
	}
	r := new(mdns.Msg).SetReply(q)
	name, hdr := q.Question[0].Name, mdns.RR_Header{Name: q.Question[0].Name, Rrtype: q.Question[0].Qtype, Class: mdns.ClassINET, Ttl: 60}
	soa := &mdns.SOA{Hdr: mdns.RR_Header{Name: "site.internal.", Rrtype: mdns.TypeSOA, Class: mdns.ClassINET, Ttl: 60}, Ns: "ns.site.internal.", Mbox: "root.site.internal.", Minttl: 30}
	switch {
	case strings.HasPrefix(name, "missing."):
		r.Rcode, r.Ns = mdns.RcodeNameError, []mdns.RR{soa}
	case strings.HasPrefix(name, "broken."):
		r.Rcode = mdns.RcodeServerFailure
	case strings.HasPrefix(name, "big."):
		for i := range 200 {
			r.Answer = append(r.Answer, &mdns.A{Hdr: hdr, A: net.IPv4(10, 1, 0, byte(i))})
		}
		if udp {
			r.Answer, r.Truncated = r.Answer[:1], true
		}
	case q.Question[0].Qtype == mdns.TypeA:
		r.Answer = []mdns.RR{&mdns.A{Hdr: hdr, A: net.IPv4(10, 0, 0, 7)}}
	case q.Question[0].Qtype == mdns.TypeAAAA:
		r.Answer = []mdns.RR{&mdns.AAAA{Hdr: hdr, AAAA: net.ParseIP("fd00::7")}}
	case q.Question[0].Qtype == mdns.TypeTXT:
		r.Answer = []mdns.RR{&mdns.TXT{Hdr: hdr, Txt: []string{"hello"}}}
	default:
		r.Ns = []mdns.RR{soa}
	}
	out, err := r.Pack()
	if err != nil {
		panic(err)
	}
	return out
}

func (s *site) DialPacket(_ context.Context, q control.Query) (tunnel.PacketConn, error) {
	if err := s.find(q); err != nil {
		return nil, err
	}
	f := &memoryFlow{site: s, arrived: make(chan []byte, 4), expired: make(chan struct{})}
	return f, nil
}

func (s *site) Dial(_ context.Context, q control.Query) (net.Conn, error) {
	if err := s.find(q); err != nil {
		return nil, err
	}
	here, there := net.Pipe()
	go func() {
		defer there.Close()
		c := &mdns.Conn{Conn: streamConn{there}}
		b := make([]byte, 65535)
		for {
			n, err := c.Read(b)
			if err != nil {
				return
			}
			if _, err := c.Write(s.answer(b[:n], false)); err != nil {
				return
			}
		}
	}()
	return here, nil
}

// memoryFlow is a flow to a site's name server.
type memoryFlow struct {
	tunnel.PacketConn
	site    *site
	arrived chan []byte
	once    sync.Once
	expired chan struct{}
}

func (f *memoryFlow) WritePacket(b []byte) error {
	if !f.site.mute.Load() {
		f.arrived <- []byte("not DNS")
		f.arrived <- f.site.answer(b, true)
	}
	return nil
}

func (f *memoryFlow) ReceivePacket() ([]byte, error) {
	select {
	case b := <-f.arrived:
		return b, nil
	case <-f.expired:
		return nil, errors.New("expired")
	}
}

func (f *memoryFlow) SetReadDeadline(time.Time) error {
	f.once.Do(func() { close(f.expired) })
	return nil
}
func (f *memoryFlow) Close() error { return nil }

func start(t *testing.T, edit ...func(*Config)) (*Server, *site) {
	t.Helper()
	at := &site{}
	cfg := Config{Listen: "127.0.0.1:0", VNet: "default", Allow: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}, Dialer: at, Rate: 10_000}
	for _, f := range edit {
		f(&cfg)
	}
	s, err := Listen(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s, at
}

// dig asks with the real dig and returns what it prints.
func dig(t *testing.T, s *Server, args ...string) string {
	t.Helper()
	args = append([]string{"@127.0.0.1", "-p", fmt.Sprint(s.Addr().Port()), "+tries=1", "+time=8"}, args...)
	out, err := exec.CommandContext(t.Context(), "dig", args...).CombinedOutput()
	if err != nil {
		t.Logf("dig %q: %v", args, err)
	}
	return string(out)
}

func TestDig(t *testing.T) {
	s, at := start(t)
	for _, c := range []struct {
		name string
		args []string
		want []string
	}{
		{"A", []string{"db.site.internal", "A"}, []string{"NOERROR", "10.0.0.7"}},
		{"AAAA in capitals", []string{"DB.Site.Internal", "AAAA"}, []string{"NOERROR", "DB.Site.Internal.", "fd00::7"}},
		{"TXT over TCP", []string{"+tcp", "db.site.internal", "TXT"}, []string{"NOERROR", "hello"}},
		{"without EDNS", []string{"+noedns", "db.site.internal", "A"}, []string{"10.0.0.7"}},
		{"no such name", []string{"missing.site.internal"}, []string{"NXDOMAIN"}},
		{"no such type", []string{"db.site.internal", "MX"}, []string{"NOERROR", "ANSWER: 0"}},
		{"many answers", []string{"big.site.internal"}, []string{"NOERROR", "ANSWER: 200", "(TCP)"}},
		{"cut short", []string{"+ignore", "big.site.internal"}, []string{"flags: qr tc"}},
		{"another name", []string{"www.example.com"}, []string{"REFUSED"}},
		{"any", []string{"db.site.internal", "ANY", "+notcp"}, []string{"NOTIMP"}},
		{"chaos", []string{"version.bind", "TXT", "CH"}, []string{"REFUSED"}},
		{"transfer", []string{"site.internal", "AXFR"}, []string{"ransfer failed"}},
		{"a failing server", []string{"broken.site.internal"}, []string{"SERVFAIL"}},
		{"EDNS 1", []string{"+edns=1", "+noednsnegotiation", "db.site.internal"}, []string{"BADVERS"}},
	} {
		out := dig(t, s, c.args...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%s: dig's output lacks %q:\n%s", c.name, want, out)
			}
		}
	}
	before := at.asked.Load()
	dig(t, s, "db.site.internal", "A")
	dig(t, s, "missing.site.internal")
	if got := at.asked.Load(); got != before {
		t.Errorf("the site was asked %d times more, want cached answers", got-before)
	}
	at.mute.Store(true)
	if out := dig(t, s, "other.site.internal", "A"); !strings.Contains(out, "10.0.0.7") {
		t.Errorf("without answers over UDP:\n%s", out)
	}
	at.refuses.Store(true)
	if out := dig(t, s, "third.site.internal", "A"); !strings.Contains(out, "SERVFAIL") {
		t.Errorf("a connector that does not serve its resolver:\n%s", out)
	}
}

func TestUpstream(t *testing.T) {
	s, _ := start(t, func(c *Config) {
		c.Upstream = []netip.AddrPort{netip.MustParseAddrPort("10.0.0.54:53"), netip.MustParseAddrPort("10.0.0.53:53")}
	})
	if out := dig(t, s, "www.example.com"); !strings.Contains(out, "10.0.0.7") {
		t.Errorf("a name without a route:\n%s", out)
	}
}

func TestWhoMayAsk(t *testing.T) {
	if _, err := Listen(Config{Listen: "127.0.0.1:0", Dialer: &site{}}); err == nil || !strings.Contains(err.Error(), "nobody may ask") {
		t.Errorf("no prefix: got %v, want a refusal", err)
	}
	s, at := start(t, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
	c := mdns.Client{Timeout: 200 * time.Millisecond}
	if r, _, err := c.Exchange(new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA), s.Addr().String()); err == nil {
		t.Errorf("a stranger got %v", r)
	}
	if n := testutil.ToFloat64(s.metrics.queries.WithLabelValues("denied")); n != 1 || at.asked.Load() != 0 {
		t.Errorf("%v denied, %d asked, want 1 and 0", n, at.asked.Load())
	}
}

// malformed are messages that a server answers with an error.
func malformed(t *testing.T) (list [][]byte) {
	t.Helper()
	q := new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA)
	whole, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	q.Opcode = mdns.OpcodeUpdate
	update, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	two := append([]byte(nil), whole...)
	two[5] = 2 // questions
	return [][]byte{update, two, whole[:len(whole)-3]}
}

// Answers to strangers could be meant for somebody whose address they have forged, errors too.
func TestStrangersGetNoErrors(t *testing.T) {
	strangers, at := start(t, func(c *Config) { c.Allow = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
	friends, _ := start(t)
	ask := func(s *Server, b []byte) int {
		c, err := net.Dial("udp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if s == strangers {
			c.SetDeadline(time.Now().Add(200 * time.Millisecond))
		}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		n, _ := c.Read(make([]byte, 512))
		return n
	}
	for i, b := range malformed(t) {
		if n := ask(friends, b); n == 0 {
			t.Errorf("message %d: a friend got no error", i)
		}
		if n := ask(strangers, b); n != 0 {
			t.Errorf("message %d: a stranger got %d bytes", i, n)
		}
	}
	if at.asked.Load() != 0 {
		t.Error("the site was asked")
	}
}

// A stranger's connections are not taken in, so that they cannot keep others out, and one source has its share of them.
func TestConnectionsOfStrangers(t *testing.T) {
	s, _ := start(t, func(c *Config) {
		c.Allow = []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32"), netip.MustParsePrefix("127.0.0.3/32")}
	})
	from := func(ip string) net.Conn {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		c, err := d.DialContext(t.Context(), "tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	refused := func(c net.Conn, why string) {
		t.Helper()
		c.SetReadDeadline(time.Now().Add(30 * time.Second))
		c.Read(make([]byte, 1)) //nolint:errcheck // it ends, taken in or not
		if n := testutil.ToFloat64(s.metrics.queries.WithLabelValues(why)); n != 1 {
			t.Errorf("%v connections were refused as %s, want 1", n, why)
		}
	}
	refused(from("127.0.0.1"), "denied")
	for range maxTCPPerSource {
		from("127.0.0.2")
	}
	refused(from("127.0.0.2"), "limited")
	c := &mdns.Conn{Conn: from("127.0.0.3")}
	if err := c.WriteMsg(new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA)); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(30 * time.Second))
	if r, err := c.ReadMsg(); err != nil || len(r.Answer) != 1 {
		t.Errorf("another source got %v, %v", r, err)
	}
}

// A source that asks too much gets nothing for it, over UDP and TCP.
func TestRate(t *testing.T) {
	s, _ := start(t, func(c *Config) { c.Rate = 1 })
	c := &mdns.Client{Net: "tcp", Timeout: 30 * time.Second}
	conn, err := c.Dial(s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var failed error
	for range 3 {
		if _, _, failed = c.ExchangeWithConn(new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA), conn); failed != nil {
			break
		}
	}
	if n := testutil.ToFloat64(s.metrics.queries.WithLabelValues("limited")); failed == nil || n < 1 {
		t.Errorf("three queries at once at a rate of 1: got %v, %v counted", failed, n)
	}
}

// However many wait for a slow answer, what they hold is bounded.
func TestWaitingIsBounded(t *testing.T) {
	s, at := start(t)
	for range maxWaiting {
		s.waiting <- struct{}{}
	}
	c := mdns.Client{Timeout: 200 * time.Millisecond}
	if r, _, err := c.Exchange(new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA), s.Addr().String()); err == nil || at.asked.Load() != 0 {
		t.Errorf("one more than there may be got %v", r)
	}
	for range maxWaiting {
		<-s.waiting
	}
	if out := dig(t, s, "db.site.internal", "A"); !strings.Contains(out, "10.0.0.7") {
		t.Errorf("with room again:\n%s", out)
	}
}

func TestLimiter(t *testing.T) {
	l := limiter{rate: 5}
	now := time.Unix(1e9, 0)
	a, b := netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	for i := range 8 {
		from := a
		if i%2 == 1 {
			from = b // the same /64
		}
		if got := l.allow(from, now); got != (i < 5) {
			t.Errorf("query %d: got %v", i, got)
		}
	}
	if !l.allow(a, now.Add(300*time.Millisecond)) || l.allow(a, now.Add(300*time.Millisecond)) {
		t.Error("want one more after 300 ms")
	}
	for i := range maxSources + 10 {
		l.allow(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
	}
	if len(l.buckets) > maxSources {
		t.Errorf("%d sources are remembered, want at most %d", len(l.buckets), maxSources)
	}
}

func TestCache(t *testing.T) {
	c := newCache(2)
	now := time.Unix(1e9, 0)
	reply := func(ttl uint32) *mdns.Msg {
		m := new(mdns.Msg)
		m.Answer = []mdns.RR{&mdns.A{Hdr: mdns.RR_Header{Name: "a.", Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: ttl}, A: net.IPv4(10, 0, 0, 1)}}
		return m
	}
	k := func(name string) question { return question{name: name, typ: mdns.TypeA} }
	c.put(k("a"), reply(60), now)
	if got, ok := c.get(k("a"), now.Add(20*time.Second)); !ok || got.Answer[0].Header().Ttl != 40 {
		t.Errorf("after 20 s: got %v, %v, want a TTL of 40", got, ok)
	}
	if _, ok := c.get(k("a"), now.Add(60*time.Second)); ok {
		t.Error("after 60 s it is still there")
	}
	c.put(k("zero"), reply(0), now)
	if _, ok := c.get(k("zero"), now); ok {
		t.Error("an answer with TTL 0 was kept")
	}
	for _, name := range []string{"a", "b", "c"} {
		c.put(k(name), reply(60), now)
		c.get(k("a"), now)
	}
	_, a := c.get(k("a"), now)
	_, b := c.get(k("b"), now)
	if !a || b || c.recent.Len() != 2 {
		t.Errorf("a %v, b %v, %d entries; want the one that was longest not asked for to go", a, b, c.recent.Len())
	}
	failed := reply(60)
	failed.Rcode = mdns.RcodeServerFailure
	negative := new(mdns.Msg)
	for _, m := range []*mdns.Msg{failed, negative} {
		if d := lifetime(m); d != 0 {
			t.Errorf("%v is kept for %v", m, d)
		}
	}
}

// FuzzQuery plays anybody who may send packets to the server, and FuzzQuery's second message a name server at a site that
// an attacker has taken over.
func FuzzQuery(f *testing.F) {
	q, err := new(mdns.Msg).SetQuestion("db.site.internal.", mdns.TypeA).SetEdns0(4096, true).Pack()
	if err != nil {
		f.Fatal(err)
	}
	at := &site{}
	f.Add(q, at.answer(q, true))
	f.Fuzz(func(t *testing.T, query, reply []byte) {
		m := new(mdns.Msg)
		if m.Unpack(query) != nil || len(m.Question) != 1 {
			return
		}
		s := &Server{cfg: Config{Dialer: fixed(reply), Rate: 1}, log: newLog(), cache: newCache(10)}
		s.metrics, _ = NewMetrics(nil)
		for range 2 { // the second one from the cache
			r := s.answer(t.Context(), m)
			r.Truncate(maxUDPReply)
			if _, err := r.Pack(); err != nil && r.Rcode == mdns.RcodeServerFailure {
				t.Fatalf("failure cannot be packed: %v", err)
			}
		}
		s.asking.wait()
	})
}
