package tunnel

import "encoding/binary"

// A frame of the TCP carrier is
//
//	0      type (u8)
//	1..2   length n of the payload (u16)
//	3..7   stream (u40), 0 for the session
//	8..    payload (n bytes)
//
// See SPEC.md, "TCP".
const (
	muxHeaderLen = 8
	// maxMuxData is the longest payload of a data frame, which with its header fills a TLS record.
	maxMuxData = 16<<10 - muxHeaderLen
	// maxMuxDatagram is the longest datagram.
	maxMuxDatagram = 1<<16 - 1
	maxMuxStream   = 1<<40 - 1

	// initialSessionWindow is what a side may send on all streams together before the first window frame; for one stream it
	// is initialFlowWindow.
	initialSessionWindow = 1 << 20
	// maxMuxWindow bounds what windows add up to.
	maxMuxWindow = 1 << 40
)

type muxType byte

const (
	muxData     muxType = 0x01 // bytes
	muxOpen     muxType = 0x02 // bytes; begins a stream
	muxFin      muxType = 0x03 // empty
	muxReset    muxType = 0x04 // u8 code
	muxStop     muxType = 0x05 // u8 code
	muxWindow   muxType = 0x06 // u32 more bytes
	muxDatagram muxType = 0x07 // bytes
	muxPing     muxType = 0x08 // 8 bytes
	muxPong     muxType = 0x09 // 8 bytes
	muxClose    muxType = 0x0a // u8 close reason
	muxLimits   muxType = 0x0b // u32 streams

	muxSkippable muxType = 0x80 // and above
)

type muxHeader struct {
	typ    muxType
	n      int
	stream uint64
}

func appendMuxHeader(dst []byte, h muxHeader) []byte {
	return append(dst, byte(h.typ), byte(h.n>>8), byte(h.n),
		byte(h.stream>>32), byte(h.stream>>24), byte(h.stream>>16), byte(h.stream>>8), byte(h.stream))
}

// appendMuxNumber appends a frame whose payload is a number of size bytes.
func appendMuxNumber(dst []byte, t muxType, stream uint64, size int, v uint64) []byte {
	dst = appendMuxHeader(dst, muxHeader{t, size, stream})
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], v)
	return append(dst, b[8-size:]...)
}

// parseMuxHeader decodes a header of muxHeaderLen bytes and checks it.
func parseMuxHeader(b []byte) (muxHeader, error) {
	h := muxHeader{
		typ: muxType(b[0]), n: int(binary.BigEndian.Uint16(b[1:])),
		stream: uint64(b[3])<<32 | uint64(binary.BigEndian.Uint32(b[4:])),
	}
	forStream, least, most := false, 0, 0
	switch h.typ {
	case muxData, muxOpen:
		forStream, most = true, maxMuxData
	case muxFin:
		forStream = true
	case muxReset, muxStop:
		forStream, least, most = true, 1, 1
	case muxWindow:
		forStream, least, most = h.stream != 0, 4, 4
	case muxDatagram:
		most = maxMuxDatagram
	case muxPing, muxPong:
		least, most = 8, 8
	case muxClose:
		least, most = 1, 1
	case muxLimits:
		least, most = 4, 4
	default:
		if h.typ < muxSkippable {
			return h, malformed("unknown frame 0x%02x of the carrier", byte(h.typ))
		}
		return h, nil
	}
	if forStream != (h.stream != 0) || h.n < least || h.n > most {
		return h, malformed("frame 0x%02x of %d bytes for stream %d", byte(h.typ), h.n, h.stream)
	}
	return h, nil
}
