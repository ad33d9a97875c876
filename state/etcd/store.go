package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyhaven/keyhaven/state"
)

// store implements state.Store. A revision is the cluster's own, so that it rises by more than one between transactions
// of ours where others use the cluster too.
type store struct {
	c                       *clientv3.Client
	prefix                  string
	timeout                 time.Duration
	where                   string // the endpoints, for errors
	queueEvents, queueBytes int

	seen     atomic.Int64    // the highest revision that the cluster has told
	life     context.Context // ends with Close
	end      context.CancelFunc
	mu       sync.Mutex // guards closed, and watchers.Add against Close
	closed   bool
	watchers sync.WaitGroup
	done     chan struct{} // closed when Close has finished
	closeErr error
}

func open(cfg Config, queueEvents, queueBytes int) (*store, error) {
	cc, err := cfg.client()
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	s := &store{prefix: cfg.prefix(), timeout: cfg.Timeout, where: hosts(cfg.Endpoints), queueEvents: queueEvents, queueBytes: queueBytes,
		done: make(chan struct{})}
	s.life, s.end = context.WithCancel(context.Background())
	if s.c, err = clientv3.New(cc); err != nil {
		err = s.explain(context.Background(), "connect", err)
		s.end()
		return nil, err
	}
	if _, err := s.get(context.Background(), s.prefix, clientv3.WithPrefix(), clientv3.WithCountOnly()); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// bounded is ctx with the time that a request may take; it also ends with the store.
func (s *store) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), s.timeout)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() { stop(); cancel() }
}

func (s *store) get(ctx context.Context, key string, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if err := s.usable(ctx); err != nil {
		return nil, err
	}
	request, cancel := s.bounded(ctx)
	defer cancel()
	r, err := s.c.Get(request, key, opts...)
	if err != nil {
		return nil, s.explain(ctx, "read", err)
	}
	s.saw(r.Header)
	return r, nil
}

// saw notes the revision of an answer.
func (s *store) saw(h *etcdserverpb.ResponseHeader) {
	for {
		seen := s.seen.Load()
		if h.GetRevision() <= seen || s.seen.CompareAndSwap(seen, h.GetRevision()) {
			return
		}
	}
}

func (s *store) usable(ctx context.Context) error {
	if s.life.Err() != nil {
		return state.ErrClosed
	}
	return ctx.Err()
}

// explain turns an error of the client into one of ours; ctx is the caller's.
func (s *store) explain(ctx context.Context, op string, err error) error {
	switch {
	case s.life.Err() != nil:
		return state.ErrClosed
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, rpctypes.ErrCompacted), errors.Is(err, rpctypes.ErrFutureRev):
		return fmt.Errorf("%w: %w", state.ErrCompacted, err)
	case errors.Is(err, rpctypes.ErrRequestTooLarge):
		return fmt.Errorf("%w: the transaction is larger than the cluster takes (--max-request-bytes)", state.ErrInvalid)
	case away(err):
		return fmt.Errorf("%w: etcd at %s: %w", state.ErrUnavailable, s.where, err)
	}
	return fmt.Errorf("etcd: %s at %s: %w", op, s.where, err)
}

// away reports whether an error says that the cluster could not be reached or has no leader.
func away(err error) bool {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, clientv3.ErrNoAvailableEndpoints) {
		return true
	}
	code := codes.Unknown
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = e.Code()
	} else if st, ok := status.FromError(err); ok {
		code = st.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		return true
	}
	return false
}

func (s *store) entry(kv *mvccpb.KeyValue) state.Entry {
	return state.Entry{Key: strings.TrimPrefix(string(kv.Key), s.prefix), Value: kv.Value, Revision: state.Revision(kv.ModRevision)}
}

// Get implements state.Store.
func (s *store) Get(ctx context.Context, key string) (state.Entry, error) {
	if err := state.CheckKey(key); err != nil {
		return state.Entry{}, err
	}
	r, err := s.get(ctx, s.prefix+key)
	if err != nil {
		return state.Entry{}, err
	}
	if len(r.Kvs) == 0 {
		return state.Entry{}, fmt.Errorf("%w: key %q", state.ErrNotFound, key)
	}
	return s.entry(r.Kvs[0]), nil
}

// span is the range of etcd's keys for those that begin with prefix.
func (s *store) span(prefix string) (from, end string) {
	from, end = s.prefix+prefix, clientv3.GetPrefixRangeEnd(s.prefix+prefix)
	if prefix == "" {
		from += afterMarks
	}
	return from, end
}

// listPage is how many entries are read at a time.
const listPage = 1000

// List implements state.Store. Pages after the first are read at the first one's revision.
func (s *store) List(ctx context.Context, prefix string) ([]state.Entry, state.Revision, error) {
	first, end := s.span(prefix)
	from := first
	var entries []state.Entry
	var rev int64
	for {
		r, err := s.get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(listPage), clientv3.WithRev(rev))
		if errors.Is(err, state.ErrCompacted) && rev != 0 { // compacted between two pages
			from, entries, rev = first, nil, 0
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if rev == 0 {
			rev = r.Header.Revision
		}
		for _, kv := range r.Kvs {
			entries = append(entries, s.entry(kv))
		}
		if !r.More || len(r.Kvs) == 0 {
			return entries, state.Revision(rev), nil
		}
		from = string(r.Kvs[len(r.Kvs)-1].Key) + "\x00"
	}
}

// retryPause is the wait before a transaction is sent again whose fate is not known.
const retryPause = 100 * time.Millisecond

// Txn implements state.Store. A transaction whose answer was lost with a member is sent again until the time is up. Its mark
// tells whether it was made before.
func (s *store) Txn(ctx context.Context, conds []state.Cond, ops []state.Op) (state.Revision, error) {
	if err := state.CheckTxn(conds, ops); err != nil {
		return 0, err
	}
	if err := s.usable(ctx); err != nil {
		return 0, err
	}
	request, cancel := s.bounded(ctx)
	defer cancel()
	cmps, puts := s.translate(conds, ops)
	m := s.newMark(conds, ops)
	puts = append(puts, m.ops()...)
	for unsure := false; ; unsure = true {
		r, err := s.c.Txn(request).If(cmps...).Then(puts...).Else(clientv3.OpGet(m.key)).Commit()
		switch {
		case err == nil && r.Succeeded:
			s.saw(r.Header)
			return state.Revision(r.Header.Revision), nil
		case err == nil && unsure:
			return m.look(r)
		case err == nil:
			s.saw(r.Header)
			return 0, errConflict
		case !away(err) || request.Err() != nil:
			return 0, s.explain(ctx, "write", err)
		}
		select {
		case <-request.Done():
			return 0, s.explain(ctx, "write", err)
		case <-time.After(retryPause):
		}
	}
}

func (s *store) translate(conds []state.Cond, ops []state.Op) (cmps []clientv3.Cmp, puts []clientv3.Op) {
	for _, c := range conds {
		cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(s.prefix+c.Key), "=", int64(c.Revision)))
	}
	for _, op := range ops {
		if op.Delete {
			puts = append(puts, clientv3.OpDelete(s.prefix+op.Key))
		} else {
			puts = append(puts, clientv3.OpPut(s.prefix+op.Key, string(op.Value)))
		}
	}
	return cmps, puts
}

// Close implements state.Store.
func (s *store) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	if !first {
		<-s.done
		return s.closeErr
	}
	s.end()
	s.watchers.Wait()
	if err := s.c.Close(); err != nil && !errors.Is(err, context.Canceled) {
		s.closeErr = fmt.Errorf("etcd: close: %w", err)
	}
	close(s.done)
	return s.closeErr
}
