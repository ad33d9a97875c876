package testnet

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Conditions are what a [Link] does to packets in one direction. The zero value is a perfect link.
type Conditions struct {
	// Delay is added to each packet, Jitter a random further part of it. Packets never overtake one another.
	Delay, Jitter time.Duration
	// Loss is the part of packets that are lost at random, 0 to 1.
	Loss float64
	// Rate limits the link, in bits per second of IP packets. If zero, it has no limit. Queue is how many bytes wait for
	// their turn then; what comes to a full queue is dropped. If zero, 256 KiB.
	Rate  int64
	Queue int
	// MTU is the size of the largest packet that passes, in bytes. If zero, the devices' own, [DeviceMTU]. Larger ones are
	// dropped without a word, as in a black hole, unless PacketTooBig is set: then the sender is told by ICMP, if the
	// packet may not be fragmented (IPv4) or always (IPv6).
	MTU          int
	PacketTooBig bool
	// DropUDP drops UDP: all of it, or only packets larger than DropUDPOver bytes with IP header, if that is not zero;
	// and only DropUDPAfter after the call of Set.
	DropUDP      bool
	DropUDPOver  int
	DropUDPAfter time.Duration
	// Down drops everything.
	Down bool
}

// Counters tell what happened to the packets of one direction, so that a test can assert that its fault fired.
type Counters struct {
	Passed, Bytes uint64 // handed to the far end
	Lost          uint64 // at random
	Overflow      uint64 // because the queue was full
	TooBig        uint64 // larger than the MTU
	UDP           uint64 // because of DropUDP
	Blocked       uint64 // because the link was down
	Unmapped      uint64 // to a port of the translator that leads nowhere (any more)
}

// Dropped is the sum of what did not pass.
func (c Counters) Dropped() uint64 {
	return c.Lost + c.Overflow + c.TooBig + c.UDP + c.Blocked + c.Unmapped
}

// DeviceMTU is the MTU of a link's devices.
const DeviceMTU = 1500

const (
	defaultQueue = 256 << 10
	maxInFlight  = 1 << 16 // packets that a direction holds; more are dropped as overflow
)

// A Link joins two namespaces through this process, which delays, drops and rewrites packets as told. Its methods are
// safe for concurrent use. Close it before its net.
type Link struct {
	a, b       *Namespace
	aDev, bDev string
	ends       [2]*os.File // TUN devices of a and b
	dirs       [2]*direction
	nat        translator
	wg         sync.WaitGroup
	closed     atomic.Bool
}

// direction carries packets from one end to the other.
type direction struct {
	link     *Link
	from, to *os.File
	now      atomic.Pointer[regime]
	queue    chan packet
	waiting  atomic.Int64 // packets in queue, or being written by the sender
	rand     *rand.Rand   // the reader's
	sent     int64        // when the last packet has left the rate limit, in ns; the reader's
	due      int64        // when the last packet may be handed over, in ns; the reader's
	free     sync.Pool    // *[]byte

	passed, bytes, lost, overflow, tooBig, udp, blocked, unmapped atomic.Uint64
}

// regime is Conditions in force.
type regime struct {
	Conditions
	udpFrom time.Time
}

type packet struct {
	buf *[]byte
	due int64
}

// Shaped joins a and b by a link with an address on each side; b may be nil for the namespace that the process itself is
// in. Packets cross it through this process. Equal seeds make the same choices for the same packets.
func (n *Net) Shaped(a, b *Namespace, aAddr, bAddr netip.Prefix, seed uint64) (*Link, error) {
	n.mu.Lock()
	n.links++
	id := n.links
	n.mu.Unlock()
	l := &Link{a: a, b: b, aDev: fmt.Sprintf("kh%da", id), bDev: fmt.Sprintf("kh%db", id)}
	if b == nil {
		l.bDev = fmt.Sprintf("%s-%d", n.prefix, id) // must be unique among the machine's own
	}
	for i, end := range []struct {
		ns   *Namespace
		dev  string
		addr netip.Prefix
	}{{a, l.aDev, aAddr}, {b, l.bDev, bAddr}} {
		f, err := openTUN(end.ns, end.dev, end.addr)
		if err != nil {
			return nil, errors.Join(err, l.closeEnds())
		}
		l.ends[i] = f
	}
	for i := range l.dirs {
		d := &direction{link: l, from: l.ends[i], to: l.ends[1-i], queue: make(chan packet, maxInFlight),
			rand: rand.New(rand.NewPCG(seed, uint64(i)))}
		d.free.New = func() any { b := make([]byte, DeviceMTU); return &b }
		d.now.Store(&regime{})
		l.dirs[i] = d
		l.wg.Go(d.read)
		l.wg.Go(d.send)
	}
	return l, nil
}

// Devices are the names of the link's ends in a and b.
func (l *Link) Devices() (a, b string) { return l.aDev, l.bDev }

// Set puts conditions in force for both directions, for the packets that come from now on.
func (l *Link) Set(c Conditions) {
	l.SetDirections(c, c)
}

// SetDirections puts conditions in force for the packets from a to b and those from b to a.
func (l *Link) SetDirections(aToB, bToA Conditions) {
	for i, c := range []Conditions{aToB, bToA} {
		if c.Queue == 0 {
			c.Queue = defaultQueue
		}
		l.dirs[i].now.Store(&regime{c, time.Now().Add(c.DropUDPAfter)})
	}
}

// Counters tell what happened so far in each direction.
func (l *Link) Counters() (aToB, bToA Counters) { return l.dirs[0].counters(), l.dirs[1].counters() }

func (d *direction) counters() Counters {
	return Counters{d.passed.Load(), d.bytes.Load(), d.lost.Load(), d.overflow.Load(), d.tooBig.Load(), d.udp.Load(), d.blocked.Load(),
		d.unmapped.Load()}
}

// Rebind puts an address translator of UDP ports between a and b, or gives the one that is there new ports for all its
// flows: b sees each flow of a come from another port than before, and what it sends to the old one is dropped.
func (l *Link) Rebind() { l.nat.rebind() }

// Readdress replaces the address that old is of, on the end in ns, by another. Routes through the device stay.
func (l *Link) Readdress(ns *Namespace, old, addr netip.Prefix) error {
	dev := l.aDev
	if ns == l.b {
		dev = l.bDev
	}
	err := ns.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv4/conf/"+dev+"/promote_secondaries", []byte("1"), 0)
	})
	if err != nil {
		return fmt.Errorf("testnet: %w", err)
	}
	return errors.Join(ns.AddAddr(dev, addr), ns.IP("addr", "del", old.String(), "dev", dev))
}

// Close takes the link down, with its devices, and waits for what carried its packets.
func (l *Link) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	err := l.closeEnds()
	l.wg.Wait()
	return err
}

func (l *Link) closeEnds() error {
	var errs []error
	for _, f := range l.ends {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// read takes packets from the sending end until that is closed.
func (d *direction) read() {
	defer close(d.queue)
	buf := d.free.Get().(*[]byte)
	for {
		n, err := d.from.Read((*buf)[:DeviceMTU])
		if err != nil {
			return
		}
		if n > 0 && d.take(buf, n) {
			buf = d.free.Get().(*[]byte)
		}
	}
}

// take decides what becomes of a packet. It reports whether it keeps the buffer.
func (d *direction) take(buf *[]byte, n int) bool {
	p, c := (*buf)[:n], d.now.Load()
	now := time.Now()
	if why := d.verdict(c, p, now); why != nil {
		why.Add(1)
		return false
	}
	due := now.UnixNano()
	if c.Rate > 0 {
		waits := max(0, d.sent-due) * c.Rate / 8 / int64(time.Second) // bytes
		if waits+int64(n) > int64(c.Queue) {
			d.overflow.Add(1)
			return false
		}
		d.sent = max(d.sent, due) + int64(n)*8*int64(time.Second)/c.Rate
		due = d.sent
	}
	delay := c.Delay
	if c.Jitter > 0 {
		delay += time.Duration(d.rand.Int64N(int64(c.Jitter)))
	}
	d.due = max(d.due, due+int64(delay))
	if d.due <= now.UnixNano() && d.waiting.Load() == 0 {
		d.write(p)
		return false
	}
	*buf = p
	d.waiting.Add(1)
	select {
	case d.queue <- packet{buf, d.due}:
		return true
	default:
		d.waiting.Add(-1)
		*buf = p[:DeviceMTU]
		d.overflow.Add(1)
		return false
	}
}

// verdict returns the counter of the reason why the packet is dropped, or nil. It also translates ports.
func (d *direction) verdict(c *regime, p []byte, now time.Time) *atomic.Uint64 {
	switch {
	case c.Down:
		return &d.blocked
	case c.MTU > 0 && len(p) > c.MTU:
		if c.PacketTooBig {
			if answer := packetTooBig(p, c.MTU); answer != nil {
				d.from.Write(answer) // the end may be gone
			}
		}
		return &d.tooBig
	case c.DropUDP && len(p) > c.DropUDPOver && isUDP(p) && !now.Before(c.udpFrom):
		return &d.udp
	case c.Loss > 0 && d.rand.Float64() < c.Loss:
		return &d.lost
	case !d.link.nat.translate(p, d == d.link.dirs[0]):
		return &d.unmapped
	}
	return nil
}

// send hands delayed packets to the far end, each at its time, until the reader has ended.
func (d *direction) send() {
	for p := range d.queue {
		d.sleep(p.due)
		d.write(*p.buf)
		*p.buf = (*p.buf)[:DeviceMTU]
		d.free.Put(p.buf)
		d.waiting.Add(-1)
	}
}

// sleep waits until a time in ns, or until the link is closed. Timers of the run time are too coarse for this.
func (d *direction) sleep(until int64) {
	for !d.link.closed.Load() {
		left := time.Duration(until - time.Now().UnixNano())
		if left <= 0 {
			return
		}
		nap(min(left, 10*time.Millisecond))
	}
}

func (d *direction) write(p []byte) {
	if _, err := d.to.Write(p); err == nil { // else the end is down or gone
		d.passed.Add(1)
		d.bytes.Add(uint64(len(p)))
	}
}
