package keyless

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/netip"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

//go:embed testdata/keyless-v1.txt
var vectorFile string

// A vector is a captured packet, padding included.
type vector struct {
	name   string
	packet []byte
}

// vectors reads testdata/keyless-v1.txt. A line that it does not know is fatal.
func vectors(tb testing.TB) []vector {
	tb.Helper()
	var out []vector
	total := 0
	for lines := bufio.NewScanner(strings.NewReader(vectorFile)); lines.Scan(); {
		line := lines.Text()
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, "["):
			name, rest, _ := strings.Cut(line[1:], "]")
			_, size, _ := strings.Cut(rest, "total=")
			total = must(strconv.Atoi(size))
			out = append(out, vector{name: name})
		case strings.HasPrefix(line, "hex="):
			packet := make([]byte, total)
			copy(packet, must(hex.DecodeString(line[4:])))
			out[len(out)-1].packet = packet
		case strings.HasPrefix(line, "sha256="):
			v := out[len(out)-1]
			if got := sha256.Sum256(v.packet); hex.EncodeToString(got[:]) != line[7:] {
				tb.Fatalf("vector %q: the file's own checksum does not fit", v.name)
			}
		default:
			tb.Fatalf("vectors: unknown line %q", line)
		}
	}
	return out
}

func TestVectors(t *testing.T) {
	vs := vectors(t)
	if len(vs) != 18 {
		t.Fatalf("got %d vectors, want 18", len(vs))
	}
	for _, v := range vs {
		t.Run(v.name, func(t *testing.T) {
			h, err := ParseHeader(v.packet)
			if err != nil {
				t.Fatal(err)
			}
			if int(h.Length)+HeaderSize != len(v.packet) {
				t.Fatalf("header announces %d bytes, packet has %d", h.Length, len(v.packet)-HeaderSize)
			}
			op, err := ParseBody(v.packet[HeaderSize:])
			if err != nil {
				t.Fatal(err)
			}
			p := Packet{Major: h.Major, Minor: h.Minor, ID: h.ID, Operation: op}
			if got := must(p.Append(nil)); !bytes.Equal(got, v.packet) {
				t.Errorf("got  %x\nwant %x", got, v.packet)
			}
		})
	}
}

func TestVectorContents(t *testing.T) {
	for _, v := range vectors(t) {
		if v.name != "unknown key, every tag set, req" {
			continue
		}
		got := must(ParseBody(v.packet[HeaderSize:]))
		want := Operation{
			Opcode: OpECDSASignSHA256, Payload: got.Payload, Extra: []byte("xtra"),
			SKI: SKI(bytes.Repeat([]byte{0xaa}, 20)), Digest: [32]byte(bytes.Repeat([]byte{0xbb}, 32)),
			ClientIP: netip.MustParseAddr("198.51.100.9"), ServerIP: netip.MustParseAddr("2001:db8::1"),
			SNI: "a.example", CertID: "cid-1", CustomFunc: "fn",
			TraceContext: []byte{1, 2, 3}, Context: []byte(`{"request_id":"r1"}`), Region: 1,
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("got %+v, want %+v", got, want)
		}
		return
	}
	t.Fatal("no vector has every tag")
}

// The padding rule at its edges: n counts header and items.
func TestPadding(t *testing.T) {
	for _, tt := range []struct{ n, want int }{
		{15, 1024}, {1020, 1024}, {1021, 1024}, {1022, 1025}, {1023, 1026}, {1024, 1024}, {1025, 1025}, {5000, 5000},
	} {
		p := Packet{Major: 1, Operation: Operation{Opcode: OpPing, Payload: make([]byte, tt.n-HeaderSize-4-3)}}
		if got := len(must(p.Append(nil))); got != tt.want {
			t.Errorf("n = %d: packet of %d bytes, want %d", tt.n, got, tt.want)
		}
	}
}

func TestAppendTooLong(t *testing.T) {
	p := Packet{Major: 1, Operation: Operation{Opcode: OpPing, Payload: make([]byte, MaxBody-4-3)}}
	if got := len(must(p.Append(nil))); got != HeaderSize+MaxBody {
		t.Errorf("largest packet has %d bytes, want %d", got, HeaderSize+MaxBody)
	}
	p.Payload = append(p.Payload, 0)
	got, err := p.Append([]byte("before"))
	wantErr(t, err, ErrFormat)
	if string(got) != "before" {
		t.Errorf("dst became %q", got)
	}
}

func TestParseBodyRefuses(t *testing.T) {
	for _, tt := range []struct{ name, body, want string }{
		{"one byte", "11", "left over"},
		{"two bytes", "1100", "left over"},
		{"value missing", "110001", "announces 1 bytes, 0 are left"},
		{"value short", "12000500", "announces 5 bytes, 1 are left"},
		{"rest after an item", "110001f112", "left over"},
		{"opcode of 0 bytes", "110000", "0 bytes, want 1"},
		{"opcode of 2 bytes", "1100020101", "2 bytes, want 1"},
		{"SKI of 19 bytes", "040013" + strings.Repeat("aa", 19), "19 bytes, want 20"},
		{"digest of 33 bytes", "010021" + strings.Repeat("aa", 33), "33 bytes, want 32"},
		{"client IP of 5 bytes", "0300050102030405", "want 4 or 16"},
		{"empty server IP", "050000", "want 4 or 16"},
		{"region of 2 bytes", "1700020102", "2 bytes, want 1"},
		{"opcode twice", "110001f1110001f1", "item 0x11 twice"},
		{"padding twice", "200000200000", "item 0x20 twice"},
		{"payload twice, empty", "120000120000", "item 0x12 twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := ParseBody(must(hex.DecodeString(tt.body)))
			wantErr(t, err, ErrFormat)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, want it to say %q", err, tt.want)
			}
		})
	}
}

func TestParseBodyAccepts(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		want       Operation
	}{
		{"nothing", "", Operation{}},
		{"any order", "12000141110001f1", Operation{Opcode: OpPing, Payload: []byte("A")}},
		{"unknown tags, even twice", "990001ff110001f199000055000100", Operation{Opcode: OpPing}},
		{"unknown tag with the low bits of a known one", "510001ff110001f1", Operation{Opcode: OpPing}},
		{"padding first", "2000020000110001f1", Operation{Opcode: OpPing}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseBody(must(hex.DecodeString(tt.body)))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestParseHeaderShort(t *testing.T) {
	_, err := ParseHeader(make([]byte, HeaderSize-1))
	wantErr(t, err, ErrFormat)
}

func TestSKI(t *testing.T) {
	key := p256Key().Public()
	ski := must(SKIOf(key))
	tmpl := must(x509.ParseCertificate(ca().issueFor(p256Key(), "", "x.test").Certificate[0]))
	// x509 computes the same name for a CA's subject key id; the contents of the BIT STRING are the point.
	point := must(tmpl.PublicKey.(*ecdsa.PublicKey).Bytes())
	if want := SKI(sha1Sum(point)); ski != want {
		t.Errorf("got %s, want %s", ski, want)
	}
	if got := must(ParseSKI(ski.String())); got != ski {
		t.Errorf("ParseSKI(String()) = %s, want %s", got, ski)
	}
	if got := must(ParseSKI(strings.ToUpper(ski.String()))); got != ski {
		t.Errorf("upper case: got %s, want %s", got, ski)
	}
	for _, bad := range []string{"", "00", strings.Repeat("0", 39), strings.Repeat("0", 41), strings.Repeat("g", 40)} {
		if _, err := ParseSKI(bad); err == nil {
			t.Errorf("ParseSKI(%q) succeeded", bad)
		}
	}
	if _, err := SKIOf("not a key"); err == nil {
		t.Error("SKIOf of a string succeeded")
	}
}

func sha1Sum(b []byte) []byte {
	h := crypto.SHA1.New()
	h.Write(b)
	return h.Sum(nil)
}

func TestDigestOf(t *testing.T) {
	n, _ := new(big.Int).SetString("C0FFEE", 16)
	if got, want := must(DigestOf(&rsa.PublicKey{N: n, E: 65537})), sha256.Sum256([]byte("C0FFEE")); got != want {
		t.Errorf("RSA: got %x, want %x", got, want)
	}
	for _, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384(), elliptic.P521()} {
		k := must(ecdsa.GenerateKey(curve, rand.Reader))
		point := elliptic.MarshalCompressed(curve, k.X, k.Y)
		want := sha256.Sum256([]byte(strings.ToUpper(hex.EncodeToString(point))))
		if got := must(DigestOf(k.Public())); got != want {
			t.Errorf("%s: got %x, want %x", curve.Params().Name, got, want)
		}
	}
	if _, err := DigestOf(edKey().Public()); err == nil {
		t.Error("Ed25519 has a digest name")
	}
}

func TestOpcodes(t *testing.T) {
	for op := range 256 {
		o := Opcode(op)
		if o.Known() == strings.HasPrefix(o.String(), "opcode-") {
			t.Errorf("0x%02x: Known() = %v, String() = %q", op, o.Known(), o)
		}
		if o.Hash() != 0 && !o.IsSign() {
			t.Errorf("%s has a hash and does not sign", o)
		}
	}
	for _, tt := range []struct {
		op   Opcode
		size int
	}{{OpRSASignMD5SHA1, 36}, {OpRSASignSHA1, 20}, {OpRSASignSHA224, 28}, {OpECDSASignSHA384, 48}, {OpRSAPSSSignSHA512, 64}} {
		if got := tt.op.Hash().Size(); got != tt.size {
			t.Errorf("%s: digest of %d bytes, want %d", tt.op, got, tt.size)
		}
	}
}

func TestErrorsMatchByCode(t *testing.T) {
	err := fmt.Errorf("somewhere: %w", &Error{Code: CodeKeyNotFound})
	if !errors.Is(err, ErrKeyNotFound) || errors.Is(err, ErrInternal) {
		t.Errorf("%v matches the wrong sentinel", err)
	}
	if got := ErrorCode(200).String(); got != "error code 200" {
		t.Errorf("unknown code prints as %q", got)
	}
}

// Attacker: a peer, before and after authentication, who chooses every byte of the header.
func FuzzParseHeader(f *testing.F) {
	for _, v := range vectors(f) {
		f.Add(v.packet[:HeaderSize])
	}
	f.Add([]byte{1, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := ParseHeader(b)
		if err != nil {
			if len(b) >= HeaderSize {
				t.Fatalf("%x: %v", b, err)
			}
			return
		}
		want := fmt.Sprintf("%02x%02x%04x%08x", h.Major, h.Minor, h.Length, h.ID)
		if got := hex.EncodeToString(b[:HeaderSize]); got != want {
			t.Fatalf("got %s, want %s", want, got)
		}
	})
}

// Attacker: an authenticated peer who chooses the body. What is accepted must mean the same after a trip through the
// encoder, and the encoder's form must be its own fixed point.
func FuzzParseBody(f *testing.F) {
	for _, v := range vectors(f) {
		op := must(ParseBody(v.packet[HeaderSize:]))
		f.Add(append(op.appendItems(nil), tagPadding, 0, 2, 0, 0)) // little padding: the fuzzer works better on short inputs
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		op, err := ParseBody(body)
		if err != nil {
			wantErr(t, err, ErrFormat)
			return
		}
		p := Packet{Major: 1, Operation: op}
		first, err := p.Append(nil)
		if err != nil {
			return // only unpadded bodies near MaxBody
		}
		again, err := ParseBody(first[HeaderSize:])
		if err != nil {
			t.Fatalf("own encoding refused: %v", err)
		}
		p.Operation = again
		if second := must(p.Append(nil)); !bytes.Equal(first, second) {
			t.Fatalf("encoding is not stable:\n%x\n%x", first, second)
		}
		if !sameOperation(op, again) {
			t.Fatalf("got %+v, want %+v", again, op)
		}
	})
}

// sameOperation compares with empty and nil slices as equal.
func sameOperation(a, b Operation) bool {
	for _, o := range []*Operation{&a, &b} {
		for _, s := range []*[]byte{&o.Payload, &o.Extra, &o.TraceContext, &o.Context} {
			if len(*s) == 0 {
				*s = nil
			}
		}
	}
	return reflect.DeepEqual(a, b)
}

// Attacker: a peer who chooses the stream and how it is cut into pieces. The reader must find the same packets however
// they arrive.
func FuzzStream(f *testing.F) {
	for _, v := range vectors(f) {
		op := must(ParseBody(v.packet[HeaderSize:]))
		items := op.appendItems(nil)
		packet := append([]byte{1, 0, byte(len(items) >> 8), byte(len(items)), 0, 0, 0, 9}, items...)
		f.Add(append(packet, packet...), byte(len(packet)/2))
	}
	f.Add([]byte{1, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0xff, 0xff, 0, 0, 0, 2}, byte(3))
	f.Fuzz(func(t *testing.T, stream []byte, step byte) {
		r := newFrameReader(&pieces{rest: stream, step: int(step) + 1})
		var got []byte
		for {
			h, body, err := r.next()
			if err != nil {
				if errors.Is(err, io.EOF) != (len(got) == len(stream)) {
					t.Fatalf("after %d of %d bytes: %v", len(got), len(stream), err)
				}
				break
			}
			if len(body) != int(h.Length) {
				t.Fatalf("body of %d bytes, header says %d", len(body), h.Length)
			}
			got = append(got, h.Major, h.Minor, byte(h.Length>>8), byte(h.Length),
				byte(h.ID>>24), byte(h.ID>>16), byte(h.ID>>8), byte(h.ID))
			got = append(got, body...)
		}
		if !bytes.HasPrefix(stream, got) {
			t.Fatal("packets are not the stream's")
		}
	})
}

// Compact packets are a multiple of 128 bytes long for every length of their items, and parse to what they were.
func TestCompactPadding(t *testing.T) {
	for n := range 700 {
		p := Packet{Major: major, ID: 7, Compact: true, Operation: Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign, Payload: make([]byte, n)}}
		b, err := p.Append(nil)
		if err != nil {
			t.Fatal(err)
		}
		least := HeaderSize + p.Operation.size() + itemHeader
		if len(b)%padBlock != 0 || len(b) < least || len(b) >= least+padBlock {
			t.Errorf("payload of %d bytes: packet of %d, want the next multiple of %d from %d", n, len(b), padBlock, least)
		}
		h, err := ParseHeader(b)
		if err != nil || int(h.Length) != len(b)-HeaderSize {
			t.Fatalf("header %+v, %v", h, err)
		}
		op, err := ParseBody(b[HeaderSize:])
		if err != nil || op.CustomFunc != FuncTLSSign || len(op.Payload) != n {
			t.Fatalf("payload of %d bytes: got %d, %v", n, len(op.Payload), err)
		}
	}
}

// Only our own functions have compact packets: other makes' clients and servers see the sizes that they know.
func TestCompactOnlyForOurFunctions(t *testing.T) {
	for _, tt := range []struct {
		op   Operation
		want bool
	}{
		{Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign}, true},
		{Operation{Opcode: OpCustom, CustomFunc: FuncRenew}, true},
		{Operation{Opcode: OpCustom, CustomFunc: "other"}, false},
		{Operation{Opcode: OpECDSASignSHA256, CustomFunc: FuncTLSSign}, false},
		{Operation{Opcode: OpPing}, false},
	} {
		if got := compact(&tt.op); got != tt.want {
			t.Errorf("%s %q: got %v, want %v", tt.op.Opcode, tt.op.CustomFunc, got, tt.want)
		}
	}
}
