package keyless

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
)

// Sizes of the wire format.
const (
	// HeaderSize is the size of a packet's header.
	HeaderSize = 8
	// MaxBody is the largest body that a header can announce.
	MaxBody = 1<<16 - 1

	itemHeader = 3    // tag u8, length u16
	padTo      = 1024 // packets shorter than this are padded to about this size
	padBlock   = 128  // what the length of compact packets is a multiple of
	major      = 1
	minor      = 0
)

// The item tags, in the order of their numbers.
const (
	tagDigest   = 0x01
	tagSNI      = 0x02
	tagClientIP = 0x03
	tagSKI      = 0x04
	tagServerIP = 0x05
	tagCertID   = 0x06
	tagOpcode   = 0x11
	tagPayload  = 0x12
	tagFunc     = 0x13
	tagExtra    = 0x14
	tagTrace    = 0x15
	tagContext  = 0x16
	tagRegion   = 0x17
	tagPadding  = 0x20
)

// An Operation is the content of a packet's body. Zero fields are not sent; a field that is sent empty, or a SKI or
// digest of zeros, reads back as the zero value.
type Operation struct {
	Opcode       Opcode
	Payload      []byte
	Extra        []byte     // private to the two ends
	SKI          SKI        // which key
	Digest       [32]byte   // which key, in the way of older clients (see DigestOf)
	ClientIP     netip.Addr // the visitor
	ServerIP     netip.Addr // the address that the visitor reached
	SNI          string
	CertID       string
	CustomFunc   string // with OpCustom
	TraceContext []byte
	Context      []byte // a JSON object
	Region       byte
}

// A Packet is an operation or a reply with its header. Append writes Major and Minor as they are, so a Packet for the
// wire has Major 1 and Minor 0.
type Packet struct {
	Major, Minor byte
	ID           uint32
	Operation
	// Compact pads to a multiple of 128 bytes, whatever the size, instead of to 1024. It is for packets of functions
	// that only Keyhaven has, in both directions: most of what a link through a tunnel carries would be zeros otherwise.
	Compact bool
}

// A Header is the first 8 bytes of a packet, big endian:
//
//	major u8 | minor u8 | length of the body u16 | id u32
type Header struct {
	Major, Minor byte
	Length       uint16
	ID           uint32
}

// ParseHeader reads the header at the start of b. It fails only if b is shorter than HeaderSize: whether the version
// is one that the caller speaks is the caller's to decide, since the length frames the packet in any case.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < HeaderSize {
		return Header{}, fmt.Errorf("keyless: header of %d bytes, want %d: %w", len(b), HeaderSize, ErrFormat)
	}
	return Header{
		Major:  b[0],
		Minor:  b[1],
		Length: binary.BigEndian.Uint16(b[2:]),
		ID:     binary.BigEndian.Uint32(b[4:]),
	}, nil
}

// Append writes the packet to the end of dst in canonical form: items in the order of existing clients, empty ones
// left out, padded as SPEC.md says. On an error (a body that would pass MaxBody) dst is returned unchanged.
func (p *Packet) Append(dst []byte) ([]byte, error) {
	size := p.Operation.size()
	size += p.padding(HeaderSize + size)
	if size > MaxBody {
		return dst, fmt.Errorf("keyless: body of %d bytes passes the limit of %d: %w", size, MaxBody, ErrFormat)
	}
	dst = append(dst, p.Major, p.Minor)
	dst = binary.BigEndian.AppendUint16(dst, uint16(size))
	dst = binary.BigEndian.AppendUint32(dst, p.ID)
	end := len(dst) + size
	dst = p.Operation.appendItems(dst)
	if len(dst) < end {
		pad := end - len(dst) - itemHeader
		dst = append(dst, tagPadding, byte(pad>>8), byte(pad))
		dst = append(dst, zeros[:pad]...)
	}
	return dst, nil
}

// padding is the size of the padding item behind n bytes of header and items.
func (p *Packet) padding(n int) int {
	switch {
	case p.Compact:
		return itemHeader + -(n+itemHeader)&(padBlock-1)
	case n < padTo:
		return itemHeader + max(0, padTo-n-itemHeader)
	}
	return 0
}

// compact reports whether the packets of an operation are: those of our own functions, which no other client or server
// knows.
func compact(o *Operation) bool {
	return o.Opcode == OpCustom && strings.HasPrefix(o.CustomFunc, "keyhaven/")
}

var zeros [padTo]byte

// size is the length of the items that appendItems writes.
func (o *Operation) size() int {
	n := 0
	for _, l := range [...]int{
		len(o.Payload), len(o.Extra), len(o.SNI), len(o.CertID), len(o.CustomFunc), len(o.TraceContext), len(o.Context),
	} {
		if l > 0 {
			n += itemHeader + l
		}
	}
	if o.Opcode != 0 {
		n += itemHeader + 1
	}
	if !o.SKI.IsZero() {
		n += itemHeader + len(o.SKI)
	}
	if o.Digest != [32]byte{} {
		n += itemHeader + len(o.Digest)
	}
	for _, a := range [...]netip.Addr{o.ClientIP, o.ServerIP} {
		if a.IsValid() {
			n += itemHeader + a.BitLen()/8
		}
	}
	if o.Region != 0 {
		n += itemHeader + 1
	}
	return n
}

// appendItems writes the items that are set, in the send order 11 12 14 04 01 03 05 02 06 13 15 16 17.
func (o *Operation) appendItems(dst []byte) []byte {
	if o.Opcode != 0 {
		dst = append(dst, tagOpcode, 0, 1, byte(o.Opcode))
	}
	dst = appendItem(dst, tagPayload, o.Payload)
	dst = appendItem(dst, tagExtra, o.Extra)
	if !o.SKI.IsZero() {
		dst = appendItem(dst, tagSKI, o.SKI[:])
	}
	if o.Digest != [32]byte{} {
		dst = appendItem(dst, tagDigest, o.Digest[:])
	}
	dst = appendAddr(dst, tagClientIP, o.ClientIP)
	dst = appendAddr(dst, tagServerIP, o.ServerIP)
	dst = appendItem(dst, tagSNI, o.SNI)
	dst = appendItem(dst, tagCertID, o.CertID)
	dst = appendItem(dst, tagFunc, o.CustomFunc)
	dst = appendItem(dst, tagTrace, o.TraceContext)
	dst = appendItem(dst, tagContext, o.Context)
	if o.Region != 0 {
		dst = append(dst, tagRegion, 0, 1, o.Region)
	}
	return dst
}

func appendItem[T []byte | string](dst []byte, tag byte, v T) []byte {
	if len(v) == 0 {
		return dst
	}
	dst = append(dst, tag, byte(len(v)>>8), byte(len(v)))
	return append(dst, v...)
}

func appendAddr(dst []byte, tag byte, a netip.Addr) []byte {
	switch {
	case a.Is4():
		v := a.As4()
		return appendItem(dst, tag, v[:])
	case a.IsValid():
		v := a.As16()
		return appendItem(dst, tag, v[:])
	}
	return dst
}

// ParseBody reads the items of a body. Payload, Extra, TraceContext and Context alias body. Unknown tags are skipped;
// a known tag twice, a wrong size, or an item that does not end where the body does is an error that matches
// ErrFormat. An operation without an opcode is no error here: its Opcode is 0.
func ParseBody(body []byte) (Operation, error) {
	var o Operation
	err := o.parse(body)
	return o, err
}

// parse is ParseBody into an operation that holds nothing yet.
func (o *Operation) parse(body []byte) error {
	var seen uint64 // one bit for each known tag, all of which are below 64
	for rest := body; len(rest) > 0; {
		at := len(body) - len(rest)
		if len(rest) < itemHeader {
			return formatError(at, "%d bytes left over after the last item", len(rest))
		}
		tag, n := rest[0], int(binary.BigEndian.Uint16(rest[1:]))
		rest = rest[itemHeader:]
		if n > len(rest) {
			return formatError(at, "item 0x%02x announces %d bytes, %d are left", tag, n, len(rest))
		}
		value := rest[:n:n]
		rest = rest[n:]
		known, err := o.set(tag, value)
		if err != nil {
			return formatError(at, "item 0x%02x: %v", tag, err)
		}
		if !known {
			continue
		}
		if seen&(1<<tag) != 0 {
			return formatError(at, "item 0x%02x twice", tag)
		}
		seen |= 1 << tag
	}
	return nil
}

// set stores one item and reports whether the tag is a known one.
func (o *Operation) set(tag byte, v []byte) (known bool, err error) {
	switch tag {
	case tagOpcode:
		if err := wantSize(v, 1); err != nil {
			return true, err
		}
		o.Opcode = Opcode(v[0])
	case tagPayload:
		o.Payload = v
	case tagExtra:
		o.Extra = v
	case tagSKI:
		if err := wantSize(v, len(o.SKI)); err != nil {
			return true, err
		}
		o.SKI = SKI(v)
	case tagDigest:
		if err := wantSize(v, len(o.Digest)); err != nil {
			return true, err
		}
		o.Digest = [32]byte(v)
	case tagClientIP:
		return true, setAddr(&o.ClientIP, v)
	case tagServerIP:
		return true, setAddr(&o.ServerIP, v)
	case tagSNI:
		o.SNI = string(v)
	case tagCertID:
		o.CertID = string(v)
	case tagFunc:
		o.CustomFunc = funcName(v)
	case tagTrace:
		o.TraceContext = v
	case tagContext:
		o.Context = v
	case tagRegion:
		if err := wantSize(v, 1); err != nil {
			return true, err
		}
		o.Region = v[0]
	case tagPadding:
	default:
		return false, nil
	}
	return true, nil
}

// funcName is string(v) without an allocation for the function that nearly every request names.
func funcName(v []byte) string {
	if string(v) == FuncTLSSign {
		return FuncTLSSign
	}
	return string(v)
}

func wantSize(v []byte, n int) error {
	if len(v) != n {
		return fmt.Errorf("%d bytes, want %d", len(v), n)
	}
	return nil
}

func setAddr(a *netip.Addr, v []byte) error {
	addr, ok := netip.AddrFromSlice(v)
	if !ok {
		return fmt.Errorf("address of %d bytes, want 4 or 16", len(v))
	}
	*a = addr
	return nil
}

func formatError(at int, format string, args ...any) error {
	return fmt.Errorf("keyless: body at byte %d: %s: %w", at, fmt.Sprintf(format, args...), ErrFormat)
}
