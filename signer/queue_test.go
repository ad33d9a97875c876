package signer

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
)

// stuckRecorder keeps records, one each time it is let go on.
type stuckRecorder struct {
	goOn chan struct{}
	got  []Record
}

func (s *stuckRecorder) Record(r Record) {
	<-s.goOn
	s.got = append(s.got, r)
}

// TestQueue has a log that nobody reads: records do not wait for it, the surplus is counted, and the log tells of it.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		next := &stuckRecorder{goOn: make(chan struct{})}
		q := NewQueue(next, 4)
		ctx, end := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			q.Run(ctx)
		}()
		q.Record(Record{SNI: "first"})
		synctest.Wait() // Run has the first in its hands
		for range 7 {
			q.Record(Record{SNI: "later"})
		}
		if got := q.Lost(); got != 3 {
			t.Errorf("%d records lost of 7 in a queue of 4, want 3", got)
		}
		end()
		close(next.goOn)
		<-ended
		if len(next.got) != 6 || next.got[0].SNI != "first" || next.got[5].SNI != "later" {
			t.Fatalf("got %+v, want the first, the loss, and four later ones", next.got)
		}
		if r := next.got[1]; r.Op != OpLost || r.Result != ResultFailed || !strings.HasPrefix(r.Reason, "3 records") {
			t.Errorf("got %+v, want a record of 3 lost ones", r)
		}
	})
}
