package tunnel

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// A control frame is
//
//	0      type (u8)
//	1      flags (u8)
//	2..3   length n of the payload (u16)
//	4..    payload (n bytes)
//
// See SPEC.md, "Control stream".
const (
	frameHeaderLen  = 4
	maxFramePayload = 32 << 10
	protocolVersion = 1
	protocolMinor   = 1

	flagSkippable = 0x01

	// pingLen makes the packet of a ping to a peer of minor version 0 larger than a stateless reset.
	pingLen = 32
)

type frameType byte

const (
	frameRegister   frameType = 0x01 // u8 version, items
	frameRegistered frameType = 0x02 // u8 version, items
	frameRefused    frameType = 0x03 // u8 refusal code
	frameDrain      frameType = 0x04 // empty
	frameGoodbye    frameType = 0x05 // u8 close reason
	frameRenew      frameType = 0x06 // u32 id, items
	frameRenewed    frameType = 0x07 // u32 id, u8 refusal code or 0, items
	framePing       frameType = 0x08 // u64 id, padding; skippable
	framePong       frameType = 0x09 // u64 id, padding; skippable; since minor version 1
	frameBulk       frameType = 0x0a // u8 number; skippable; since minor version 1
	frameEdges      frameType = 0x0b // items; skippable; since minor version 1
	frameJoin       frameType = 0x10 // u8 version, items
	frameJoined     frameType = 0x11 // u8 version, items
)

// Items of the certificate frames.
const (
	tagCSR      = 0x01 // DER
	tagCert     = 0x02 // DER, list
	tagTokenID  = 0x03 // text
	tagSecret   = 0x04 // bytes
	tagName     = 0x05 // text
	tagRoots    = 0x06 // PEM
	tagIdentity = 0x07 // text
	tagTunnel   = 0x08 // text
	tagEdge     = 0x09 // text, list
)

func isCertList(tag byte) bool { return tag == tagCert || tag == tagEdge }

// Items of a registration.
const (
	tagInstance = 0x01 // text
	tagIndex    = 0x02 // u8
	tagVersion  = 0x03 // text
	tagHostname = 0x04 // text
	tagArch     = 0x05 // text
	// since minor version 1
	tagMinor       = 0x80 // u8; in registered too
	tagRole        = 0x81 // u8
	tagConnections = 0x82 // u8

	defaultConnections = 4

	maxInstanceLen = 64
	maxTextLen     = 255
	maxIndex       = 255
)

// beginFrame appends a frame's header; endFrame, given what beginFrame returned as start, fills in the length.
func beginFrame(dst []byte, t frameType) (_ []byte, start int) {
	return append(dst, byte(t), 0, 0, 0), len(dst)
}

func endFrame(b []byte, start int) ([]byte, error) {
	n := len(b) - start - frameHeaderLen
	if n > maxFramePayload {
		return nil, fmt.Errorf("control frame 0x%02x of %d bytes, at most %d allowed", b[start], n, maxFramePayload)
	}
	binary.BigEndian.PutUint16(b[start+2:], uint16(n))
	return b, nil
}

// byteFrame is a frame whose payload is p as it is.
func byteFrame(t frameType, p ...byte) []byte {
	b, start := beginFrame(nil, t)
	b, _ = endFrame(append(b, p...), start) // p is a byte or two
	return b
}

type frame struct {
	typ       frameType
	skippable bool
	payload   []byte
}

// deadlineReader is what frames are read from.
type deadlineReader interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// readFrame waits for a frame's first byte as long as it takes (or until the deadline that is set already), and for
// the rest of it within rest. It returns io.EOF only before the first byte.
func readFrame(r deadlineReader, rest time.Duration) (frame, error) {
	var h [frameHeaderLen]byte
	if _, err := io.ReadFull(r, h[:1]); err != nil {
		return frame{}, err
	}
	if rest > 0 {
		if err := r.SetReadDeadline(time.Now().Add(rest)); err != nil {
			return frame{}, err
		}
		defer r.SetReadDeadline(time.Time{}) //nolint:errcheck // the stream is done for if it fails
	}
	if _, err := io.ReadFull(r, h[1:]); err != nil {
		return frame{}, fmt.Errorf("read control frame: %w", unexpectedEOF(err))
	}
	if h[1]&^flagSkippable != 0 {
		return frame{}, malformed("control frame flags 0x%02x", h[1])
	}
	n := int(binary.BigEndian.Uint16(h[2:]))
	if n > maxFramePayload {
		return frame{}, malformed("control frame of %d bytes, at most %d allowed", n, maxFramePayload)
	}
	f := frame{typ: frameType(h[0]), skippable: h[1]&flagSkippable != 0, payload: make([]byte, n)}
	if _, err := io.ReadFull(r, f.payload); err != nil {
		return frame{}, fmt.Errorf("read control frame: %w", unexpectedEOF(err))
	}
	return f, nil
}

func unexpectedEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// splitVersion takes the version off a payload.
func splitVersion(p []byte) ([]byte, error) {
	if len(p) == 0 {
		return nil, malformed("frame without a version")
	}
	if p[0] != protocolVersion {
		return nil, ErrVersion
	}
	return p[1:], nil
}

func appendRegister(dst []byte, r Registration) ([]byte, error) {
	if err := r.check(); err != nil {
		return dst, err
	}
	dst, start := beginFrame(dst, frameRegister)
	dst = append(dst, protocolVersion)
	dst = appendItem(dst, tagInstance, r.Instance)
	dst = appendByte(dst, tagIndex, byte(r.Index))
	dst = appendItem(dst, tagVersion, r.Version)
	dst = appendItem(dst, tagHostname, r.Hostname)
	dst = appendItem(dst, tagArch, r.Arch)
	if r.Minor > 0 {
		dst = appendByte(dst, tagMinor, byte(r.Minor))
		dst = appendByte(dst, tagRole, byte(r.Role))
		if r.Connections != defaultConnections {
			dst = appendByte(dst, tagConnections, byte(r.Connections))
		}
	}
	return endFrame(dst, start)
}

// appendRegistered admits a session.
func appendRegistered(dst []byte, minor int) ([]byte, error) {
	dst, start := beginFrame(dst, frameRegistered)
	dst = appendByte(append(dst, protocolVersion), tagMinor, byte(minor))
	return endFrame(dst, start)
}

// parseRegistered returns the edge's minor version.
func parseRegistered(p []byte) (minor int, err error) {
	if p, err = splitVersion(p); err != nil {
		return 0, err
	}
	for it := readItems(p, nil); ; {
		tag, v, ok, err := it.next()
		if err != nil || !ok {
			return minor, err
		}
		if tag == tagMinor {
			minor, err = parseByte(v)
		} else {
			err = unknownItem(tag)
		}
		if err != nil {
			return 0, err
		}
	}
}

// appendByte appends a number of one byte; zero is absent.
func appendByte(dst []byte, tag, v byte) []byte {
	if v == 0 {
		return dst
	}
	return append(dst, tag, 0, 1, v)
}

func parseByte(v []byte) (int, error) {
	if len(v) != 1 || v[0] == 0 {
		return 0, malformed("number of %d bytes, or zero", len(v))
	}
	return int(v[0]), nil
}

func (r Registration) check() error {
	if r.Instance == "" {
		return malformed("registration without an instance")
	}
	if r.Index < 0 || r.Index > maxIndex {
		return malformed("registration index %d, 0 to %d allowed", r.Index, maxIndex)
	}
	if r.Connections < 0 || r.Connections > 255 || r.Minor < 0 || r.Minor > 255 {
		return malformed("registration with %d connections, minor version %d; 0 to 255 allowed", r.Connections, r.Minor)
	}
	if err := checkText(r.Instance, maxInstanceLen); err != nil {
		return fmt.Errorf("registration: %w", err)
	}
	if r.Role > RoleBulk {
		return malformed("registration with role %d", r.Role)
	}
	for _, s := range [...]string{r.Version, r.Hostname, r.Arch} {
		if err := checkText(s, maxTextLen); err != nil {
			return fmt.Errorf("registration: %w", err)
		}
	}
	return nil
}

func parseRegister(p []byte) (r Registration, err error) {
	if p, err = splitVersion(p); err != nil {
		return r, err
	}
	for it := readItems(p, nil); ; {
		tag, v, ok, err := it.next()
		if err != nil {
			return r, err
		}
		if !ok {
			setDefault(&r.Connections, defaultConnections)
			return r, r.check()
		}
		switch tag {
		case tagInstance:
			r.Instance = string(v)
		case tagIndex:
			r.Index, err = parseByte(v)
		case tagVersion:
			r.Version = string(v)
		case tagHostname:
			r.Hostname = string(v)
		case tagArch:
			r.Arch = string(v)
		case tagMinor:
			r.Minor, err = parseByte(v)
		case tagRole:
			var role int
			role, err = parseByte(v)
			r.Role = Role(role)
		case tagConnections:
			r.Connections, err = parseByte(v)
		default:
			err = unknownItem(tag)
		}
		if err != nil {
			return r, fmt.Errorf("registration: %w", err)
		}
	}
}

// certItems is what the frames renew, renewed, join and joined carry between them.
type certItems struct {
	CSR      []byte
	Chain    [][]byte
	TokenID  string
	Secret   []byte
	Name     string
	Roots    []byte
	Identity string
	Tunnel   string
	Edges    []string
}

func (c *certItems) append(dst []byte) []byte {
	dst = appendItem(dst, tagCSR, c.CSR)
	for _, der := range c.Chain {
		dst = appendItem(dst, tagCert, der)
	}
	dst = appendItem(dst, tagTokenID, c.TokenID)
	dst = appendItem(dst, tagSecret, c.Secret)
	dst = appendItem(dst, tagName, c.Name)
	dst = appendItem(dst, tagRoots, c.Roots)
	dst = appendItem(dst, tagIdentity, c.Identity)
	dst = appendItem(dst, tagTunnel, c.Tunnel)
	for _, e := range c.Edges {
		dst = appendItem(dst, tagEdge, e)
	}
	return dst
}

// parseCertItems accepts the tags named in allowed only.
func parseCertItems(p []byte, allowed ...byte) (c certItems, err error) {
	for it := readItems(p, isCertList); ; {
		tag, v, ok, err := it.next()
		if err != nil || !ok {
			return c, err
		}
		known := false
		for _, a := range allowed {
			known = known || a == tag
		}
		if !known {
			if err := unknownItem(tag); err != nil {
				return c, err
			}
			continue
		}
		if err := c.set(tag, v); err != nil {
			return c, err
		}
	}
}

func (c *certItems) set(tag byte, v []byte) error {
	text := ""
	switch tag {
	case tagCSR:
		c.CSR = v
	case tagCert:
		c.Chain = append(c.Chain, v)
	case tagSecret:
		c.Secret = v
	case tagRoots:
		c.Roots = v
	default:
		text = string(v)
	}
	switch tag {
	case tagTokenID:
		c.TokenID = text
	case tagName:
		c.Name = text
	case tagIdentity:
		c.Identity = text
	case tagTunnel:
		c.Tunnel = text
	case tagEdge:
		c.Edges = append(c.Edges, text)
	}
	return checkText(text, maxTextLen)
}

func appendRenew(dst []byte, id uint32, csr []byte) ([]byte, error) {
	if len(csr) == 0 {
		return dst, malformed("no certificate request")
	}
	dst, start := beginFrame(dst, frameRenew)
	dst = binary.BigEndian.AppendUint32(dst, id)
	dst = (&certItems{CSR: csr}).append(dst)
	return endFrame(dst, start)
}

func parseRenew(p []byte) (id uint32, csr []byte, err error) {
	if len(p) < 4 {
		return 0, nil, malformed("renew cut short")
	}
	c, err := parseCertItems(p[4:], tagCSR)
	if err == nil && len(c.CSR) == 0 {
		err = malformed("renew without a certificate request")
	}
	return binary.BigEndian.Uint32(p), c.CSR, err
}

// appendRenewed answers a renewal: with chain if code is 0, else with code alone.
func appendRenewed(dst []byte, id uint32, code RefusalCode, chain [][]byte) ([]byte, error) {
	if (code == 0) != (len(chain) > 0) {
		return dst, malformed("renewed needs either a chain or a refusal")
	}
	dst, start := beginFrame(dst, frameRenewed)
	dst = binary.BigEndian.AppendUint32(dst, id)
	dst = append(dst, byte(code))
	dst = (&certItems{Chain: chain}).append(dst)
	return endFrame(dst, start)
}

func parseRenewed(p []byte) (id uint32, code RefusalCode, chain [][]byte, err error) {
	if len(p) < 5 {
		return 0, 0, nil, malformed("renewed cut short")
	}
	c, err := parseCertItems(p[5:], tagCert)
	code = RefusalCode(p[4])
	if err == nil && (code == 0) != (len(c.Chain) > 0) {
		err = malformed("renewed needs either a chain or a refusal")
	}
	return binary.BigEndian.Uint32(p), code, c.Chain, err
}

func appendJoin(dst []byte, c certItems) ([]byte, error) {
	dst, start := beginFrame(dst, frameJoin)
	dst = append(dst, protocolVersion)
	dst = (&certItems{CSR: c.CSR, TokenID: c.TokenID, Secret: c.Secret, Name: c.Name}).append(dst)
	return endFrame(dst, start)
}

func parseJoin(p []byte) (c certItems, err error) {
	if p, err = splitVersion(p); err != nil {
		return c, err
	}
	c, err = parseCertItems(p, tagCSR, tagTokenID, tagSecret, tagName)
	if err == nil && (len(c.CSR) == 0 || c.TokenID == "" || len(c.Secret) == 0) {
		err = malformed("join without certificate request, token id or secret")
	}
	return c, err
}

func appendJoined(dst []byte, r JoinReply) ([]byte, error) {
	dst, start := beginFrame(dst, frameJoined)
	dst = append(dst, protocolVersion)
	c := certItems{Chain: r.Chain, Roots: r.Roots, Identity: r.Identity.String(), Tunnel: r.Tunnel, Edges: r.Edges}
	return endFrame(c.append(dst), start)
}

func parseJoined(p []byte) (r JoinReply, err error) {
	if p, err = splitVersion(p); err != nil {
		return r, err
	}
	c, err := parseCertItems(p, tagCert, tagRoots, tagIdentity, tagTunnel, tagEdge)
	if err != nil {
		return r, err
	}
	if len(c.Chain) == 0 || len(c.Roots) == 0 {
		return r, malformed("joined without certificate or roots")
	}
	id, err := mtls.ParseIdentity(c.Identity)
	if err != nil {
		return r, malformed("joined: %v", err)
	}
	for _, e := range c.Edges {
		if _, _, err := net.SplitHostPort(e); err != nil {
			return r, malformed("joined: edge address: %v", err)
		}
	}
	return JoinReply{Chain: c.Chain, Roots: c.Roots, Identity: id, Tunnel: c.Tunnel, Edges: c.Edges}, nil
}
