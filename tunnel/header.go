package tunnel

import (
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net/netip"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/vnet"
)

// A flow's header is
//
//	0      version (u8) = 1
//	1      kind (u8)
//	2..3   length n of the items (u16)
//	4..    items (n bytes)
//
// See SPEC.md, "Flows".
const (
	flowVersion     = 1
	flowHeaderLen   = 4
	maxFlowItemsLen = 1024

	tagVNet     = 0x01 // text
	tagHost     = 0x02 // text
	tagPort     = 0x03 // u16
	tagVisitor  = 0x04 // 4 or 16 bytes of address, u16 port
	tagDeadline = 0x05 // u32, milliseconds
	// since minor version 1
	tagFlowID        = 0x80 // 16 bytes
	tagService       = 0x81 // text
	tagFlowTunnel    = 0x82 // text, to peer edges
	tagFlowConnector = 0x83 // text, to peer edges
	tagClass         = 0x84 // u8, to peer edges
	tagContext       = 0x85 // u32, of flows of packets

	maxVNetLen = 64
	maxHostLen = 253
)

// appendFlow appends the header of f, or says what is wrong with f. forward includes what only peer edges need.
func appendFlow(dst []byte, f Flow, forward bool) ([]byte, error) {
	if f.Kind == 0 {
		f.Kind = KindTCP
	}
	f.Host = canonicalHost(f.Host)
	if err := f.check(); err != nil {
		return dst, err
	}
	start := len(dst)
	dst = append(dst, flowVersion, byte(f.Kind), 0, 0)
	dst = appendItem(dst, tagVNet, string(f.VNet))
	dst = appendItem(dst, tagHost, f.Host)
	if f.Port != 0 {
		dst = append(dst, tagPort, 0, 2, byte(f.Port>>8), byte(f.Port))
	}
	if f.Visitor.IsValid() {
		addr := f.Visitor.Addr().Unmap()
		raw := addr.AsSlice()
		dst = append(dst, tagVisitor, 0, byte(len(raw)+2))
		dst = append(dst, raw...)
		dst = binary.BigEndian.AppendUint16(dst, f.Visitor.Port())
	}
	if f.Deadline > 0 {
		ms := min((f.Deadline+time.Millisecond-1)/time.Millisecond, math.MaxUint32)
		dst = append(dst, tagDeadline, 0, 4)
		dst = binary.BigEndian.AppendUint32(dst, uint32(ms))
	}
	if f.ID != [16]byte{} {
		dst = appendItem(dst, tagFlowID, f.ID[:])
	}
	dst = appendItem(dst, tagService, f.Service)
	if forward {
		dst = appendItem(dst, tagFlowTunnel, f.Tunnel)
		dst = appendItem(dst, tagFlowConnector, f.Connector)
		if f.Class != 0 {
			dst = append(dst, tagClass, 0, 1, byte(f.Class))
		}
	}
	if f.context != 0 {
		dst = append(dst, tagContext, 0, contextIDLen)
		dst = binary.BigEndian.AppendUint32(dst, f.context)
	}
	if n := len(dst) - start - flowHeaderLen; n > maxFlowItemsLen {
		return dst[:start], malformed("flow header of %d bytes, at most %d allowed", n, maxFlowItemsLen)
	}
	binary.BigEndian.PutUint16(dst[start+2:], uint16(len(dst)-start-flowHeaderLen))
	return dst, nil
}

// canonicalHost brings what callers write into the one form that the wire allows.
func canonicalHost(host string) string {
	if addr, err := netip.ParseAddr(host); err == nil && addr.Zone() == "" {
		return addr.Unmap().String()
	}
	return strings.TrimSuffix(strings.ToLower(host), ".")
}

// check reports what keeps f from crossing the wire. Host must be canonical already.
func (f Flow) check() error {
	if f.Kind.carriesPackets() != (f.context != 0) {
		return malformed("flows of packets, and no others, have a context id")
	}
	switch f.Kind {
	case KindTCP, KindUDP:
		if f.Port == 0 {
			return malformed("port is missing")
		}
	case KindICMP:
	case KindIngress, KindIngressUDP:
		return f.checkIngress()
	case kindConfig, kindDevice:
		if f.VNet != "" || f.Host != "" || f.Port != 0 {
			return malformed("a configuration or a device has no destination")
		}
		return nil
	default:
		return fmt.Errorf("flow kind %d is not supported", f.Kind)
	}
	if n := len(f.VNet); n == 0 || n > maxVNetLen {
		return malformed("virtual network id of %d bytes, 1 to %d allowed", n, maxVNetLen)
	}
	for i := range len(f.VNet) {
		if c := f.VNet[i]; c <= ' ' || c > '~' {
			return malformed("virtual network id has a byte 0x%02x", c)
		}
	}
	if err := f.checkTexts(); err != nil {
		return err
	}
	return checkHost(f.Host)
}

// checkIngress checks a flow to a service that the connector's rules choose: whatever has no name has no Host.
func (f Flow) checkIngress() error {
	if f.VNet != "" || f.Port == 0 || f.Service == "" {
		return malformed("ingress needs a port and a service, and has no virtual network")
	}
	if err := f.checkTexts(); err != nil || f.Host == "" {
		return err
	}
	return checkHost(f.Host)
}

func (f Flow) checkTexts() error {
	for _, s := range [...]string{f.Service, f.Tunnel, f.Connector} {
		if err := checkText(s, maxTextLen); err != nil {
			return err
		}
	}
	return nil
}

func checkHost(host string) error {
	if n := len(host); n == 0 || n > maxHostLen {
		return malformed("host of %d bytes, 1 to %d allowed", n, maxHostLen)
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" || addr.Is4In6() || addr.String() != host {
			return malformed("host is not a canonical address")
		}
		return nil
	}
	for i := range len(host) {
		c := host[i]
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == '.' {
			continue
		}
		return malformed("host has a byte 0x%02x", c)
	}
	if host[0] == '.' || host[len(host)-1] == '.' {
		return malformed("host begins or ends with a dot")
	}
	return nil
}

// knownKind reports whether peers of that minor version know the kind.
func knownKind(k FlowKind, minor int) bool {
	switch k {
	case KindTCP:
		return true
	case KindUDP, KindICMP, KindIngress, KindIngressUDP, kindConfig, kindDevice:
		return minor >= 1
	}
	return false
}

// readFlow reads a header from r. buf must hold flowHeaderLen+maxFlowItemsLen bytes. The result is ResultOK, or what to
// answer.
func readFlow(r io.Reader, buf []byte, minor int) (Flow, Result, error) {
	if _, err := io.ReadFull(r, buf[:flowHeaderLen]); err != nil {
		return Flow{}, ResultMalformed, fmt.Errorf("read flow header: %w", err)
	}
	if buf[0] != flowVersion {
		return Flow{}, ResultUnsupported, malformed("flow version %d", buf[0])
	}
	n := int(binary.BigEndian.Uint16(buf[2:]))
	if n > maxFlowItemsLen {
		return Flow{}, ResultMalformed, malformed("flow header of %d bytes, at most %d allowed", n, maxFlowItemsLen)
	}
	if !knownKind(FlowKind(buf[1]), minor) {
		return Flow{}, ResultUnsupported, malformed("flow kind %d", buf[1])
	}
	kind, body := FlowKind(buf[1]), buf[flowHeaderLen:flowHeaderLen+n]
	if _, err := io.ReadFull(r, body); err != nil {
		return Flow{}, ResultMalformed, fmt.Errorf("read flow header: %w", err)
	}
	f, err := parseFlowItems(body)
	if err != nil {
		return Flow{}, ResultMalformed, err
	}
	f.Kind = kind
	if err := f.check(); err != nil {
		return Flow{}, ResultMalformed, err
	}
	return f, ResultOK, nil
}

func parseFlowItems(body []byte) (f Flow, err error) {
	for it := readItems(body, nil); ; {
		tag, v, ok, err := it.next()
		if err != nil || !ok {
			return f, err
		}
		switch tag {
		case tagVNet:
			f.VNet = vnet.ID(v)
		case tagHost:
			f.Host = string(v)
		case tagPort:
			if len(v) != 2 {
				return f, malformed("port of %d bytes", len(v))
			}
			if f.Port = binary.BigEndian.Uint16(v); f.Port == 0 {
				return f, malformed("port 0")
			}
		case tagVisitor:
			if f.Visitor, err = parseAddrPort(v); err != nil {
				return f, err
			}
		case tagDeadline:
			if len(v) != 4 || binary.BigEndian.Uint32(v) == 0 {
				return f, malformed("deadline")
			}
			f.Deadline = time.Duration(binary.BigEndian.Uint32(v)) * time.Millisecond
		case tagFlowID:
			if len(v) != len(f.ID) || [16]byte(v) == f.ID {
				return f, malformed("flow id")
			}
			f.ID = [16]byte(v)
		case tagService:
			f.Service = string(v)
		case tagFlowTunnel:
			f.Tunnel = string(v)
		case tagFlowConnector:
			f.Connector = string(v)
		case tagClass:
			if len(v) != 1 || v[0] == 0 || FlowClass(v[0]) > ClassBulk {
				return f, malformed("flow class")
			}
			f.Class = FlowClass(v[0])
		case tagContext:
			if len(v) != contextIDLen || binary.BigEndian.Uint32(v) == 0 {
				return f, malformed("context id")
			}
			f.context = binary.BigEndian.Uint32(v)
		default:
			if err := unknownItem(tag); err != nil {
				return f, err
			}
		}
	}
}

func parseAddrPort(v []byte) (netip.AddrPort, error) {
	if len(v) != 4+2 && len(v) != 16+2 {
		return netip.AddrPort{}, malformed("visitor of %d bytes", len(v))
	}
	addr, _ := netip.AddrFromSlice(v[:len(v)-2])
	if addr.Is4In6() {
		return netip.AddrPort{}, malformed("visitor is an IPv4-mapped address")
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(v[len(v)-2:])), nil
}
