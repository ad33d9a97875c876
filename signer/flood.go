package signer

import (
	"fmt"
	"sync"
	"time"
)

// refusalRate bounds the refusals of one client that the auditor gets: a client that is refused as fast as it can ask must
// not fill the disk without which nobody is served.
var refusalRate = Rate{N: 20, Per: time.Second, Burst: 200}

// refusals thins out the records of refusals. It holds one tally for each client that a rule names, and one for all others.
type refusals struct {
	mu      sync.Mutex // guards the tallies
	clients map[string]*tally
}

// A tally counts one client's refusals.
type tally struct {
	bucket  bucket
	without int // refusals without a record since the last one with
}

// admit reports whether the refusal of a client gets a record, and how many before it did not.
func (f *refusals) admit(client string, now time.Time) (ok bool, without int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	t := f.clients[client]
	if t == nil {
		if f.clients == nil {
			f.clients = make(map[string]*tally)
		}
		t = &tally{bucket: bucket{rate: refusalRate, tokens: float64(refusalRate.Burst)}}
		f.clients[client] = t
	}
	if !t.bucket.left(now) {
		t.without++
		return false, 0
	}
	t.bucket.tokens--
	without, t.without = t.without, 0
	return true, without
}

// note says in a record's reason how many refusals have none.
func (r *Record) note(without int) {
	if without > 0 {
		r.Reason = fmt.Sprintf("%s; %d refusals of this client before it have no record of their own", r.Reason, without)
	}
}
