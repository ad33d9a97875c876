package tunnel

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// hasUnknown reports whether items hold a tag that decoders skip, so that encoding again cannot give it back.
func hasUnknown(b []byte) bool {
	for it := readItems(b, isCertList); ; {
		tag, _, ok, err := it.next()
		if !ok || err != nil {
			return false
		}
		if tag >= tagSkippable {
			return true
		}
	}
}

// FuzzFlowHeader plays an edge that an attacker has taken over, against a connector.
func FuzzFlowHeader(f *testing.F) {
	for _, flow := range []Flow{
		testFlow,
		{VNet: "v", Host: "www.keyhaven.test", Port: 65535},
		{VNet: "v", Host: "2001:db8::1", Port: 1, Visitor: netip.MustParseAddrPort("[2001:db8::2]:9"), Deadline: time.Hour},
		{Kind: KindIngressUDP, Host: "coap.keyhaven.test", Port: 5683, Service: "udp", ID: [16]byte{7}, Tunnel: "t", context: 7},
	} {
		b, err := appendFlow(nil, flow, true)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var buf [flowHeaderLen + maxFlowItemsLen]byte
		r := bytes.NewReader(b)
		flow, result, err := readFlow(r, buf[:], protocolMinor)
		if (err == nil) != (result == ResultOK) {
			t.Fatalf("result %v with error %v", result, err)
		}
		if err != nil {
			return
		}
		read := b[:len(b)-r.Len()]
		if hasUnknown(read[flowHeaderLen:]) {
			return
		}
		again, err := appendFlow(nil, flow, true)
		if err != nil || !bytes.Equal(again, read) {
			t.Fatalf("%+v encodes to %x (%v), was read from %x", flow, again, err, read)
		}
	})
}

type frameReader struct{ io.Reader }

func (frameReader) SetReadDeadline(time.Time) error { return nil }

// FuzzFrame plays a client with a valid certificate, or one that joins, against an edge, and an edge against a connector:
// all frames of both.
func FuzzFrame(f *testing.F) {
	must := func(b []byte, err error) []byte {
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	id := mtls.Identity{TrustDomain: "keyhaven.test", Kind: mtls.KindConnector, Name: "c1"}
	f.Add(must(appendRegister(nil, testRegistration)))
	f.Add(must(appendRegister(nil, Registration{Instance: "i"})))
	f.Add(must(appendRenew(nil, 7, []byte("csr"))))
	f.Add(must(appendRenewed(nil, 7, 0, [][]byte{[]byte("leaf"), []byte("root")})))
	f.Add(must(appendRenewed(nil, 7, RefusalRevoked, nil)))
	f.Add(must(appendJoin(nil, certItems{CSR: []byte("csr"), TokenID: "id", Secret: []byte("secret"), Name: "n"})))
	f.Add(must(appendJoined(nil, JoinReply{Chain: [][]byte{[]byte("leaf")}, Roots: []byte("pem"), Identity: id, Tunnel: "t", Edges: []string{"a:1", "b:2"}})))
	f.Add(byteFrame(frameRegistered, protocolVersion))
	f.Add(byteFrame(frameRefused, byte(RefusalBusy)))
	f.Add(must(appendRegistered(nil, protocolMinor)))
	f.Add(byteFrame(frameEdges, appendItem(nil, tagEdge, "a:1")...))
	f.Add(byteFrame(frameDrain))
	f.Add(byteFrame(frameGoodbye, byte(CloseDrained)))
	f.Fuzz(func(t *testing.T, b []byte) {
		fr, err := readFrame(frameReader{bytes.NewReader(b)}, time.Second)
		if err != nil {
			return
		}
		read := b[:frameHeaderLen+len(fr.payload)]
		if again, known := reencode(fr); known && !bytes.Equal(again[frameHeaderLen:], read[frameHeaderLen:]) {
			t.Fatalf("frame 0x%02x encodes to %x, was read from %x", byte(fr.typ), again, read)
		}
	})
}

// reencode decodes a frame's payload and encodes it again; known is false if the payload is refused or holds items that
// decoders skip.
func reencode(fr frame) (again []byte, known bool) {
	p := fr.payload
	var err error
	itemsAt := 1
	switch fr.typ {
	case frameRegister:
		var r Registration
		if r, err = parseRegister(p); err == nil {
			again, err = appendRegister(nil, r)
		}
	case frameRenew:
		itemsAt = 4
		var id uint32
		var csr []byte
		if id, csr, err = parseRenew(p); err == nil {
			again, err = appendRenew(nil, id, csr)
		}
	case frameRenewed:
		itemsAt = 5
		var id uint32
		var code RefusalCode
		var chain [][]byte
		if id, code, chain, err = parseRenewed(p); err == nil {
			again, err = appendRenewed(nil, id, code, chain)
		}
	case frameJoin:
		var c certItems
		if c, err = parseJoin(p); err == nil {
			again, err = appendJoin(nil, c)
		}
	case frameJoined:
		var r JoinReply
		if r, err = parseJoined(p); err == nil {
			again, err = appendJoined(nil, r)
		}
	case frameRegistered:
		var minor int
		if minor, err = parseRegistered(p); err == nil {
			again, err = appendRegistered(nil, minor)
		}
	case frameEdges:
		itemsAt = 0
		var edges []string
		if edges, err = parseEdges(p); err == nil {
			again = append(make([]byte, frameHeaderLen), (&certItems{Edges: edges}).append(nil)...)
		}
	default:
		return nil, false
	}
	if err != nil || hasUnknown(p[itemsAt:]) {
		return nil, false
	}
	return again, true
}

// FuzzConfig plays an edge that an attacker has taken over, which pushes a configuration, and a connector that answers one.
func FuzzConfig(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00\x02{}"))
	f.Add(configAnswer(errors.New("rule 2: no service")))
	f.Add(configAnswer(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		if version, body, err := readConfig(bytes.NewReader(b)); err == nil {
			again := binary.BigEndian.AppendUint64(nil, version)
			again = append(binary.BigEndian.AppendUint32(again, uint32(len(body))), body...)
			if !bytes.Equal(again, b) {
				t.Fatalf("version %d, %d bytes were read from %x", version, len(body), b)
			}
		}
		err := readConfigAnswer(bytes.NewReader(b), 7)
		if ce, ok := errors.AsType[*ConfigError](err); ok && (ce.Version != 7 || strings.ContainsAny(ce.Text, "\x1b\u202e")) {
			t.Fatalf("refusal %q of version %d", ce.Text, ce.Version)
		}
	})
}

// FuzzProxyAnswer plays an HTTP proxy. What follows its answer must be left alone.
func FuzzProxyAnswer(f *testing.F) {
	f.Add([]byte("HTTP/1.1 200 OK\r\n\r\n\x16\x03"))
	f.Add([]byte("HTTP/1.0 407 Who are you\r\nProxy-Authenticate: Basic\r\n\r\n"))
	f.Add([]byte("220 smtp\r\n\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		status, err := readProxyAnswer(r)
		if err != nil {
			return
		}
		head := b[:len(b)-r.Len()]
		if !bytes.HasPrefix(head, []byte("HTTP/1.")) || status < 0 || status > 999 || bytes.Contains(head[:len(head)-1], []byte("\n\n")) {
			t.Fatalf("status %d was read from %q", status, head)
		}
	})
}

func TestItemRules(t *testing.T) {
	item := func(tag byte, v string) []byte { return appendItem(nil, tag, v) }
	join := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	base := join([]byte{1}, item(tagInstance, "i"))
	for name, tt := range map[string]struct {
		payload []byte
		ok      bool
	}{
		"plain":             {base, true},
		"skippable unknown": {join(base, item(0xf0, "later")), true},
		"required unknown":  {join(base, item(0x7f, "later")), false},
		"repeated":          {join(base, item(tagInstance, "j")), false},
		"out of order":      {join([]byte{1}, item(tagVersion, "v"), item(tagInstance, "i")), false},
		"empty item":        {join(base, []byte{tagVersion, 0, 0}), false},
		"cut header":        {join(base, []byte{tagVersion, 0}), false},
		"cut value":         {join(base, []byte{tagVersion, 0, 2, 'x'}), false},
		"control character": {join(base, item(tagVersion, "a\x1b[2J")), false},
		"not UTF-8":         {join(base, item(tagVersion, "\xff")), false},
		"index 0 written":   {join(base, []byte{tagIndex, 0, 1, 0}), false},
		"greatest index":    {join(base, []byte{tagIndex, 0, 1, 255}), true},
		"index of two":      {join(base, []byte{tagIndex, 0, 2, 1, 0}), false},
		"no instance":       {[]byte{1}, false},
		"no version":        {nil, false},
	} {
		if _, err := parseRegister(tt.payload); (err == nil) != tt.ok {
			t.Errorf("%s: error %v, want ok = %v", name, err, tt.ok)
		}
	}
	if _, err := appendRegister(nil, Registration{Instance: "i", Index: 256}); err == nil {
		t.Error("an index above the limit was encoded")
	}
	big := make([]byte, maxFramePayload)
	if _, err := appendRenew(nil, 1, big); err == nil {
		t.Error("a frame above the limit was encoded")
	}
	long := byteFrame(frameRenew)
	binary.BigEndian.PutUint16(long[2:], maxFramePayload+1)
	if _, err := readFrame(frameReader{bytes.NewReader(append(long, make([]byte, maxFramePayload+1)...))}, 0); err == nil {
		t.Error("a frame above the limit was read")
	}
}
