package audit

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// SyslogConfig says where and how lines go to syslog.
type SyslogConfig struct {
	// Address is "unix:/dev/log" (datagrams), "udp:host:port" or "tcp:host:port". If empty, "unix:/dev/log". Nothing is encrypted: over a network
	// that others can read, send to a local relay that speaks TLS.
	Address string
	// Facility is the number of RFC 5424, section 6.2.1; if zero, 13 (log audit).
	Facility int
	// App is the APP-NAME; if empty, "keyhaven-keyserver".
	App string
}

// syslogTimeout bounds connecting, and writing one message.
const syslogTimeout = 5 * time.Second

// maxDatagram is the size above which a message is not sent as a datagram, in bytes.
const maxDatagram = 60 << 10

type syslogOutput struct {
	network, address string
	facility         int
	app, host        string
	conn             net.Conn
	buf              []byte
}

// Syslog returns an output that sends each line as the MSG of an RFC 5424 message, over TCP with octet counting (RFC 6587, section 3.4.1). It connects when
// there is something to send, and anew after a failure.
func Syslog(c SyslogConfig) (Output, error) {
	if c.Address == "" {
		c.Address = "unix:/dev/log"
	}
	if c.App == "" {
		c.App = "keyhaven-keyserver"
	}
	if c.Facility == 0 {
		c.Facility = 13
	}
	network, address, ok := strings.Cut(c.Address, ":")
	s := &syslogOutput{network: network, address: address, facility: c.Facility, app: headerField(c.App, 48)}
	switch {
	case !ok || address == "":
		return nil, fmt.Errorf("audit: syslog address %q; use unix:/dev/log, udp:host:port or tcp:host:port", c.Address)
	case network == "unix":
		s.network = "unixgram"
	case network == "udp" || network == "tcp":
		if _, _, err := net.SplitHostPort(address); err != nil {
			return nil, fmt.Errorf("audit: syslog address %q: %w", c.Address, err)
		}
	default:
		return nil, fmt.Errorf("audit: syslog address %q; use unix:/dev/log, udp:host:port or tcp:host:port", c.Address)
	}
	if c.Facility < 0 || c.Facility > 23 {
		return nil, fmt.Errorf("audit: syslog facility %d; 0 to 23 are defined", c.Facility)
	}
	host, err := os.Hostname()
	if err != nil {
		host = ""
	}
	s.host = headerField(host, 255)
	return s, nil
}

// headerField returns v as a header field of a message: printable ASCII without spaces, "-" if nothing is left.
func headerField(v string, most int) string {
	v = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return -1
		}
		return r
	}, v)
	if v == "" {
		return "-"
	}
	return v[:min(len(v), most)]
}

// Name implements [Output].
func (s *syslogOutput) Name() string { return "syslog:" + s.network + ":" + s.address }

// Write implements [Output].
func (s *syslogOutput) Write(ctx context.Context, line []byte) error {
	if s.conn == nil {
		d := net.Dialer{Timeout: syslogTimeout}
		conn, err := d.DialContext(ctx, s.network, s.address)
		if err != nil {
			return err
		}
		s.conn = conn
	}
	s.message(line)
	if s.network != "tcp" && len(s.buf) > maxDatagram {
		s.buf = s.buf[:maxDatagram]
	}
	err := s.conn.SetWriteDeadline(time.Now().Add(syslogTimeout))
	if err == nil {
		_, err = s.conn.Write(s.buf)
	}
	if err != nil {
		_ = s.Close() // the write's error is the one that counts
	}
	return err
}

// message puts the message for a line into s.buf.
func (s *syslogOutput) message(line []byte) {
	body := bytes.TrimSuffix(line, []byte{'\n'})
	severity := 6 // informational
	switch kind := kindOf(body); {
	case kind == KindLost, kind == KindRecovered, kind == KindOpen && bytes.Contains(body, []byte(`,"damage":"`)):
		severity = 3 // error
	case kind == KindOp && !bytes.Contains(body, []byte(`,"result":"ok"`)): // quotes in strings are escaped, so no string holds this
		severity = 4 // warning
	}
	b := append(s.buf[:0], '<')
	b = strconv.AppendInt(b, int64(s.facility*8+severity), 10)
	b = append(b, ">1 "...)
	b = time.Now().UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z07:00")
	b = fmt.Appendf(b, " %s %s %d audit - ", s.host, s.app, os.Getpid())
	b = append(b, body...)
	if s.network == "tcp" {
		frame := strconv.AppendInt(make([]byte, 0, len(b)+12), int64(len(b)), 10)
		b = append(append(frame, ' '), b...)
	}
	s.buf = b
}

// kindOf returns the kind of a canonical line without decoding it.
func kindOf(line []byte) Kind {
	_, rest, _ := bytes.Cut(line, []byte(`,"kind":"`))
	kind, _, _ := bytes.Cut(rest, []byte{'"'})
	return Kind(kind)
}

// Close implements [Output].
func (s *syslogOutput) Close() error {
	if s.conn == nil {
		return nil
	}
	err := s.conn.Close()
	s.conn = nil
	return err
}
