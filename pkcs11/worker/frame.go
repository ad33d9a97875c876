package worker

import (
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/keyhaven/keyhaven/signer"
)

// A frame is length (4 bytes, of what follows), type (1), id (4) and body, numbers in network order. See PROTOCOL.md.
const (
	frameHeader = 9
	maxFrame    = 256 << 10 // bytes, with the length
	maxInput    = maxFrame - frameHeader - signHeader
	signHeader  = 6 // key (4), kind (1), hash (1)
)

// maxInFlight bounds what one worker holds. Beyond it the pool refuses with signer.ErrOverloaded.
const maxInFlight = 1024

type frameType byte

// Frames that the pool sends.
const (
	frameConfine frameType = 1 + iota // JSON confineRequest
	frameOpen                         // JSON openRequest
	frameList                         // empty
	frameKey                          // a pkcs11.Description; the id is the key's number
	frameSign                         // key, kind, hash, input
	frameDecrypt                      // key, ciphertext
	frameCheck                        // empty
	frameCancel                       // empty; the id is that of what need not be done any more
	frameLeave                        // how (1 byte), and an error if denied
	frameQuit                         // empty
)

// Frames that a worker sends.
const (
	frameConfined frameType = 65 + iota // JSON confinement
	frameReady                          // JSON readyReply
	frameFailed                         // an error; the worker leaves
	frameListed                         // a pkcs11.Description
	frameDone                           // the result
	frameError                          // an error; id 0: of a keep-alive
	frameAsk                            // empty: asks for leave to log in
	frameLogin                          // what became of the login: empty, or an error
	frameLog                            // JSON logRecord
	frameStuck                          // empty; the id is that of the operation that the module holds
	framePulse                          // empty
)

// frame is one frame. Its body is valid until the next is read.
type frame struct {
	typ  frameType
	id   uint32
	body []byte
}

var errFrame = errors.New("the frame is malformed")

// appendFrame appends a frame whose body is the parts.
func appendFrame(dst []byte, typ frameType, id uint32, parts ...[]byte) []byte {
	n := frameHeader - 4
	for _, p := range parts {
		n += len(p)
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(n))
	dst = append(dst, byte(typ))
	dst = binary.BigEndian.AppendUint32(dst, id)
	for _, p := range parts {
		dst = append(dst, p...)
	}
	return dst
}

// cutFrame takes a frame from the beginning of b. ok is false if b holds no whole one yet.
func cutFrame(b []byte) (f frame, rest []byte, ok bool, err error) {
	if len(b) < 4 {
		return f, b, false, nil
	}
	n := binary.BigEndian.Uint32(b)
	if n < frameHeader-4 || n > maxFrame-4 {
		return f, b, false, fmt.Errorf("%w: a length of %d", errFrame, n)
	}
	if len(b)-4 < int(n) {
		return f, b, false, nil
	}
	end := 4 + int(n)
	return frame{frameType(b[4]), binary.BigEndian.Uint32(b[5:]), b[frameHeader:end:end]}, b[end:], true, nil
}

// frameReader reads frames, as many at a time as have come.
type frameReader struct {
	r    io.Reader
	buf  []byte
	rest []byte // of buf: read and not yet returned
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: r, buf: make([]byte, 32<<10)}
}

// next returns the next frame. It waits for one only if none has been read already. io.EOF means an end between frames.
func (r *frameReader) next() (frame, error) {
	for {
		f, rest, ok, err := cutFrame(r.rest)
		if ok || err != nil {
			r.rest = rest
			return f, err
		}
		if len(r.rest) >= len(r.buf)/2 && len(r.buf) < maxFrame {
			r.buf = make([]byte, maxFrame)
		}
		n := copy(r.buf, r.rest)
		m, err := r.r.Read(r.buf[n:])
		r.rest = r.buf[:n+m]
		if m > 0 {
			continue
		}
		if err == io.EOF && n > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return frame{}, err
		}
	}
}

// signRequest is the body of frameSign, and of frameDecrypt, which has no algorithm.
type signRequest struct {
	key   uint32
	alg   signer.Algorithm
	input []byte
}

func decodeSign(body []byte) (r signRequest, err error) {
	if len(body) < signHeader {
		return r, fmt.Errorf("%w: sign: %d bytes", errFrame, len(body))
	}
	r.key = binary.BigEndian.Uint32(body)
	r.alg.Kind, r.alg.Hash = signer.Kind(body[4]), crypto.Hash(body[5])
	r.input = body[signHeader:]
	return r, nil
}

func decodeDecrypt(body []byte) (r signRequest, err error) {
	if len(body) < 4 {
		return r, fmt.Errorf("%w: decrypt: %d bytes", errFrame, len(body))
	}
	r.key, r.input = binary.BigEndian.Uint32(body), body[4:]
	return r, nil
}

// appendRequest appends frameSign or frameDecrypt.
func appendRequest(dst []byte, typ frameType, id uint32, r *signRequest) []byte {
	var head [signHeader]byte
	binary.BigEndian.PutUint32(head[:], r.key)
	n := 4
	if typ == frameSign {
		head[4], head[5] = byte(r.alg.Kind), byte(r.alg.Hash)
		n = signHeader
	}
	dst = binary.BigEndian.AppendUint32(dst, uint32(frameHeader-4+n+len(r.input)))
	dst = append(dst, byte(typ))
	dst = binary.BigEndian.AppendUint32(dst, id)
	dst = append(dst, head[:n]...)
	return append(dst, r.input...)
}
