package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// server is the worker's side of the socket.
type server struct {
	out  *frameWriter
	open chan openRequest // what the pool asks for first
	jobs chan *job        // in the order of their ids; closed by read when the pool says that it is enough

	deadline time.Duration
	slots    []*slot
	busy     atomic.Uint64 // rises with each job: shows idleness

	// What follows belongs to read until ready is closed by work.
	ready chan struct{}
	token *pkcs11.Token
	keys  map[uint32]signer.Key // by number; belongs to read
	told  bool                  // that it is enough; belongs to read

	mu        sync.Mutex // guards what follows
	leaves    map[uint32]chan leaveReply
	lastLeave uint32
	taken     uint32              // the id of the last job that was taken
	cancelled map[uint32]struct{} // ids of jobs that were not taken when they were cancelled
}

// job is one request. Jobs are used again.
type job struct {
	typ   frameType
	id    uint32 // 0: nobody waits for the result
	key   signer.Key
	alg   signer.Algorithm
	input []byte
}

var jobs = sync.Pool{New: func() any { return new(job) }}

// slot is one of the goroutines that call the module.
type slot struct {
	began atomic.Int64 // when the job was taken up, since start; 0 if there is none or it waits for leave to log in
	id    atomic.Uint32
	told  atomic.Bool // that the job is stuck
}

func (sl *slot) begin(id uint32) {
	sl.id.Store(id)
	sl.told.Store(false)
	sl.began.Store(sinceStart())
}

func (sl *slot) end() { sl.began.Store(0) }

// start is what times are measured from, on the monotonic clock.
var start = time.Now()

func sinceStart() int64 { return int64(time.Since(start)) + 1 }

// leaveReply is the pool's answer to a request for leave.
type leaveReply struct {
	unproven bool
	err      error
}

// How leave is given, the first byte of frameLeave's body.
const (
	leaveGiven byte = iota
	leaveUnproven
	leaveDenied
)

func newServer() *server {
	return &server{
		out: newFrameWriter(), open: make(chan openRequest, 1), jobs: make(chan *job, maxInFlight+8), ready: make(chan struct{}),
		keys: map[uint32]signer.Key{}, leaves: map[uint32]chan leaveReply{}, cancelled: map[uint32]struct{}{},
	}
}

// read reads frames until the pool says that it is enough. When the socket ends, so does the process, whatever the module does.
func (s *server) read(conn io.Reader) {
	r := newFrameReader(conn)
	for {
		f, err := r.next()
		if err == nil {
			err = s.handle(f)
		}
		if errors.Is(err, errFrame) {
			fmt.Fprintf(os.Stderr, "worker: %v\n", err)
			os.Exit(exitFailed)
		}
		if err != nil {
			os.Exit(exitTold)
		}
	}
}

// handle acts on one frame. It does not block.
func (s *server) handle(f frame) error {
	switch f.typ {
	case frameOpen:
		var r openRequest
		if err := decodeJSON("open", f.body, &r); err != nil {
			return err
		}
		select {
		case s.open <- r:
			return nil
		default:
			return fmt.Errorf("%w: open comes twice", errFrame)
		}
	case frameLeave:
		return s.handleLeave(f)
	case frameQuit:
		if !s.told {
			s.told = true
			close(s.jobs)
		}
		return nil
	case frameCancel:
		s.cancel(f.id)
		return nil
	}
	if !s.isReady() {
		return fmt.Errorf("%w: type %d before the worker was ready", errFrame, f.typ)
	}
	return s.handleWork(f)
}

func (s *server) isReady() bool {
	select {
	case <-s.ready:
		return true
	default:
		return false
	}
}

func (s *server) handleWork(f frame) error {
	var r signRequest
	var err error
	switch f.typ {
	case frameKey:
		d, err := pkcs11.ParseDescription(f.body)
		if err != nil {
			return fmt.Errorf("%w: %w", errFrame, err)
		}
		s.keys[f.id] = s.token.Adopt(d)
		return nil
	case frameSign:
		r, err = decodeSign(f.body)
	case frameDecrypt:
		r, err = decodeDecrypt(f.body)
	case frameList, frameCheck:
	default:
		err = fmt.Errorf("%w: unknown type %d", errFrame, f.typ)
	}
	if err != nil {
		return err
	}
	j := jobs.Get().(*job)
	j.typ, j.id, j.alg = f.typ, f.id, r.alg
	j.key, j.input = nil, append(j.input[:0], r.input...)
	if f.typ == frameSign || f.typ == frameDecrypt {
		if j.key = s.keys[r.key]; j.key == nil {
			return fmt.Errorf("%w: unknown key %d", errFrame, r.key)
		}
	}
	return s.enqueue(j)
}

func (s *server) enqueue(j *job) error {
	if s.told {
		return fmt.Errorf("%w: an operation after quit", errFrame)
	}
	select {
	case s.jobs <- j:
		return nil
	default:
		// The pool has given up operations that are still queued here.
		s.out.send(frameError, j.id, encodeError(fmt.Errorf("%w: the worker is behind", signer.ErrOverloaded)))
		jobs.Put(j)
		return nil
	}
}

// work serves until jobs is closed.
func (s *server) work(ctx context.Context, token *pkcs11.Token, r *openRequest) {
	s.token = token
	n := token.Sessions()
	// A thread that is inside the module keeps its processor until the runtime notices. With more processors than the machine has, nobody waits
	// for that; with one for each session the idle ones cost more than they bring, where the module computes.
	runtime.GOMAXPROCS(max(n/2+1, runtime.GOMAXPROCS(0)))
	for range n + 1 { // the last is the keep-alive's
		s.slots = append(s.slots, &slot{})
	}
	close(s.ready)
	s.out.send(frameReady, 0, encodeJSON(readyReply{Token: token.Name(), Sessions: n}))
	done := make(chan struct{})
	var watching, working sync.WaitGroup
	watching.Go(func() { s.watch(done) })
	if r.KeepAlive > 0 {
		watching.Go(func() { s.keepAlive(ctx, r.KeepAlive, done) })
	}
	for _, sl := range s.slots[:n] {
		working.Go(func() { s.slotLoop(context.WithValue(ctx, slotKey{}, sl), sl) })
	}
	working.Wait()
	close(done)
	watching.Wait()
}

// slotKey finds the slot in the context of its jobs.
type slotKey struct{}

func (s *server) slotLoop(ctx context.Context, sl *slot) {
	for j := range s.jobs {
		if s.take(j.id) {
			sl.begin(j.id)
			s.do(ctx, j)
			sl.end()
		}
		j.key = nil
		if cap(j.input) <= 4096 {
			jobs.Put(j)
		}
	}
}

// take records that a job is taken up. It is false if nobody wants it any more.
func (s *server) take(id uint32) bool {
	s.busy.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != 0 && int32(id-s.taken) > 0 {
		s.taken = id
	}
	if _, no := s.cancelled[id]; no {
		delete(s.cancelled, id)
		return false
	}
	return true
}

// cancel records that nobody waits for the result of a job, if it has not been taken yet. Nobody wants a reply either.
func (s *server) cancel(id uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id != 0 && int32(id-s.taken) > 0 && len(s.cancelled) < maxInFlight {
		s.cancelled[id] = struct{}{}
	}
}

func (s *server) do(ctx context.Context, j *job) {
	var out []byte
	var err error
	switch j.typ {
	case frameSign:
		out, err = j.key.Sign(ctx, j.alg, j.input)
	case frameDecrypt:
		d, ok := j.key.(signer.Decrypter)
		if !ok {
			err = pkcs11.ErrUnsupported
			break
		}
		out, err = d.DecryptRaw(ctx, j.input)
	case frameList:
		err = s.list(ctx, j.id)
	case frameCheck:
		err = s.token.Check(ctx)
	}
	switch {
	case err != nil:
		s.out.send(frameError, j.id, encodeError(err))
	case j.id != 0:
		s.out.send(frameDone, j.id, out)
	}
	if j.typ == frameDecrypt {
		clear(out)
	}
}

// list sends the keys of the token.
func (s *server) list(ctx context.Context, id uint32) error {
	keys, err := s.token.Keys(ctx)
	if err != nil {
		return err
	}
	for _, k := range keys {
		d, err := pkcs11.Describe(k)
		if err != nil {
			return err
		}
		b, err := d.MarshalBinary()
		if err != nil {
			return err
		}
		s.out.send(frameListed, id, b)
	}
	return nil
}

// watch tells the pool of jobs that are past their deadline, and that the worker is alive while it has jobs.
func (s *server) watch(done <-chan struct{}) {
	tick := time.NewTicker(min(max(s.deadline/8, 5*time.Millisecond), 250*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-done:
			return
		case <-tick.C:
		}
		busy := false
		for _, sl := range s.slots {
			began := sl.began.Load()
			if began == 0 {
				continue
			}
			busy = true
			age := time.Duration(sinceStart() - began)
			if age > s.deadline && !sl.told.Swap(true) {
				s.out.send(frameStuck, sl.id.Load())
			}
			if age > 2*s.deadline+closeWait {
				os.Exit(exitStuck)
			}
		}
		if busy {
			s.out.send(framePulse, 0)
		}
	}
}

// keepAlive asks the token whether the login stands whenever there was nothing to do for a while.
func (s *server) keepAlive(ctx context.Context, every time.Duration, done <-chan struct{}) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	sl := s.slots[len(s.slots)-1]
	ctx = context.WithValue(ctx, slotKey{}, sl)
	last := s.busy.Load()
	for {
		select {
		case <-done:
			return
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := s.busy.Load()
		if now != last {
			last = now
			continue
		}
		sl.begin(0)
		if err := s.token.Check(ctx); err != nil {
			s.out.send(frameError, 0, encodeError(err))
		}
		sl.end()
	}
}

// leave asks the pool for leave to log in. The time that this takes does not count against a job's deadline.
func (s *server) leave(ctx context.Context) (pkcs11.Leave, error) {
	if sl, ok := ctx.Value(slotKey{}).(*slot); ok {
		sl.began.Store(0)
		defer func() { sl.began.Store(sinceStart()) }()
	}
	answer := make(chan leaveReply, 1)
	s.mu.Lock()
	s.lastLeave++
	id := s.lastLeave
	s.leaves[id] = answer
	s.mu.Unlock()
	s.out.send(frameAsk, id)
	select {
	case reply := <-answer:
		if reply.err != nil {
			return pkcs11.Leave{}, reply.err
		}
		return pkcs11.Leave{Unproven: reply.unproven, Done: func(err error) {
			var body []byte
			if err != nil {
				body = encodeError(err)
			}
			s.out.send(frameLogin, id, body)
		}}, nil
	case <-ctx.Done():
		return pkcs11.Leave{}, context.Cause(ctx)
	}
}

func (s *server) handleLeave(f frame) error {
	if len(f.body) == 0 {
		return fmt.Errorf("%w: leave without an answer", errFrame)
	}
	reply := leaveReply{unproven: f.body[0] == leaveUnproven}
	if f.body[0] == leaveDenied {
		denied, err := decodeError(f.body[1:])
		if err != nil {
			return err
		}
		reply.err = denied
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	answer := s.leaves[f.id]
	if answer == nil {
		return fmt.Errorf("%w: leave that was not asked for", errFrame)
	}
	delete(s.leaves, f.id)
	answer <- reply
	return nil
}

// progress counts the deadline anew: each step of a long job has its own.
func (s *server) progress(ctx context.Context) {
	if sl, ok := ctx.Value(slotKey{}).(*slot); ok {
		sl.began.Store(sinceStart())
	}
}
