package keyless

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

var (
	// errNotSent says that no byte of a request left: any operation may be sent again.
	errNotSent = errors.New("request was not sent")
	// errBroken says that the connection broke while a request was in flight.
	errBroken = errors.New("connection broke")
	// errDraining says that what carries the connection wants to end.
	errDraining = errors.New("connection is drained")
	// errSilent says that what carries the connection has most likely died.
	errSilent = errors.New("nothing was heard of what carries the connection")
)

// quiescePoll is how often a connection that is given up is looked at for requests in flight.
const quiescePoll = 5 * time.Millisecond

// suspectPoll is how often a Suspecter is asked.
const suspectPoll = 100 * time.Millisecond

// quietPolls is how many times suspectPoll a request is in flight, and nothing comes, before it may be waited for in vain: what
// carries the connection may have died after it had acknowledged the request, and then owes nothing.
const quietPolls = 3

// clientWriteTimeout bounds one batch of requests.
const clientWriteTimeout = 5 * time.Second

// lastWords is how long a connection is read whose peer takes nothing any more.
const lastWords = 250 * time.Millisecond

// A session is one connection of a client with its reader and writer, from the handshake to its end.
type session struct {
	conn     net.Conn
	raw      net.Conn
	reader   *frameReader
	writer   *batchWriter
	inFlight atomic.Int64    // places reserved by pick
	received atomic.Uint64   // packets read
	suspect  atomic.Bool     // a request timed out and nothing was read since
	prod     chan struct{}   // capacity 1; asks watch for a ping now
	draining <-chan struct{} // see Drainer; nil if the connection is none
	broken   chan struct{}   // closed when reading or writing failed
	helpers  sync.WaitGroup
	pool     sync.Pool   // of *call
	dead     atomic.Bool // err is set, or about to be

	mu     sync.Mutex // guards the rest
	calls  map[uint32]*call
	nextID uint32
	err    error // set once, when the session broke
}

// A call is a request in flight. It is out of the map before it is done, so each is finished exactly once.
type call struct {
	seq     uint64 // of its packet in the writer
	opcode  Opcode
	payload []byte
	err     error
	done    chan struct{} // capacity 1
}

// newSession starts the goroutines of a connection that may have maxInFlight requests in flight. That many packets of the
// usual size, twice over, may wait to be written.
func newSession(conn, raw net.Conn, maxInFlight int) *session {
	s := &session{
		conn: conn, raw: raw,
		reader: newFrameReader(conn),
		writer: newBatchWriter(conn, clientWriteTimeout, 2*padTo*(maxInFlight+1)),
		prod:   make(chan struct{}, 1),
		broken: make(chan struct{}),
		calls:  map[uint32]*call{},
	}
	if d, ok := raw.(Drainer); ok {
		s.draining = d.Draining()
	}
	s.pool.New = func() any { return &call{done: make(chan struct{}, 1)} }
	s.helpers.Go(func() { s.fail(s.read()) })
	s.helpers.Go(func() {
		if err := s.writer.run(); err != nil {
			s.awaitLastWords(err)
			s.fail(err)
		}
	})
	return s
}

// quiesce waits until no request is in flight, for timeout at most or until ctx ends.
func (s *session) quiesce(ctx context.Context, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(quiescePoll)
	defer tick.Stop()
	for s.inFlight.Load() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-s.broken:
			return
		case <-tick.C:
		}
	}
}

// end closes the session and waits for its goroutines. Requests in flight fail with cause.
func (s *session) end(cause error) {
	s.fail(cause)
	s.helpers.Wait()
}

// awaitLastWords lets read find what the server said before it closed: replies, or the alert that refuses the
// certificate. A write fails with err at once, and what came before that is still to be read.
func (s *session) awaitLastWords(err error) {
	s.dead.Store(true) // for new requests
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
		return
	}
	select {
	case <-s.broken:
	case <-time.After(lastWords):
	}
}

// fail breaks the session once and finishes its requests.
func (s *session) fail(cause error) {
	s.mu.Lock()
	if s.err != nil {
		s.mu.Unlock()
		return
	}
	if cause == nil {
		cause = net.ErrClosed
	}
	s.err = cause
	s.dead.Store(true)
	orphans := s.calls
	s.calls = nil
	s.mu.Unlock()

	s.writer.fail(net.ErrClosed)
	close(s.broken)
	s.raw.Close()
	for _, c := range orphans {
		if s.writer.wasHanded(c.seq) {
			c.err = fmt.Errorf("%w: %w", errBroken, cause)
		} else {
			c.err = fmt.Errorf("%w: %w", errNotSent, cause)
		}
		c.done <- struct{}{}
	}
}

// roundTrip sends op and waits for its reply, whose payload is the caller's. It gives back the place that pick reserved.
func (s *session) roundTrip(ctx context.Context, timeout <-chan time.Time, op *Operation) ([]byte, error) {
	defer s.inFlight.Add(-1)
	id, c, err := s.send(op)
	if err != nil {
		return nil, err
	}
	before := s.received.Load()
	select {
	case <-c.done:
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-timeout:
		err = context.DeadlineExceeded
	}
	if err != nil {
		if s.forget(id) {
			s.pool.Put(c)
			if s.received.Load() == before && errors.Is(err, context.DeadlineExceeded) {
				s.doubt()
			}
			return nil, err
		}
		<-c.done // it is being finished at this moment
	}
	payload, err := c.payload, c.err
	c.payload, c.err = nil, nil
	s.pool.Put(c)
	return payload, err
}

// send registers op and queues its packet.
func (s *session) send(op *Operation) (uint32, *call, error) {
	c := s.pool.Get().(*call)
	c.opcode = op.Opcode
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		s.pool.Put(c)
		return 0, nil, fmt.Errorf("%w: %w", errNotSent, s.err)
	}
	id := s.nextID
	for s.calls[id] != nil {
		id++
	}
	s.nextID = id + 1
	p := Packet{Major: major, Minor: minor, ID: id, Operation: *op, Compact: compact(op)}
	seq, err := s.writer.add(&p, false)
	if err != nil {
		s.pool.Put(c)
		switch {
		case errors.Is(err, errFull):
			return 0, nil, ErrOverloaded
		case errors.Is(err, ErrFormat):
			return 0, nil, err
		}
		return 0, nil, fmt.Errorf("%w: %w", errNotSent, err)
	}
	c.seq = seq
	s.calls[id] = c
	return id, c, nil
}

// forget takes a call out of the map and reports whether it was still there.
func (s *session) forget(id uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.calls[id]
	delete(s.calls, id)
	return ok
}

// doubt marks a session on which a request timed out with no sign of life, and has it pinged.
func (s *session) doubt() {
	s.suspect.Store(true)
	s.pingSoon()
}

// read finishes calls with the replies that come in, in whatever order. Replies that nobody waits for are dropped.
func (s *session) read() error {
	for {
		h, body, err := s.reader.next()
		if err != nil {
			return err
		}
		if h.Major != major {
			return fmt.Errorf("keyless: reply of major version %d", h.Major)
		}
		op, err := ParseBody(body)
		if err != nil {
			return err
		}
		s.received.Add(1)
		if s.suspect.Load() {
			s.suspect.Store(false)
		}
		s.mu.Lock()
		c := s.calls[h.ID]
		delete(s.calls, h.ID)
		s.mu.Unlock()
		if c == nil {
			continue
		}
		c.payload, c.err = c.result(&op)
		c.done <- struct{}{}
	}
}

// result turns a reply into what Do returns.
func (c *call) result(op *Operation) ([]byte, error) {
	switch {
	case op.Opcode == OpError && len(op.Payload) == 1:
		return nil, &Error{ErrorCode(op.Payload[0])}
	case op.Opcode == OpResponse && c.opcode != OpPing, op.Opcode == OpPong && c.opcode == OpPing:
		return append([]byte(nil), op.Payload...), nil
	}
	return nil, fmt.Errorf("keyless: %s with a payload of %d bytes is no reply to %s", op.Opcode, len(op.Payload), c.opcode)
}

// ping sends a ping and waits for any sign of life.
func (s *session) ping(ctx context.Context) error {
	s.inFlight.Add(1)
	_, err := s.roundTrip(ctx, nil, &Operation{Opcode: OpPing})
	return err
}

// watch pings the server each heartbeat, and when a request found it silent. It returns what ended the session: a
// failure, silence for timeout after a ping, errDraining, errSilent, or ctx. A server that is too busy to answer the ping but
// sends replies is alive. Over a Suspecter quiet is called, once for each silence, when nothing has come for quietPolls while a
// request is in flight.
func (s *session) watch(ctx context.Context, heartbeat, timeout time.Duration, quiet func()) error {
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	var ask <-chan time.Time // nil if nobody can be asked
	path, ok := s.raw.(Suspecter)
	if ok {
		t := time.NewTicker(suspectPoll)
		defer t.Stop()
		ask = t.C
	}
	pings, cancel := context.WithCancel(ctx)
	var pinging sync.WaitGroup
	defer pinging.Wait()
	defer cancel()
	pinged := make(chan error, 1)
	underWay, polls, last := false, 0, s.received.Load()
	for {
		select {
		case <-ctx.Done():
			return ErrClosed
		case <-s.broken:
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.err
		case <-s.draining:
			return errDraining
		case err := <-pinged:
			if err != nil {
				return err
			}
			underWay = false
			continue
		case <-ask:
			if path.Suspect() {
				return errSilent
			}
			if n := s.received.Load(); n != last || s.inFlight.Load() == 0 {
				polls, last = 0, n
			} else if polls++; polls == quietPolls {
				quiet()
			}
			continue
		case <-tick.C:
		case <-s.prod:
		}
		if !underWay {
			underWay = true
			pinging.Go(func() { pinged <- s.alive(pings, timeout) })
		}
	}
}

// alive pings the server and waits, for timeout at most, for any sign of life.
func (s *session) alive(ctx context.Context, timeout time.Duration) error {
	before := s.received.Load()
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := s.ping(limited); err != nil && ctx.Err() == nil && s.received.Load() == before {
		return fmt.Errorf("keyless: ping: %w", err)
	}
	return nil
}

// pingSoon has watch ping the server, unless a ping is under way. It never blocks.
func (s *session) pingSoon() {
	select {
	case s.prod <- struct{}{}:
	default:
	}
}
