package connector

import "sync"

// quietRefusals is how many of the first refusals are said in one line: those that the sessions of a set hear at the same
// time. After that the line comes again each time their number has doubled.
const quietRefusals = 8

// refusals counts how often an edge said what a person must mend, over all sessions to it, which hear the same. The zero
// value is ready.
type refusals struct {
	mu    sync.Mutex                // guards heard
	heard map[string]map[string]int // by edge and remedy
}

// aloud counts one more and reports whether it is to be said aloud.
func (r *refusals) aloud(edge, remedy string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.heard == nil {
		r.heard = map[string]map[string]int{}
	}
	if r.heard[edge] == nil {
		r.heard[edge] = map[string]int{}
	}
	r.heard[edge][remedy]++
	n := r.heard[edge][remedy]
	return n == 1 || n >= quietRefusals && n&(n-1) == 0
}

// forget makes the next refusal by the edge news again.
func (r *refusals) forget(edge string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.heard, edge)
}
