package etcd

import (
	"crypto/rand"
	"fmt"
	mathrand "math/rand/v2"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyhaven/keyhaven/state"
)

// Marks lie under the prefix where no entry can be: keys have no control characters. There are at most that many, each
// written over again and again, so that nobody has to delete them.
const (
	marks      = 4096
	markPrefix = "\x00"
	afterMarks = "\x01"
)

// A mark is written with a transaction, whose maker knows it again by its text.
type mark struct {
	key, text string
	since     int64 // the mark was not there at this revision
	made      bool  // it is written
}

func (s *store) newMark(conds []state.Cond, ops []state.Op) mark {
	return mark{key: fmt.Sprintf("%s%s%03x", s.prefix, markPrefix, mathrand.IntN(marks)), text: rand.Text(), since: s.seen.Load(), made: changes(conds, ops)}
}

// ops writes the mark.
func (m mark) ops() []clientv3.Op {
	if !m.made {
		return nil
	}
	return []clientv3.Op{clientv3.OpPut(m.key, m.text)}
}

// changes reports whether a transaction surely changes something if its conditions hold. Another must not be marked, since
// the mark would be the only change.
func changes(conds []state.Cond, ops []state.Op) bool {
	there := map[string]bool{}
	for _, c := range conds {
		there[c.Key] = c.Revision != 0
	}
	for _, op := range ops {
		if !op.Delete || there[op.Key] {
			return true
		}
	}
	return false
}

var errConflict = fmt.Errorf("%w: an entry was changed, made or deleted meanwhile", state.ErrConflict)

// look tells what became of a transaction of which an attempt had no answer, after another found a condition that does not hold.
func (m mark) look(r *clientv3.TxnResponse) (state.Revision, error) {
	kvs := r.Responses[0].GetResponseRange().Kvs
	switch {
	case m.made && len(kvs) > 0 && string(kvs[0].Value) == m.text:
		return state.Revision(kvs[0].ModRevision), nil
	case m.made && (len(kvs) == 0 || kvs[0].ModRevision <= m.since):
		return 0, errConflict
	}
	return 0, fmt.Errorf("%w: whether the change was made is not known, since its answer was lost; look, and try again if it was not", state.ErrUnavailable)
}
