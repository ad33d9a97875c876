package etcd

import (
	"context"
	"errors"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/keyhaven/keyhaven/internal/etcdtest"
	"github.com/keyhaven/keyhaven/state"
)

// A lossy store loses the first answer to a transaction, or the transaction itself, and does something before the next attempt.
type lossy struct {
	clientv3.KV
	lost      bool
	losesBoth bool // the request too
	meanwhile func()
}

type lossyTxn struct {
	clientv3.Txn
	l *lossy
}

func (l *lossy) Txn(ctx context.Context) clientv3.Txn { return &lossyTxn{l.KV.Txn(ctx), l} }

func (t *lossyTxn) If(c ...clientv3.Cmp) clientv3.Txn  { t.Txn.If(c...); return t }
func (t *lossyTxn) Then(o ...clientv3.Op) clientv3.Txn { t.Txn.Then(o...); return t }
func (t *lossyTxn) Else(o ...clientv3.Op) clientv3.Txn { t.Txn.Else(o...); return t }

func (t *lossyTxn) Commit() (*clientv3.TxnResponse, error) {
	if t.l.lost {
		return t.Txn.Commit()
	}
	t.l.lost = true
	if !t.l.losesBoth {
		if _, err := t.Txn.Commit(); err != nil {
			return nil, err
		}
	}
	t.l.meanwhile()
	return nil, status.Error(codes.Unavailable, "the member is gone")
}

// A transaction whose answer is lost is made once, and its maker learns whether it was, whatever others do meanwhile.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	other := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms)})
	ctx := t.Context()
	mine, theirs := []byte("1"), []byte("2")
	put := func(e state.Entry, value []byte) func() {
		return func() {
			now, err := other.Get(ctx, e.Key)
			if err == nil {
				_, err = other.Txn(ctx, []state.Cond{now.Unchanged()}, []state.Op{state.Put(e.Key, value)})
			}
			if err != nil {
				t.Error(err)
			}
		}
	}
	for _, tt := range []struct {
		name      string
		delete    bool
		losesBoth bool
		meanwhile func(e state.Entry, s *store) func()
		want      error
		left      string // "" for none
	}{
		{name: "answer", left: "1"},
		{name: "answer to a deletion", delete: true},
		{name: "request", losesBoth: true, left: "1"},
		{name: "request for a deletion", delete: true, losesBoth: true},
		{name: "answer, and another writes", meanwhile: func(e state.Entry, _ *store) func() { return put(e, theirs) }, left: "2"},
		{name: "request, and another writes", losesBoth: true, meanwhile: func(e state.Entry, _ *store) func() { return put(e, theirs) }, want: state.ErrConflict, left: "2"},
		{name: "request, and another writes the same", losesBoth: true, meanwhile: func(e state.Entry, _ *store) func() { return put(e, mine) }, want: state.ErrConflict, left: "1"},
		{name: "request, and another deletes", delete: true, losesBoth: true, meanwhile: func(e state.Entry, _ *store) func() {
			return func() {
				if _, err := other.Txn(ctx, []state.Cond{e.Unchanged()}, []state.Op{state.Delete(e.Key)}); err != nil {
					t.Error(err)
				}
			}
		}, want: state.ErrConflict},
		{name: "answer, and the mark is gone", meanwhile: func(e state.Entry, s *store) func() {
			return func() {
				put(e, theirs)()
				r, err := s.c.Get(ctx, s.prefix+markPrefix, clientv3.WithPrefix())
				if err != nil || len(r.Kvs) == 0 {
					t.Errorf("marks: %v, %v", r, err)
					return
				}
				for _, kv := range r.Kvs {
					if _, err := s.c.Put(ctx, string(kv.Key), "another's"); err != nil {
						t.Error(err)
					}
				}
			}
		}, want: state.ErrUnavailable, left: "2"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms)}).(*store)
			first, err := state.Create(ctx, s, tt.name, []byte("0"))
			if err != nil {
				t.Fatal(err)
			}
			e := state.Entry{Key: tt.name, Revision: first}
			l := &lossy{KV: s.c.KV, losesBoth: tt.losesBoth, meanwhile: func() {}}
			if tt.meanwhile != nil {
				l.meanwhile = tt.meanwhile(e, s)
			}
			s.c.KV = l
			op := state.Put(e.Key, mine)
			if tt.delete {
				op = state.Delete(e.Key)
			}
			rev, err := s.Txn(ctx, []state.Cond{e.Unchanged()}, []state.Op{op})
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if err == nil && rev != first+1 {
				t.Errorf("the revision is %d after %d", rev, first)
			}
			if !l.lost {
				t.Error("nothing was lost: the test proves nothing")
			}
			now, err := other.Get(ctx, e.Key)
			if tt.left == "" != errors.Is(err, state.ErrNotFound) || string(now.Value) != tt.left {
				t.Errorf("the store has %q, %v; want %q", now.Value, err, tt.left)
			}
		})
	}
	entries, _, err := other.List(ctx, "")
	for _, e := range entries {
		if err := state.CheckKey(e.Key); err != nil {
			t.Error(err)
		}
	}
	if err != nil || len(entries) == 0 {
		t.Errorf("the list is %v, %v", entries, err)
	}
}
