package testnet

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// openTUN makes a layer 3 device in a namespace.
func openTUN(ns *Namespace, dev string, addr netip.Prefix) (f *os.File, err error) {
	open := func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("testnet: open /dev/net/tun: %w", err)
		}
		req, err := unix.NewIfreq(dev)
		if err == nil {
			req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("testnet: make TUN device %s: %w", dev, err)
		}
		f = os.NewFile(uintptr(fd), dev)
		return nil
	}
	if ns == nil {
		err = open()
	} else {
		err = ns.Do(open) // a TUN device belongs to the namespace in which its file was opened
	}
	if err != nil {
		return nil, err
	}
	for _, s := range [][]string{
		{"link", "set", dev, "addrgenmode", "none"},
		{"link", "set", dev, "mtu", strconv.Itoa(DeviceMTU), "txqueuelen", "5000", "up"},
		noDAD([]string{"addr", "add", addr.String(), "dev", dev, "nodad"}),
	} {
		if err := ip(append(in(ns), s...)...); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// nap blocks the thread, which ends far more punctually than a timer of the run time.
func nap(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	unix.Nanosleep(&ts, nil) // an early end by a signal does no harm: the caller looks at the time again
}

const (
	protoICMP   = 1
	protoUDP    = 17
	protoICMPv6 = 58
)

// transport returns the protocol of an IP packet and where its header begins; 0 for what has none here: fragments but
// the first, packets cut short, and IPv6 packets with extension headers.
func transport(p []byte) (proto byte, at int) {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4:
		if binary.BigEndian.Uint16(p[6:])&0x1fff != 0 {
			return 0, 0
		}
		proto, at = p[9], int(p[0]&15)*4
	case len(p) >= 40 && p[0]>>4 == 6:
		proto, at = p[6], 40
	}
	if len(p) < at+8 {
		return 0, 0
	}
	return proto, at
}

// isUDP reports whether the packet is of UDP, fragments of IPv4 included.
func isUDP(p []byte) bool {
	return len(p) >= 20 && (p[0]>>4 == 4 && p[9] == protoUDP || p[0]>>4 == 6 && p[6] == protoUDP)
}

// packetTooBig answers a packet as a router with a smaller link behind it does (RFC 1191, RFC 4443 section 3.2), or
// returns nil for IPv4 packets that may be fragmented. The answer comes from the packet's destination, so that it is
// routed in any namespace.
func packetTooBig(p []byte, mtu int) []byte {
	switch {
	case len(p) >= 20 && p[0]>>4 == 4 && p[6]&0x40 != 0:
		quote := p[:min(len(p), 548)]
		out := make([]byte, 28, 28+len(quote))
		out[0], out[8], out[9] = 0x45, 64, protoICMP
		copy(out[12:], p[16:20])
		copy(out[16:], p[12:16])
		out[20], out[21] = 3, 4
		binary.BigEndian.PutUint16(out[26:], uint16(mtu))
		out = append(out, quote...)
		binary.BigEndian.PutUint16(out[2:], uint16(len(out)))
		binary.BigEndian.PutUint16(out[22:], checksum(out[20:], 0))
		binary.BigEndian.PutUint16(out[10:], checksum(out[:20], 0))
		return out
	case len(p) >= 40 && p[0]>>4 == 6:
		quote := p[:min(len(p), 1280-48)]
		out := make([]byte, 48, 48+len(quote))
		out[0], out[6], out[7] = 0x60, protoICMPv6, 64
		copy(out[8:], p[24:40])
		copy(out[24:], p[8:24])
		out[40] = 2
		binary.BigEndian.PutUint32(out[44:], uint32(mtu))
		out = append(out, quote...)
		binary.BigEndian.PutUint16(out[4:], uint16(len(out)-40))
		binary.BigEndian.PutUint16(out[42:], checksum(out[40:], sum(out[8:40])+uint32(len(out)-40)+protoICMPv6))
		return out
	}
	return nil
}

// sum adds 16-bit words, as the Internet checksum does before it is folded (RFC 1071).
func sum(b []byte) (s uint32) {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func checksum(b []byte, s uint32) uint16 {
	s += sum(b)
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return ^uint16(s)
}

// A translator gives UDP flows from end a other source ports. The zero value leaves packets as they are.
type translator struct {
	on atomic.Bool

	mu      sync.Mutex        // guards the fields below
	next    uint16            // the next port to give
	outside map[uint16]uint16 // by port of end a
	inside  map[uint16]uint16 // by port that end b sees
}

// The first port that a translator gives. Its ports rise from there and begin again.
const firstPort = 20_000

func (t *translator) rebind() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next = max(t.next, firstPort)
	t.outside, t.inside = map[uint16]uint16{}, map[uint16]uint16{}
	t.on.Store(true)
}

// translate rewrites the packet's port, and reports whether it has a place to go. Fragments pass as they are.
func (t *translator) translate(p []byte, outward bool) bool {
	if !t.on.Load() {
		return true
	}
	proto, at := transport(p)
	if proto != protoUDP {
		return true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if outward {
		port := binary.BigEndian.Uint16(p[at:])
		to, ok := t.outside[port]
		if !ok {
			if t.next++; t.next < firstPort {
				t.next = firstPort
			}
			to = t.next
			delete(t.outside, t.inside[to]) // after 45,000 flows: the oldest gives way
			t.outside[port], t.inside[to] = to, port
		}
		rewrite(p, at, 0, to)
		return true
	}
	to, ok := t.inside[binary.BigEndian.Uint16(p[at+2:])]
	if ok {
		rewrite(p, at, 2, to)
	}
	return ok
}

// rewrite changes a port of a UDP header and its checksum with it (RFC 1624).
func rewrite(p []byte, at, field int, port uint16) {
	old := binary.BigEndian.Uint16(p[at+field:])
	binary.BigEndian.PutUint16(p[at+field:], port)
	sumAt := p[at+6:]
	was := binary.BigEndian.Uint16(sumAt)
	if was == 0 {
		return // IPv4 without a checksum
	}
	s := uint32(^was) + uint32(^old) + uint32(port)
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	now := ^uint16(s)
	if now == 0 {
		now = 0xffff
	}
	binary.BigEndian.PutUint16(sumAt, now)
}
