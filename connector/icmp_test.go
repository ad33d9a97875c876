package connector

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/keyhaven/keyhaven/tunnel"
	"github.com/keyhaven/keyhaven/vnet"
)

// quoting is an ICMP error message about an echo request to a host.
func quoting(f icmpFamily, typ, code byte, to netip.Addr, id, seq uint16) []byte {
	b := append([]byte{typ, code}, make([]byte, 6)...)
	if f == icmp4 {
		h := make([]byte, ipv4MinHeader)
		h[0], h[9] = 0x45, protoICMP
		a := to.As4()
		copy(h[16:], a[:])
		b = append(b, h...)
	} else {
		h := make([]byte, ipv6Header)
		h[0], h[6] = 0x60, protoICMPv6
		a := to.As16()
		copy(h[24:], a[:])
		b = append(b, h...)
	}
	return f.appendEcho(b, id, seq, nil)
}

func TestICMPMessages(t *testing.T) {
	b := icmp4.appendEcho(nil, 0x1234, 7, []byte("abc"))
	if internetChecksum(b) != 0 {
		t.Errorf("the checksum of %x is wrong", b)
	}
	for _, f := range []icmpFamily{icmp4, icmp6} {
		id, seq, payload, ok := parseEcho(f.appendEcho(nil, 9, 8, []byte("xyz")), f.request)
		if !ok || id != 9 || seq != 8 || string(payload) != "xyz" {
			t.Errorf("echo: got %d, %d, %q, %v", id, seq, payload, ok)
		}
	}
	host4, host6 := netip.MustParseAddr("192.0.2.7"), netip.MustParseAddr("2001:db8::7")
	for _, c := range []struct {
		f         icmpFamily
		typ, code byte
		to        netip.Addr
		want      tunnel.EchoType
		wantCode  byte
	}{
		{icmp4, 11, 0, host4, tunnel.EchoTimeExceeded, 0},
		{icmp4, 3, 13, host4, tunnel.EchoUnreachable, tunnel.UnreachableProhibited},
		{icmp6, 3, 0, host6, tunnel.EchoTimeExceeded, 0},
		{icmp6, 1, 0, host6, tunnel.EchoUnreachable, tunnel.UnreachableNet},
		{icmp6, 1, 1, host6, tunnel.EchoUnreachable, tunnel.UnreachableProhibited},
		{icmp6, 1, 3, host6, tunnel.EchoUnreachable, tunnel.UnreachableHost},
		{icmp6, 1, 4, host6, tunnel.EchoUnreachable, tunnel.UnreachablePort},
		{icmp6, 2, 0, host6, tunnel.EchoUnreachable, tunnel.UnreachableTooBig},
	} {
		typ, code, to, id, seq, ok := c.f.quotedEcho(quoting(c.f, c.typ, c.code, c.to, 77, 5))
		if !ok || typ != c.want || code != c.wantCode || to != c.to || id != 77 || seq != 5 {
			t.Errorf("type %d code %d: got %v, %d, %v, %d, %d, %v", c.typ, c.code, typ, code, to, id, seq, ok)
		}
	}
}

func TestWindowsReplies(t *testing.T) {
	const base = 0x7fff0000
	for _, pointer := range []int{4, 8} {
		b := make([]byte, 64)
		copy(b, []byte{192, 0, 2, 7})
		binary.LittleEndian.PutUint16(b[12:], 3)
		if pointer == 8 {
			binary.LittleEndian.PutUint64(b[16:], base+40)
		} else {
			binary.LittleEndian.PutUint32(b[16:], base+40)
		}
		b[16+pointer] = 61
		copy(b[40:], "abc")
		r, ok := echoBuffer{b, base, pointer}.reply4()
		if !ok || r.From.String() != "192.0.2.7" || r.Type != tunnel.EchoReplied || r.TTL != 61 || string(r.Payload) != "abc" {
			t.Errorf("%d-byte pointers: got %+v, %v", pointer, r, ok)
		}
		b[16] = 0 // far below the buffer
		if r, ok := (echoBuffer{b, base + 1<<20, pointer}).reply4(); ok {
			t.Errorf("payload outside of the buffer: got %+v", r)
		}
		binary.LittleEndian.PutUint32(b[4:], uint32(statusTTLTransit))
		if r, ok := (echoBuffer{b, base, pointer}).reply4(); !ok || r.Type != tunnel.EchoTimeExceeded {
			t.Errorf("TTL: got %+v, %v", r, ok)
		}
		binary.LittleEndian.PutUint32(b[4:], uint32(statusTimedOut))
		if r, ok := (echoBuffer{b, base, pointer}).reply4(); ok {
			t.Errorf("nobody answered: got %+v", r)
		}
	}
	b := make([]byte, reply6Len+3)
	a := netip.MustParseAddr("2001:db8::7").As16()
	copy(b[6:], a[:])
	copy(b[reply6Len:], "abc")
	if r, ok := (echoBuffer{b: b}).reply6(3); !ok || r.From.String() != "2001:db8::7" || string(r.Payload) != "abc" {
		t.Errorf("IPv6: got %+v, %v", r, ok)
	}
	if _, ok := (echoBuffer{b: b[:20]}).reply6(3); ok {
		t.Error("a short buffer was read")
	}
}

func TestEchoRules(t *testing.T) {
	a := mustAllow(t, Rule{VNet: "red", To: "10.0.0.0/8", Ports: []Ports{{443, 443}}}, Rule{To: "*.example.com", Ports: []Ports{AllPorts}})
	for _, c := range []struct {
		vnet     vnet.ID
		name, to string
		want     bool
	}{
		{"red", "", "10.1.2.3", true},
		{"blue", "", "10.1.2.3", false},
		{"red", "", "192.0.2.1", false},
		{"blue", "db.example.com", "192.0.2.1", true},
		{"blue", "db.example.org", "192.0.2.1", false},
		{"blue", "db.example.com", "169.254.169.254", false},
	} {
		if got := a.Echo(c.vnet, c.name, netip.MustParseAddr(c.to)); got != c.want {
			t.Errorf("Echo(%q, %q, %s): got %v, want %v", c.vnet, c.name, c.to, got, c.want)
		}
		if a.Addr(c.vnet, netip.AddrPortFrom(netip.MustParseAddr(c.to), 0)) || a.Resolvable(c.vnet, c.name, 0) {
			t.Errorf("port 0 of %s is permitted", c.to)
		}
	}
	if (*Allow)(nil).Echo("red", "", netip.MustParseAddr("10.1.2.3")) {
		t.Error("no list permits a ping")
	}
}

// FuzzICMP plays anybody who can send ICMP to the connector's host.
func FuzzICMP(f *testing.F) {
	f.Add(quoting(icmp4, 11, 0, netip.MustParseAddr("192.0.2.7"), 1, 2))
	f.Add(quoting(icmp6, 3, 0, netip.MustParseAddr("2001:db8::7"), 1, 2))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, fam := range []icmpFamily{icmp4, icmp6} {
			if _, _, _, id, seq, ok := fam.quotedEcho(b); ok && !bytes.Contains(b, binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, id), seq)) {
				t.Fatalf("id %d and sequence number %d are not in %x", id, seq, b)
			}
			parseEcho(b, fam.reply)
		}
		for _, pointer := range []int{4, 8} {
			e := echoBuffer{b, 0x1000, pointer}
			e.reply4()
			e.reply6(len(b))
		}
	})
}
