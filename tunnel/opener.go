package tunnel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

// An opener is the side of a session that opens flows: the edge towards connectors, and the dialler towards a peer edge.
type opener struct {
	*session
	forwards bool // flows carry what only peer edges need
}

// Open opens a flow and waits for the peer's answer, or until ctx ends. If f.Deadline is zero and ctx has a deadline, the
// peer is told to keep it. The error is a *FlowError.
func (s opener) Open(ctx context.Context, f Flow) (Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, cancelledError(ctx)
	}
	if s.Err() != nil {
		return nil, &FlowError{Result: ResultSessionLost, Err: s.Err()}
	}
	if r := s.beginFlow(); r != ResultOK {
		return nil, &FlowError{Result: r}
	}
	st, err := s.open(ctx, f)
	if err != nil {
		s.endFlow()
		return nil, err
	}
	return &flowConn{stream: st, s: s.session, local: s.LocalAddr(), remote: flowAddr{canonicalHost(f.Host), f.Port}}, nil
}

// open opens a stream for f and waits for the result. The caller counts the flow.
func (s opener) open(ctx context.Context, f Flow) (stream, error) {
	if deadline, ok := ctx.Deadline(); ok && f.Deadline <= 0 {
		f.Deadline = max(time.Until(deadline), time.Millisecond)
	}
	buf := headerBuffers.Get().(*[flowHeaderLen + maxFlowItemsLen]byte)
	defer headerBuffers.Put(buf)
	if f.Kind != 0 && !knownKind(f.Kind, s.minor) {
		return nil, &FlowError{Result: ResultUnsupported, Err: fmt.Errorf("the peer's minor version is %d", s.minor)}
	}
	header, err := appendFlow(buf[:0], f, s.forwards)
	if err != nil {
		return nil, &FlowError{Result: ResultMalformed, Err: err}
	}
	st, err := s.car.openStream()
	if err != nil {
		if errors.Is(err, errStreamLimit) {
			return nil, &FlowError{Result: ResultLimit, Err: err}
		}
		return nil, &FlowError{Result: ResultSessionLost, Err: err}
	}
	abort := func() {
		st.abortWrite(ResultCancelled)
		st.abortRead(ResultCancelled)
	}
	stop := context.AfterFunc(ctx, abort)
	s.expect()
	r, err := exchangeHeader(st, header, buf[:1])
	if !stop() {
		return nil, cancelledError(ctx)
	}
	if err == nil && r == ResultOK {
		return st, nil
	}
	abort()
	if err == nil {
		return nil, &FlowError{Result: r, Remote: true}
	}
	return nil, flowErrorOf(err)
}

// exchangeHeader sends a flow's header and reads the result into b, which may share the header's memory.
func exchangeHeader(st stream, header, b []byte) (Result, error) {
	if _, err := st.Write(header); err != nil {
		return 0, err
	}
	if _, err := io.ReadFull(st, b); err != nil {
		return 0, err
	}
	return Result(b[0]), nil
}

// cancelledError is the error of a flow whose context ended before it was open.
func cancelledError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &FlowError{Result: ResultTimedOut, Err: context.Cause(ctx)}
	}
	return &FlowError{Result: ResultCancelled, Err: context.Cause(ctx)}
}

// flowErrorOf makes a stream's failure before the result a *FlowError.
func flowErrorOf(err error) error {
	if _, ok := errors.AsType[*FlowError](err); ok {
		return err
	}
	if err == io.EOF {
		return &FlowError{Result: ResultInternal, Remote: true, Err: io.ErrUnexpectedEOF}
	}
	return &FlowError{Result: ResultReset, Err: err}
}
