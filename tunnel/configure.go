package tunnel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// The stream of a configuration carries, after the flow's header and the connector's result,
//
//	edge:       0..7 version (u64), 8..11 length n of the body (u32), 12.. body (n bytes)
//	connector:  0    0 if applied, 1 if refused; 1..2 length n of the text (u16), 3.. text (n bytes)
//
// See SPEC.md, "Configuration".
const (
	configHeaderLen = 12
	maxConfigLen    = 4 << 20
	maxConfigText   = 8 << 10
	// configTimeout bounds the transfer and DialConfig.OnConfig, each.
	configTimeout = 30 * time.Second
)

// A ConfigError is a connector's refusal of a configuration. The connector goes on with the one before.
type ConfigError struct {
	Version uint64
	// Text says why, in the connector's words.
	Text string
}

// Error implements error.
func (e *ConfigError) Error() string {
	return fmt.Sprintf("tunnel: the connector refuses configuration version %d: %s", e.Version, e.Text)
}

// Configure pushes a configuration of at most 4 MiB to the connector and waits until it is applied. The error is a
// *ConfigError if the connector refuses it, ErrUnsupported if it takes none, and a *FlowError otherwise.
func (s *Session) Configure(ctx context.Context, version uint64, body []byte) error {
	if s.minor < 1 {
		return &FlowError{Result: ResultUnsupported}
	}
	if len(body) > maxConfigLen {
		return fmt.Errorf("tunnel: configuration of %d bytes, at most %d allowed", len(body), maxConfigLen)
	}
	if r := s.beginFlow(); r != ResultOK {
		return &FlowError{Result: r}
	}
	defer s.endFlow()
	st, err := s.open(ctx, Flow{Kind: kindConfig})
	if err != nil {
		return err
	}
	abort := func() {
		st.abortWrite(ResultCancelled)
		st.abortRead(ResultCancelled)
	}
	stop := context.AfterFunc(ctx, abort)
	err = exchangeConfig(st, version, body)
	if !stop() {
		return cancelledError(ctx)
	}
	abort() // does nothing after a clean end
	if _, refused := errors.AsType[*ConfigError](err); err != nil && !refused {
		return flowErrorOf(err)
	}
	return err
}

func exchangeConfig(st stream, version uint64, body []byte) error {
	st.SetDeadline(time.Now().Add(2 * configTimeout)) //nolint:errcheck // Write would fail too
	h := binary.BigEndian.AppendUint64(make([]byte, 0, configHeaderLen), version)
	h = binary.BigEndian.AppendUint32(h, uint32(len(body)))
	if _, err := st.Write(h); err != nil {
		return err
	}
	if _, err := st.Write(body); err != nil {
		return err
	}
	st.closeWrite()
	return readConfigAnswer(st, version)
}

// readConfigAnswer returns a *ConfigError if the connector refuses.
func readConfigAnswer(r io.Reader, version uint64) error {
	var answer [3]byte
	if _, err := io.ReadFull(r, answer[:]); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint16(answer[1:]))
	if n > maxConfigText || answer[0] > 1 {
		return malformed("answer to a configuration")
	}
	text := make([]byte, n)
	if _, err := io.ReadFull(r, text); err != nil {
		return err
	}
	if answer[0] == 0 {
		return nil
	}
	return &ConfigError{Version: version, Text: printable(string(text))}
}

// printable takes out what a terminal would act upon.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 || r >= 0x200e && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// serveConfig takes one configuration.
func (s *server) serveConfig(ctx context.Context, in *Incoming) {
	if s.onConfig == nil {
		in.Reject(ResultUnsupported) //nolint:errcheck // the edge has gone, then
		return
	}
	s.configMu.Lock()
	defer s.configMu.Unlock()
	c, err := in.Accept()
	if err != nil {
		return
	}
	defer c.Close()                                  //nolint:errcheck // always nil
	c.SetReadDeadline(time.Now().Add(configTimeout)) //nolint:errcheck // Read would fail too
	version, body, err := readConfig(c)
	if err != nil {
		s.log.Warn("configuration not received", "err", err)
		in.conn.Reset(ResultMalformed)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, configTimeout)
	defer cancel()
	err = s.onConfig(ctx, version, body)
	c.SetWriteDeadline(time.Now().Add(controlWriteTimeout)) //nolint:errcheck // Write would fail too
	c.Write(configAnswer(err))                              //nolint:errcheck // the edge has gone, then
	c.CloseWrite()                                          //nolint:errcheck // the edge has gone, then
}

func configAnswer(err error) []byte {
	if err == nil {
		return []byte{0, 0, 0}
	}
	text := err.Error()
	text = text[:min(len(text), maxConfigText)]
	return append([]byte{1, byte(len(text) >> 8), byte(len(text))}, text...)
}

// readConfig reads a configuration and makes sure that nothing follows it.
func readConfig(r io.Reader) (version uint64, body []byte, err error) {
	var h [configHeaderLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[8:])
	if n > maxConfigLen {
		return 0, nil, malformed("configuration of %d bytes, at most %d allowed", n, maxConfigLen)
	}
	body, err = io.ReadAll(io.LimitReader(r, int64(n)+1)) // grows with what comes
	if err == nil && len(body) != int(n) {
		err = malformed("configuration of %d bytes where %d were told", len(body), n)
	}
	return binary.BigEndian.Uint64(h[:]), body, err
}

// AskBulk tells the connector how many bulk sessions the edge wants now, 0 to 255. It does nothing on a session of minor
// version 0, and may be repeated.
func (s *Session) AskBulk(n int) {
	s.sendOptional(byteFrame(frameBulk, byte(min(max(n, 0), 255))))
}

// TellEdges tells the connector the addresses, as host:port, of all edges of the installation; at most 120, the rest is
// left out. It does nothing on a session of minor version 0.
func (s *Session) TellEdges(addrs []string) {
	b, start := beginFrame(nil, frameEdges)
	b = (&certItems{Edges: addrs[:min(len(addrs), maxEdges)]}).append(b)
	b, err := endFrame(b, start)
	if err != nil {
		s.log.Error("edges not told", "err", err)
		return
	}
	s.sendOptional(b)
}

// maxEdges times maxTextLen fits into a frame.
const maxEdges = 120

// sendOptional sends a frame that peers may skip, without waiting for long.
func (s *Session) sendOptional(b []byte) {
	if s.minor < 1 {
		return
	}
	b[1] = flagSkippable
	s.send(context.Background(), b) //nolint:errcheck // the session has ended, then
}

func parseEdges(p []byte) ([]string, error) {
	c, err := parseCertItems(p, tagEdge)
	if err != nil {
		return nil, err
	}
	for _, e := range c.Edges {
		if _, _, err := net.SplitHostPort(e); err != nil {
			return nil, malformed("edge address: %v", err)
		}
	}
	return c.Edges, nil
}
