package signer

import (
	"context"
	"strconv"
	"sync/atomic"
	"time"
)

// A Queue is a [Recorder] that hands records to another one later, so that one that is slow, such as a log that nobody
// reads, holds no operation up. When it is full, a record is lost rather than an operation delayed; the loss is counted,
// and recorded itself as soon as there is room. Make one with [NewQueue].
type Queue struct {
	next    Recorder
	records chan Record
	lost    atomic.Uint64
}

// OpLost is the Op of the record that tells of lost ones.
const OpLost = "records-lost"

// NewQueue returns a queue of at most size records before next. Nothing is handed on unless Run runs.
func NewQueue(next Recorder, size int) *Queue {
	return &Queue{next: next, records: make(chan Record, max(size, 1))}
}

// Record implements [Recorder]. It never waits.
func (q *Queue) Record(r Record) {
	select {
	case q.records <- r:
	default:
		q.lost.Add(1)
	}
}

// Lost returns how many records were lost.
func (q *Queue) Lost() uint64 { return q.lost.Load() }

// Run hands records on until ctx ends, and then those that are there.
func (q *Queue) Run(ctx context.Context) {
	var told uint64
	hand := func(r Record) {
		q.next.Record(r)
		if lost := q.lost.Load(); lost != told {
			q.next.Record(Record{Time: time.Now(), Op: OpLost, Result: ResultFailed,
				Reason: lostReason(lost - told)})
			told = lost
		}
	}
	for {
		select {
		case r := <-q.records:
			hand(r)
			continue
		case <-ctx.Done():
		}
		for {
			select {
			case r := <-q.records:
				hand(r)
			default:
				return
			}
		}
	}
}

func lostReason(n uint64) string {
	return strconv.FormatUint(n, 10) + " records were lost since the one before: the log was not read fast enough"
}
