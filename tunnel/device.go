package tunnel

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// The stream of a device carries, after the flow's header and the connector's result, in both directions
//
//	0..1 length n (u16), 2.. n bytes
//
// and FIN: the edge's directive, then the connector's report. See SPEC.md, "Device".
const (
	deviceHeaderLen = 2
	maxDeviceLen    = 4 << 10
	// deviceTimeout bounds an exchange for the edge, and each direction of it for the connector.
	deviceTimeout = 10 * time.Second
)

// Device tells the connector what is wanted of the device that it runs on, and returns what it knows of that device; both
// take at most 4 KiB, and either may be empty. What they mean is for others to say. The error is ErrUnsupported if the
// connector knows of no device, and a *FlowError otherwise.
func (s *Session) Device(ctx context.Context, directive []byte) (report []byte, err error) {
	if s.minor < 1 {
		return nil, &FlowError{Result: ResultUnsupported}
	}
	if len(directive) > maxDeviceLen {
		return nil, fmt.Errorf("tunnel: directive of %d bytes, at most %d allowed", len(directive), maxDeviceLen)
	}
	if r := s.beginFlow(); r != ResultOK {
		return nil, &FlowError{Result: r}
	}
	defer s.endFlow()
	st, err := s.open(ctx, Flow{Kind: kindDevice})
	if err != nil {
		return nil, err
	}
	abort := func() {
		st.abortWrite(ResultCancelled)
		st.abortRead(ResultCancelled)
	}
	stop := context.AfterFunc(ctx, abort)
	report, err = exchangeDevice(st, directive)
	if !stop() {
		return nil, cancelledError(ctx)
	}
	abort() // does nothing after a clean end
	if err != nil {
		return nil, flowErrorOf(err)
	}
	return report, nil
}

func exchangeDevice(st stream, directive []byte) (report []byte, err error) {
	st.SetDeadline(time.Now().Add(deviceTimeout)) //nolint:errcheck // Write would fail too
	if _, err := st.Write(appendDevice(directive)); err != nil {
		return nil, err
	}
	st.closeWrite()
	return readDevice(st)
}

func appendDevice(b []byte) []byte {
	return append(binary.BigEndian.AppendUint16(make([]byte, 0, deviceHeaderLen+len(b)), uint16(len(b))), b...)
}

// readDevice reads one side's bytes and makes sure that nothing follows them.
func readDevice(r io.Reader) ([]byte, error) {
	var h [deviceHeaderLen]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, unexpectedEOF(err)
	}
	n := int(binary.BigEndian.Uint16(h[:]))
	if n > maxDeviceLen {
		return nil, malformed("%d bytes about a device, at most %d allowed", n, maxDeviceLen)
	}
	b, err := io.ReadAll(io.LimitReader(r, int64(n)+1)) // grows with what comes
	if err == nil && len(b) != n {
		err = malformed("%d bytes about a device where %d were told", len(b), n)
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// serveDevice takes one directive and answers with the report.
func (s *server) serveDevice(in *Incoming) {
	if s.onDevice == nil {
		in.Reject(ResultUnsupported) //nolint:errcheck // the edge has gone, then
		return
	}
	c, err := in.Accept()
	if err != nil {
		return
	}
	defer c.Close()                                  //nolint:errcheck // always nil
	c.SetReadDeadline(time.Now().Add(deviceTimeout)) //nolint:errcheck // Read would fail too
	directive, err := readDevice(c)
	if err != nil {
		s.log.Warn("directive not received", "err", err)
		in.conn.Reset(ResultMalformed)
		return
	}
	report := s.onDevice(directive)
	if len(report) > maxDeviceLen {
		s.log.Error("report of the device not sent, it is too long", "bytes", len(report))
		in.conn.Reset(ResultInternal)
		return
	}
	c.SetWriteDeadline(time.Now().Add(controlWriteTimeout)) //nolint:errcheck // Write would fail too
	c.Write(appendDevice(report))                           //nolint:errcheck // the edge has gone, then
	c.CloseWrite()                                          //nolint:errcheck // the edge has gone, then
}
