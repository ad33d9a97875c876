package gokeyless

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"encoding/binary"
	"io"
	mrand "math/rand/v2"
	"net"
	"net/netip"
	"testing"

	"github.com/cloudflare/gokeyless/protocol"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestCodecsAgree encodes operations with both codecs and wants the same bytes, around every size at which padding changes.
func TestCodecsAgree(t *testing.T) {
	r := mrand.New(mrand.NewPCG(1, 2))
	for n := range 3000 {
		size := n % 1100
		if n >= 2900 {
			size = r.IntN(60000)
		}
		ours := keyless.Operation{Opcode: keyless.OpECDSASignSHA256, Payload: random(size)}
		theirs := protocol.Operation{Opcode: protocol.OpECDSASignSHA256, Payload: ours.Payload}
		for _, set := range []func(){
			func() { rand.Read(ours.SKI[:]); theirs.SKI = protocol.SKI(ours.SKI) },
			func() { rand.Read(ours.Digest[:]); theirs.Digest = ours.Digest },
			func() { ours.SNI, theirs.SNI = "visited.test", "visited.test" },
			func() {
				ours.ClientIP, theirs.ClientIP = netip.MustParseAddr("192.0.2.7"), net.IPv4(192, 0, 2, 7).To4()
			},
			func() {
				ours.ServerIP, theirs.ServerIP = netip.MustParseAddr("2001:db8::1"), net.ParseIP("2001:db8::1")
			},
			func() { ours.CertID, theirs.CertID = "certificate", "certificate" },
			func() { ours.Extra = random(9); theirs.Extra = ours.Extra },
			func() { ours.CustomFunc, theirs.CustomFuncName = "echo", "echo" },
			func() { ours.TraceContext = random(37); theirs.JaegerSpan = ours.TraceContext },
			func() { ours.Context = []byte(`{"request_id":"r1"}`); theirs.ReqContext = ours.Context },
			func() { ours.Region, theirs.ComplianceRegion = 1, 1 },
		} {
			if n >= 1100 && r.IntN(2) == 0 {
				set()
			}
		}
		packet := protocol.NewPacket(uint32(n), theirs)
		want := must(packet.MarshalBinary())(t)
		got := must((&keyless.Packet{Major: 1, ID: uint32(n), Operation: ours}).Append(nil))(t)
		if !bytes.Equal(got, want) {
			t.Fatalf("payload of %d bytes: ours is %d bytes, theirs %d, or they differ: %+v", size, len(got), len(want), ours)
		}
		var back protocol.Packet
		if err := back.UnmarshalBinary(got); err != nil {
			t.Fatalf("they do not read ours: %v", err)
		}
		parsed, err := keyless.ParseBody(want[keyless.HeaderSize:])
		if err != nil {
			t.Fatalf("we do not read theirs: %v", err)
		}
		if again := must((&keyless.Packet{Major: 1, ID: uint32(n), Operation: parsed}).Append(nil))(t); !bytes.Equal(again, want) {
			t.Fatal("what we read of theirs encodes to something else")
		}
	}
}

// send writes a packet as it is.
func send(t *testing.T, c net.Conn, id uint32, op keyless.Operation) {
	t.Helper()
	if _, err := c.Write(must((&keyless.Packet{Major: 1, ID: id, Operation: op}).Append(nil))(t)); err != nil {
		t.Fatal(err)
	}
}

// receive reads a packet with its header.
func receive(t *testing.T, c net.Conn) (packet []byte, id uint32, op keyless.Operation) {
	t.Helper()
	packet = make([]byte, keyless.HeaderSize)
	if _, err := io.ReadFull(c, packet); err != nil {
		t.Fatal(err)
	}
	packet = append(packet, make([]byte, binary.BigEndian.Uint16(packet[2:]))...)
	if _, err := io.ReadFull(c, packet[keyless.HeaderSize:]); err != nil {
		t.Fatal(err)
	}
	return packet, must(keyless.ParseHeader(packet))(t).ID, must(keyless.ParseBody(packet[keyless.HeaderSize:]))(t)
}

// both runs a test against either server.
func both(t *testing.T, f func(t *testing.T, c net.Conn, ski keyless.SKI, pub crypto.PublicKey)) {
	s := open(t)
	ours, theirs := s.ours(t, nil), s.peer(t)
	for _, tc := range []struct {
		name    string
		server  *program
		version uint16
	}{{"ours, TLS 1.2", ours, tls.VersionTLS12}, {"ours, TLS 1.3", ours, tls.VersionTLS13}, {"theirs", theirs, tls.VersionTLS12}} {
		t.Run(tc.name, func(t *testing.T) {
			pub := s.keys["p256"]
			f(t, s.raw(t, tc.server, "full", tc.version), must(keyless.SKIOf(pub))(t), pub)
		})
	}
}

// TestRepliesArePadded takes each reply apart and together again: items in order, padding as the rules say.
func TestRepliesArePadded(t *testing.T) {
	both(t, func(t *testing.T, c net.Conn, ski keyless.SKI, _ crypto.PublicKey) {
		ops := []keyless.Operation{
			{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: digest(crypto.SHA256)},
			{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{1}, Payload: digest(crypto.SHA256)}, // an error
		}
		for size := 990; size < 1030; size++ {
			ops = append(ops, keyless.Operation{Opcode: keyless.OpPing, Payload: random(size)})
		}
		for i, op := range ops {
			send(t, c, uint32(i), op)
			got, id, reply := receive(t, c)
			want := must((&keyless.Packet{Major: 1, ID: id, Operation: reply}).Append(nil))(t)
			if id != uint32(i) || !bytes.Equal(got, want) {
				t.Errorf("%v with %d bytes: reply %d has %d bytes, want reply %d with %d", op.Opcode, len(op.Payload), id, len(got), i, len(want))
			}
		}
	})
}

// TestDuplicateIDs has several requests in flight under one id. Each must be answered.
func TestDuplicateIDs(t *testing.T) {
	both(t, func(t *testing.T, c net.Conn, ski keyless.SKI, pub crypto.PublicKey) {
		const id, n = 7, 50
		d := digest(crypto.SHA256)
		waiting := map[string]bool{}
		var out []byte
		for range n {
			ping := random(20)
			waiting[string(ping)] = true
			for _, op := range []keyless.Operation{{Opcode: keyless.OpPing, Payload: ping}, {Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: d}} {
				out = must((&keyless.Packet{Major: 1, ID: id, Operation: op}).Append(out))(t)
			}
		}
		go c.Write(out) // ends with the connection; what fails shows below
		for signatures := 0; signatures < n || len(waiting) > 0; {
			_, got, reply := receive(t, c)
			switch {
			case got != id:
				t.Fatalf("a reply has id %d, want %d", got, id)
			case reply.Opcode == keyless.OpPong:
				delete(waiting, string(reply.Payload))
			case reply.Opcode == keyless.OpResponse:
				signatures++
				if err := verify(pub, d, reply.Payload, crypto.SHA256); err != nil {
					t.Error(err)
				}
			default:
				t.Fatalf("got %v, want a pong or a signature", reply.Opcode)
			}
		}
	})
}

// TestThousandPipelined sends a thousand requests before it reads a reply.
func TestThousandPipelined(t *testing.T) {
	both(t, func(t *testing.T, c net.Conn, ski keyless.SKI, pub crypto.PublicKey) {
		const n = 1000
		var out []byte
		digests := make([][]byte, n)
		for i := range digests {
			digests[i] = digest(crypto.SHA256)
			out = must((&keyless.Packet{Major: 1, ID: uint32(i), Operation: keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: ski, Payload: digests[i]}}).Append(out))(t)
		}
		sent := make(chan error, 1)
		go func() {
			_, err := c.Write(out)
			sent <- err
		}()
		seen := map[uint32]bool{}
		for range n {
			_, id, reply := receive(t, c)
			if id >= n || seen[id] {
				t.Fatalf("reply %d comes twice or was not asked for", id)
			}
			seen[id] = true
			if err := verify(pub, digests[id], reply.Payload, crypto.SHA256); err != nil {
				t.Errorf("reply %d, %v: %v", id, reply.Opcode, err)
			}
		}
		if err := <-sent; err != nil {
			t.Error(err)
		}
	})
}
