package ingress

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/keyhaven/keyhaven/tunnel"
)

// endless is a service that sends, and takes, as much as one likes.
type endless struct {
	net.Conn
	closed chan struct{}
	once   sync.Once
	mu     sync.Mutex
	took   int
	reset  bool
}

func newEndless() *endless { return &endless{closed: make(chan struct{})} }

func (e *endless) over() bool {
	select {
	case <-e.closed:
		return true
	default:
		return false
	}
}

func (e *endless) Read(b []byte) (int, error) {
	if e.over() {
		return 0, net.ErrClosed
	}
	return len(b), nil
}

func (e *endless) Write(b []byte) (int, error) {
	if e.over() {
		return 0, net.ErrClosed
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.took += len(b)
	return len(b), nil
}

func (e *endless) Close() error                { e.once.Do(func() { close(e.closed) }); return nil }
func (e *endless) CloseWrite() error           { return nil }
func (e *endless) Reset(_ tunnel.Result)       { e.mu.Lock(); e.reset = true; e.mu.Unlock(); e.Close() }
func (e *endless) SetDeadline(time.Time) error { return nil }

func counter() prometheus.Counter { return prometheus.NewCounter(prometheus.CounterOpts{Name: "x"}) }

// All flows of a rule together carry its bandwidth, in each direction, and each has its share, however much it asks for.
func TestPaceIsSharedFairly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const perSecond, seconds, flows = 250_000, 20, 4
		p := newPace(perSecond, counter())
		var wg sync.WaitGroup
		conns := make([]tunnel.Conn, flows)
		got, sent := make([]int, flows), make([]*endless, flows)
		for i := range flows {
			sent[i] = newEndless()
			conns[i] = p.conn(sent[i])
			size := 1 << (8 + 4*i) // from 256 B to 1 MiB a read
			wg.Go(func() {
				for b := make([]byte, size); ; {
					n, err := conns[i].Read(b)
					if err != nil {
						return
					}
					got[i] += n
				}
			})
			wg.Go(func() {
				for b := make([]byte, 1<<20); ; {
					if _, err := conns[i].Write(b); err != nil {
						return
					}
				}
			})
		}
		time.Sleep(seconds * time.Second)
		for _, c := range conns {
			c.Close()
		}
		wg.Wait() // a turn that is waited for ends with Close
		var read, wrote int
		for i := range flows {
			read, wrote = read+got[i], wrote+sent[i].took
		}
		for _, n := range []int{read, wrote} {
			if n < perSecond*seconds*97/100 || n > perSecond*seconds*103/100 {
				t.Errorf("%d bytes in %d s, want about %d", n, seconds, perSecond*seconds)
			}
		}
		for i := 1; i < flows; i++ { // the first asks for less than a chunk at a time
			if share := read / flows; got[i] < share || got[i] > share*3/2 {
				t.Errorf("flow %d had %d of %d bytes, want about its share", i, got[i], read)
			}
			if share := wrote / flows; sent[i].took < share*95/100 || sent[i].took > share*105/100 {
				t.Errorf("flow %d sent %d of %d bytes, want its share", i, sent[i].took, wrote)
			}
		}
	})
}

func TestPacedReset(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace(1000, counter())
		service := newEndless()
		c := p.conn(service)
		done := make(chan error)
		go func() { _, err := c.Write(make([]byte, 1<<20)); done <- err }()
		synctest.Wait()
		c.(tunnel.Resetter).Reset(tunnel.ResultReset)
		if err := <-done; !errors.Is(err, net.ErrClosed) || !service.reset {
			t.Errorf("got %v, reset %t", err, service.reset)
		}
	})
	if c := newEndless(); (*pace)(nil).conn(c) != tunnel.Conn(c) {
		t.Error("without a bandwidth the connection is another")
	}
}

// Packets beyond the bandwidth are dropped rather than kept for long, and flows have equal shares.
func TestLane(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const perSecond, seconds = 100_000, 10
		dropped := counter()
		p := newPace(perSecond, dropped)
		var mu sync.Mutex
		got := [2]int{}
		late := time.Duration(0)
		lanes := [2]*Lane{}
		for i := range lanes {
			lanes[i] = p.lane(p.toVisitor, func(b []byte) error {
				mu.Lock()
				defer mu.Unlock()
				var at time.Time
				if err := at.UnmarshalBinary(b[:15]); err != nil {
					t.Error(err)
				}
				late = max(late, time.Since(at))
				got[i] += len(b)
				return nil
			})
		}
		sent := 0
		var wg sync.WaitGroup
		for i, every := range []time.Duration{time.Millisecond, 5 * time.Millisecond} { // ten times and twice the bandwidth
			wg.Go(func() {
				for range seconds * int(time.Second/every) {
					at, _ := time.Now().MarshalBinary()
					if err := lanes[i].Pass(append(at, make([]byte, 985)...)); err != nil {
						t.Error(err)
					}
					mu.Lock()
					sent++
					mu.Unlock()
					time.Sleep(every)
				}
			})
		}
		wg.Wait()
		for _, l := range lanes {
			l.Close()
		}
		total := got[0] + got[1]
		if total < perSecond*seconds*95/100 || total > perSecond*seconds*105/100 {
			t.Errorf("%d bytes, want about %d", total, perSecond*seconds)
		}
		if got[1] < total*45/100 {
			t.Errorf("the modest flow had %d of %d bytes, want half", got[1], total)
		}
		if late > 500*time.Millisecond {
			t.Errorf("a packet waited for %v", late)
		}
		if n := int(testutil.ToFloat64(dropped)); n < sent-total/1000-100 || n > sent-total/1000 {
			t.Errorf("%d packets counted as dropped, of %d sent, %d arrived", n, sent, total/1000)
		}
	})
}

func TestLaneEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPace(1000, counter())
		n := 0
		l := p.lane(p.toService, func([]byte) error { n++; return io.ErrClosedPipe })
		big := make([]byte, 60_000) // above the burst: it takes a minute and may pass alone
		if err := l.Pass(big); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		if err := l.Pass(nil); err != io.ErrClosedPipe || n != 1 {
			t.Errorf("got %v after %d packets, want the failure of the one before", err, n)
		}
		l.Close()
		m := p.lane(p.toService, func([]byte) error { t.Error("sent after Close"); return nil })
		m.Pass(big) //nolint:errcheck // nothing comes of it
		m.Close()
		free := (*pace)(nil).lane(nil, func([]byte) error { return io.EOF })
		if err := free.Pass(big); err != io.EOF {
			t.Errorf("without a bandwidth: %v", err)
		}
		free.Close()
	})
}

// A rule's bandwidth holds for HTTP over TCP and Unix sockets and for bytes; a rule beside it has none.
func TestBandwidthOfServices(t *testing.T) {
	t.Parallel()
	const size = 150_000
	body := bytes.Repeat([]byte{'x'}, size)
	web := server(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body) //nolint:errcheck // the test sees
		w.Write(body)               //nolint:errcheck // the test sees
	})
	sock := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", sock)
	must(t, err)
	go http.Serve(ln, web.Config.Handler) //nolint:errcheck // it ends with the listener
	t.Cleanup(func() { ln.Close() })
	raw := rawOrigin(t, func(c *net.TCPConn) { c.Write(body) }) //nolint:errcheck // the test sees
	addr := strings.TrimPrefix(web.URL, "http://")
	bed := newBed(t, "ingress:\n"+
		"  - {hostname: slow.test, service: 'http://"+addr+"', bandwidth: 100kB/s}\n"+
		"  - {hostname: unix.test, service: 'unix:"+sock+"', bandwidth: 100kB/s}\n"+
		"  - {hostname: raw.test, service: 'tcp://"+raw+"', bandwidth: 100kB/s}\n"+
		"  - service: http://"+addr+"\n")
	get := func(host string) {
		res, err := bed.client().Get("http://" + host + "/")
		must(t, err)
		b, err := io.ReadAll(res.Body)
		must(t, err)
		must(t, res.Body.Close())
		if len(b) != size {
			t.Errorf("%s: got %d bytes", host, len(b))
		}
	}
	var wg sync.WaitGroup
	for host, f := range map[string]func(){
		"slow.test": func() { get("slow.test") },
		"unix.test": func() { get("unix.test") },
		"raw.test": func() {
			c, err := bed.Dial(t.Context(), tunnel.Flow{Kind: tunnel.KindIngress, Service: "tcp", Host: "raw.test"})
			must(t, err)
			defer c.Close()
			if b, err := io.ReadAll(c); err != nil || len(b) != size {
				t.Errorf("got %d bytes, %v", len(b), err)
			}
		},
	} {
		wg.Go(func() {
			began := time.Now()
			f()
			// More is measured with a clock that does not run; here it counts that there is a bound at all.
			if d := time.Since(began); d < time.Second {
				t.Errorf("%s: %d bytes in %v at 100kB/s", host, size, d)
			}
		})
	}
	began := time.Now()
	get("free.test")
	free := time.Since(began)
	wg.Wait()
	if slow := time.Since(began); free > slow {
		t.Errorf("without a bandwidth it took %v, longer than all others (%v)", free, slow)
	}
}

// A rule keeps what it has used over changes of the configuration, and connections of rules with and without a bandwidth are
// not shared.
func TestPacesOverChanges(t *testing.T) {
	t.Parallel()
	const text = "ingress:\n  - {hostname: a.test, service: 'http://127.0.0.1:1', bandwidth: 1MB/s}\n  - {hostname: b.test, service: 'http://127.0.0.1:1', bandwidth: %s}\n  - service: http://127.0.0.1:1\n"
	bed := newBed(t, strings.Replace(text, "%s", "1MB/s", 1))
	before := bed.rules.Load()
	must(t, bed.SetLocal(rulesOf(t, strings.Replace(text, "%s", "2MB/s", 1))))
	after := bed.rules.Load()
	if after.paces[0] != before.paces[0] || after.paces[0] == nil {
		t.Error("an unchanged rule has another pace")
	}
	if after.paces[1] == before.paces[1] || after.paces[1] == after.paces[0] {
		t.Error("a changed rule has the pace that it had")
	}
	if after.paces[2] != nil {
		t.Error("a rule without a bandwidth has a pace")
	}
	if o := after.origins; o[0] == o[1] || o[1] == o[2] || o[0] != before.origins[0] {
		t.Error("rules share connections that have not the same bandwidth")
	}
}

func TestDialPacket(t *testing.T) {
	t.Parallel()
	l, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	must(t, err)
	defer l.Close()
	flowOf := func(host string) tunnel.Flow {
		return tunnel.Flow{Kind: tunnel.KindIngressUDP, Service: "udp", Host: host, Port: 1}
	}
	rules := "ingress:\n  - {hostname: coap.test, service: 'udp://" + l.LocalAddr().String() + "'}\n  - {hostname: name.test, service: 'udp://localhost:9'}\n  - {hostname: tcp.test, service: 'tcp://127.0.0.1:1'}\n  - service: http_status:404\n"
	bed := newBed(t, rules)
	o, err := bed.DialPacket(t.Context(), flowOf("COAP.test."))
	must(t, err)
	if o.To().String() != l.LocalAddr().String() {
		t.Errorf("connected to %v, want %v", o.To(), l.LocalAddr())
	}
	must(t, o.Close())
	for _, host := range []string{"tcp.test", "other.test", ""} {
		if _, err := bed.DialPacket(t.Context(), flowOf(host)); !errors.Is(err, ErrNoService) {
			t.Errorf("%q: got %v, want ErrNoService", host, err)
		}
	}
	if _, err := bed.Dial(t.Context(), flowOf("coap.test")); !errors.Is(err, ErrNoService) {
		t.Errorf("bytes to a udp:// service: got %v, want ErrNoService", err)
	}
	if code, page := bed.get("http://coap.test/"); code != 502 || !strings.Contains(page, "does not speak HTTP") {
		t.Errorf("a request to a udp:// service: got %d, %s", code, page)
	}

	// Rules from the edge lead where the permit says, and end when it says so no more.
	far := openBed(t, HandlerConfig{Remote: true})
	if err := far.Configure(context.Background(), 1, []byte(rules)); !errors.Is(err, ErrDenied) {
		t.Errorf("without a permit: got %v, want ErrDenied", err)
	}
	far.SetPermit(permitAll{})
	must(t, far.Configure(context.Background(), 2, []byte(rules)))
	o, err = far.DialPacket(t.Context(), flowOf("coap.test"))
	must(t, err)
	if n := far.SetPermit(permitNone{}); n != 1 {
		t.Errorf("%d connections cut, want 1", n)
	}
	if _, err := o.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after that: got %v, want a closed socket", err)
	}
	for _, host := range []string{"coap.test", "name.test"} {
		if _, err := far.DialPacket(t.Context(), flowOf(host)); !errors.Is(err, ErrDenied) {
			t.Errorf("%s: got %v, want ErrDenied", host, err)
		}
	}
	if n := far.SetPermit(nil); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}
