package tunnel

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"
)

var (
	testUDP = Flow{Kind: KindUDP, VNet: "default", Host: "10.0.0.7", Port: 53, Visitor: netip.MustParseAddrPort("192.0.2.1:4711")}
)

// echoPackets accepts flows of packets and sends back what comes.
func echoPackets(_ context.Context, in *Incoming) {
	c, err := in.AcceptPacket()
	if err != nil {
		return
	}
	defer c.Close()
	for {
		b, err := ReceivePacket(c)
		if err != nil {
			return
		}
		if c.WritePacket(b) != nil {
			return
		}
	}
}

func openPacket(tb testing.TB, s *Session, f Flow) *packetConn {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := s.OpenPacket(ctx, f)
	if err != nil {
		tb.Fatalf("OpenPacket: %v", err)
	}
	tb.Cleanup(func() { c.Close() })
	return c.(*packetConn)
}

// onCarriers runs a test over each carrier.
func onCarriers(t *testing.T, test func(t *testing.T, carrier func(*ListenConfig, *DialConfig))) {
	for _, c := range []Carrier{CarrierQUIC, CarrierTCP} {
		t.Run(string(c), func(t *testing.T) {
			test(t, func(_ *ListenConfig, d *DialConfig) { d.Carrier = c })
		})
	}
}

func TestPackets(t *testing.T) {
	onCarriers(t, func(t *testing.T, carrier func(*ListenConfig, *DialConfig)) {
		_, _, s := pair(t, echoPackets, carrier)
		c := openPacket(t, s, testUDP)
		for _, n := range []int{0, 1, 500, 1200, 1500, 9000, 65000, MaxPacket} {
			want := bytes.Repeat([]byte{byte(n)}, n)
			got := exchange(t, c, want)
			if !bytes.Equal(got, want) {
				t.Errorf("packet of %d bytes: got %d bytes back", n, len(got))
			}
		}
		if err := c.WritePacket(make([]byte, MaxPacket+1)); !errors.Is(err, ErrPacketTooLong) {
			t.Errorf("a longer packet: got %v, want ErrPacketTooLong", err)
		}
		small := make([]byte, 3)
		c.SetReadDeadline(time.Now().Add(patience))
		must(t, c.WritePacket([]byte("abcdef")))
		if n, err := c.ReadPacket(small); n != 3 || err != nil || string(small) != "abc" {
			t.Errorf("short buffer: got %d, %v, %q", n, err, small)
		}
	})
}

// Packets of an ingress are named as its bytes are, and carried as other packets are.
func TestIngressPackets(t *testing.T) {
	onCarriers(t, func(t *testing.T, carrier func(*ListenConfig, *DialConfig)) {
		got := make(chan Flow, 1)
		_, _, s := pair(t, func(ctx context.Context, in *Incoming) {
			got <- in.Flow()
			echoPackets(ctx, in)
		}, carrier)
		want := Flow{Kind: KindIngressUDP, Host: "coap.keyhaven.test", Port: 5683, Service: "udp", ID: [16]byte{7}}
		c := openPacket(t, s, want)
		if f := <-got; f.Kind != want.Kind || f.Host != want.Host || f.Port != want.Port || f.Service != want.Service || f.ID != want.ID || f.VNet != "" {
			t.Errorf("got %+v", f)
		}
		if b := exchange(t, c, []byte("hello")); string(b) != "hello" {
			t.Errorf("got %q", b)
		}
	})
	for _, f := range []Flow{
		{Kind: KindIngressUDP, Host: "a.test", Port: 1, Service: "udp"},                              // no context id
		{Kind: KindIngressUDP, Host: "a.test", Port: 1, context: 1},                                  // no service
		{Kind: KindIngressUDP, Host: "a.test", Service: "udp", context: 1},                           // no port
		{Kind: KindIngressUDP, VNet: "default", Host: "a.test", Port: 1, Service: "udp", context: 1}, // a network
	} {
		if _, err := appendFlow(nil, f, false); err == nil {
			t.Errorf("%+v can cross the wire", f)
		}
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// exchange sends a packet until an answer comes; datagrams may be lost.
func exchange(tb testing.TB, c PacketConn, b []byte) []byte {
	tb.Helper()
	for range 10 {
		must(tb, c.WritePacket(b))
		c.SetReadDeadline(time.Now().Add(2 * time.Second))
		got, err := ReceivePacket(c)
		if err == nil {
			return got
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			tb.Fatalf("ReceivePacket: %v", err)
		}
	}
	tb.Fatal("no answer")
	return nil
}

func TestPacketEnds(t *testing.T) {
	onCarriers(t, func(t *testing.T, carrier func(*ListenConfig, *DialConfig)) {
		accepted := make(chan PacketConn, 1)
		release := make(chan struct{})
		_, conn, s := pair(t, func(_ context.Context, in *Incoming) {
			c, err := in.AcceptPacket()
			if err != nil {
				t.Error(err)
				return
			}
			accepted <- c
			<-release // what is open then is cut
		}, carrier)

		c := openPacket(t, s, testUDP)
		peer := <-accepted
		if got := peer.RemoteAddr().String(); got != "192.0.2.1:4711" {
			t.Errorf("RemoteAddr: got %s, want the visitor's", got)
		}
		peer.Unreachable(UnreachablePort)
		c.SetReadDeadline(time.Now().Add(patience))
		_, err := c.ReadPacket(nil)
		if u, ok := errors.AsType[*UnreachableError](err); !ok || u.Code != UnreachablePort {
			t.Errorf("got %v, want port unreachable", err)
		}
		c.Unreachable(UnreachableHost) // and at once the end
		must(t, c.Close())
		must(t, c.Close())
		if _, err := c.ReadPacket(nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("read after Close: got %v, want net.ErrClosed", err)
		}
		if err := c.WritePacket(nil); !errors.Is(err, net.ErrClosed) {
			t.Errorf("write after Close: got %v, want net.ErrClosed", err)
		}
		peer.SetReadDeadline(time.Now().Add(patience))
		if _, err := peer.ReadPacket(nil); err == nil || err.Error() != (&UnreachableError{UnreachableHost}).Error() {
			t.Errorf("got %v, want host unreachable", err)
		}
		if _, err := peer.ReadPacket(nil); err != io.EOF {
			t.Errorf("after the peer's Close: got %v, want io.EOF", err)
		}
		if err := peer.WritePacket(nil); !errors.Is(err, ErrClosed) {
			t.Errorf("write after the peer's Close: got %v, want ErrClosed", err)
		}
		<-peer.(Ender).Ended()
		release <- struct{}{}

		c = openPacket(t, s, testUDP)
		<-accepted
		release <- struct{}{}
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.ReadPacket(nil); !errors.Is(err, ErrReset) {
			t.Errorf("after the handler's return: got %v, want ErrReset", err)
		}
		must(t, c.Close())

		c = openPacket(t, s, testUDP)
		<-accepted
		conn.Close(CloseShutdown)
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.ReadPacket(nil); !errors.Is(err, ErrSessionLost) {
			t.Errorf("after the session's end: got %v, want ErrSessionLost", err)
		}
		close(release)
		must(t, c.Close())
		eventually(t, "no flow is left", func() bool { return s.Flows() == 0 })
	})
}

func TestPacketDeadline(t *testing.T) {
	_, _, s := pair(t, echoPackets)
	c := openPacket(t, s, testUDP)
	c.SetReadDeadline(time.Now().Add(-time.Second))
	if _, err := c.ReadPacket(nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want os.ErrDeadlineExceeded", err)
	}
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := c.ReadPacket(nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %v, want os.ErrDeadlineExceeded", err)
	}
	if got := exchange(t, c, []byte("still there")); string(got) != "still there" {
		t.Errorf("got %q", got)
	}
}

// A packet that crosses before the answer to the flow is the first that the handler reads.
func TestFirstPacket(t *testing.T) {
	got := make(chan []byte, 2)
	_, _, s := pair(t, func(_ context.Context, in *Incoming) {
		c, err := in.AcceptPacket()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for range 2 {
			b, err := ReceivePacket(c)
			if err != nil {
				t.Error(err)
				return
			}
			got <- b
		}
	})
	f := testUDP
	f.context = 77
	header, err := appendFlow(nil, f, false)
	must(t, err)
	st, err := s.car.openStream()
	must(t, err)
	header = appendMessage(header, messagePacket, []byte("first"))
	header = appendMessage(header, messageSkippable, []byte("for a later version"))
	header = appendMessage(header, messagePacket, nil)
	if _, err := st.Write(header); err != nil {
		t.Fatal(err)
	}
	if b := <-got; string(b) != "first" {
		t.Errorf("got %q, want first", b)
	}
	if b := <-got; len(b) != 0 {
		t.Errorf("got %q, want an empty packet", b)
	}
	st.closeWrite()
	io.Copy(io.Discard, st)
}

func TestPacketQueues(t *testing.T) {
	var drops PacketDrops
	accepted := make(chan PacketConn, 2)
	_, c, s := pair(t, func(ctx context.Context, in *Incoming) {
		c, err := in.AcceptPacket()
		if err != nil {
			t.Error(err)
			return
		}
		accepted <- c
		<-ctx.Done()
	}, func(_ *ListenConfig, d *DialConfig) { d.Drops = &drops })
	openPacket(t, s, testUDP)
	p := (<-accepted).(*packetConn)
	big := openPacket(t, s, testUDP)
	other := <-accepted

	// Nobody reads p: the newest are dropped.
	for i := range receiveQueue + 10 {
		p.receive([]byte{byte(i)})
	}
	if got := drops.Receive.Load(); got != 10 {
		t.Errorf("%d packets dropped, want 10", got)
	}
	if b, err := p.ReceivePacket(); err != nil || b[0] != 0 {
		t.Errorf("got %v, %v, want the oldest", b, err)
	}
	// Nor the big packets of another flow, which do not stand in the way of a third.
	for range 4 * receiveQueueBytes / MaxPacket {
		must(t, big.WritePacket(make([]byte, MaxPacket)))
	}
	third := openPacket(t, s, testUDP)
	go func() {
		c := <-accepted
		for {
			b, err := ReceivePacket(c)
			if err != nil {
				return
			}
			c.WritePacket(b) //nolint:errcheck // exchange asks again
		}
	}()
	if got := exchange(t, third, []byte("passes")); string(got) != "passes" {
		t.Errorf("got %q", got)
	}
	other.Close()

	for _, b := range [][]byte{nil, {1}, {1, 2, 3}, {0, 0, 9, 9}, {255, 255, 255, 255, 1}} {
		before := drops.Unknown.Load()
		c.packets.deliver(b)
		if drops.Unknown.Load() != before+1 {
			t.Errorf("datagram %x: not counted as unknown", b)
		}
	}
	c.Close(CloseShutdown)
}

// Whoever opened a flow learns that the connection takes too few of its packets, whichever side sends them.
func TestPacketNoRoom(t *testing.T) {
	flood := func(c PacketConn, until <-chan struct{}) {
		b := make([]byte, 1000)
		for {
			select {
			case <-until:
				return
			default:
			}
			if c.WritePacket(b) != nil {
				return
			}
		}
	}
	done := make(chan struct{})
	_, _, s := pair(t, func(_ context.Context, in *Incoming) {
		c, err := in.AcceptPacket()
		if err != nil {
			return
		}
		defer c.Close()
		if in.Flow().Port == 99 {
			flood(c, done)
			return
		}
		for err == nil {
			_, err = ReceivePacket(c)
		}
	}, func(_ *ListenConfig, d *DialConfig) { d.Carrier = CarrierQUIC })
	defer close(done)
	wait := func(who string, c *packetConn) {
		t.Helper()
		select {
		case <-c.NoRoom():
		case <-time.After(patience):
			t.Errorf("%s drops packets, and the opener does not learn it", who)
		}
	}
	here := openPacket(t, s, testUDP)
	stop := make(chan struct{})
	go flood(here, stop) // ends before the flow is closed
	wait("the opener", here)
	close(stop)
	f := testUDP
	f.Port = 99
	wait("the other side", openPacket(t, s, f))
}

func TestContextIDs(t *testing.T) {
	_, c, s := pair(t, echoPackets)
	var ids []uint32
	for range 3 {
		p := openPacket(t, s, testUDP)
		ids = append(ids, p.id)
		must(t, p.Close())
	}
	if !slices.Equal(ids, []uint32{1, 2, 3}) {
		t.Errorf("got context ids %v, want 1, 2, 3", ids)
	}
	p := openPacket(t, s, testUDP)
	f := testUDP
	f.context = p.id
	if _, err := s.open(t.Context(), f); !errors.Is(err, ErrMalformed) {
		t.Errorf("a context id in use: got %v, want ErrMalformed", err)
	}
	exchange(t, p, []byte("the first one lives"))
	s.packets.mu.Lock()
	s.packets.last = 1<<32 - 1
	s.packets.mu.Unlock()
	if _, err := s.OpenPacket(t.Context(), testUDP); !errors.Is(err, ErrLimit) {
		t.Errorf("after the last context id: got %v, want ErrLimit", err)
	}
	if _, err := s.OpenPacket(t.Context(), testFlow); !errors.Is(err, ErrUnsupported) {
		t.Errorf("a TCP flow as packets: got %v, want ErrUnsupported", err)
	}
	_ = c
}

func TestPacketDrain(t *testing.T) {
	_, c, s := pair(t, echoPackets)
	p := openPacket(t, s, testUDP)
	done := make(chan error, 1)
	go func() { done <- c.Drain(context.Background()) }()
	select {
	case <-p.Draining():
	case <-time.After(patience):
		t.Fatal("the flow does not learn of the drain")
	}
	exchange(t, p, []byte("goes on"))
	must(t, p.Close())
	if err := <-done; err != nil {
		t.Errorf("Drain: %v", err)
	}
}

func TestEcho(t *testing.T) {
	_, _, s := pair(t, func(_ context.Context, in *Incoming) {
		c, err := in.AcceptPacket()
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for {
			b, err := ReceivePacket(c)
			if err != nil {
				return
			}
			r, err := ParseEchoRequest(b)
			if err != nil || r.Seq == 13 {
				continue
			}
			c.WritePacket(AppendEchoReply(nil, EchoReply{Seq: r.Seq - 1, From: netip.MustParseAddr("::1"), Type: EchoReplied}))
			c.WritePacket(AppendEchoReply(nil, EchoReply{Seq: r.Seq, From: netip.MustParseAddr("10.0.0.7"), Type: EchoReplied, TTL: 63,
				HostRTT: 1500 * time.Microsecond, Payload: r.Payload}))
		}
	})
	f := testUDP
	f.Kind, f.Port = KindICMP, 0
	p := openPacket(t, s, f)
	for _, n := range []int{0, 56, 3000, MaxEchoPayload} {
		r, err := Echo(t.Context(), p, EchoRequest{Seq: uint16(n), TTL: 3, Payload: make([]byte, n), Timeout: patience})
		if err != nil || r.Seq != uint16(n) || r.TTL != 63 || r.From.String() != "10.0.0.7" || r.HostRTT != 1500*time.Microsecond || len(r.Payload) != n || r.RTT <= 0 || r.Err() != nil {
			t.Errorf("echo of %d bytes: got %+v, %v", n, r, err)
		}
	}
	if _, err := Echo(t.Context(), p, EchoRequest{Seq: 13, Timeout: 10 * time.Millisecond}); err != ErrEchoTimeout {
		t.Errorf("got %v, want ErrEchoTimeout", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(10*time.Millisecond, cancel)
	if _, err := Echo(ctx, p, EchoRequest{Seq: 13, Timeout: time.Minute}); err != context.Canceled {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// FuzzPacketMessages plays an edge or a connector that an attacker has taken over, on a flow's stream.
func FuzzPacketMessages(f *testing.F) {
	f.Add(appendMessage(nil, messagePacket, []byte("packet")))
	f.Add(appendMessage(appendMessage(nil, messageUnreachable, []byte{3}), messagePacket, nil))
	f.Add(appendMessage(nil, messageSkippable, []byte("later")))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var again []byte
		for {
			typ, body, err := readMessage(r)
			if err == io.EOF {
				if !bytes.Equal(again, b) {
					t.Fatalf("%x encodes to %x", b, again)
				}
				return
			}
			if err != nil {
				return
			}
			again = appendMessage(again, typ, body)
		}
	})
}

// FuzzDatagram plays a peer that an attacker has taken over.
func FuzzDatagram(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 'x'})
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var drops PacketDrops
		s := &session{packets: packetTable{drops: &drops}}
		p := newPacketConn(s, nil, nil, nil)
		p.id = 1
		s.packets.flows = map[uint32]*packetConn{1: p}
		s.packets.deliver(b)
		ours := len(b) >= contextIDLen && binary.BigEndian.Uint32(b) == 1
		if ours != (len(p.in) == 1) || ours == (drops.Unknown.Load() == 1) {
			t.Fatalf("datagram %x: %d delivered, %d dropped", b, len(p.in), drops.Unknown.Load())
		}
	})
}

// FuzzEcho plays an edge that an attacker has taken over, or a connector.
func FuzzEcho(f *testing.F) {
	f.Add(AppendEchoRequest(nil, EchoRequest{Seq: 7, TTL: 1, Payload: []byte("ping")}))
	f.Add(AppendEchoReply(nil, EchoReply{Seq: 7, From: netip.MustParseAddr("2001:db8::1"), Type: EchoTimeExceeded}))
	f.Add(AppendEchoReply(nil, EchoReply{Seq: 7, From: netip.MustParseAddr("192.0.2.1"), Type: EchoReplied, HostRTT: time.Second, Payload: []byte("ping")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := ParseEchoRequest(b); err == nil {
			if again := AppendEchoRequest(nil, r); !bytes.Equal(again, b) {
				t.Fatalf("%+v encodes to %x, was read from %x", r, again, b)
			}
		}
		if r, err := ParseEchoReply(b); err == nil {
			if again := AppendEchoReply(nil, r); !bytes.Equal(again, b) {
				t.Fatalf("%+v encodes to %x, was read from %x", r, again, b)
			}
		}
	})
}
