package transit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/signer"
)

// maxWaiting bounds the signatures that wait for a request of one key and algorithm, if the backend's capacity is not greater. Beyond it they are
// refused as signer.ErrOverloaded; who calls through a [signer.Lane] of the backend's capacity never gets there.
const maxWaiting = 1024

// A group collects the signatures with one key and algorithm that are asked for while a request is under way.
type group struct {
	k   *key
	alg signer.Algorithm

	mu      sync.Mutex
	waiting []*item
	flights int // requests under way
}

// item is one signature in a group.
type item struct {
	ctx   context.Context
	input []byte
	sig   []byte
	err   error
	done  chan struct{} // closed when sig or err is set
}

func (g *group) sign(ctx context.Context, input []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, context.Cause(ctx)
	}
	// The request may outlast the call.
	it := &item{ctx: ctx, input: bytes.Clone(input), done: make(chan struct{})}
	if err := g.join(it); err != nil {
		return nil, err
	}
	select {
	case <-it.done:
		return it.sig, it.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// join puts an item into the queue. A request leaves at once if none is under way, or if those that wait fill one.
func (g *group) join(it *item) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if most := max(maxWaiting, g.k.b.Capacity()); len(g.waiting) >= most {
		return fmt.Errorf("transit: key %q: %d signatures wait: %w", g.k.keyName, most, signer.ErrOverloaded)
	}
	g.waiting = append(g.waiting, it)
	cfg := &g.k.b.cfg
	if g.flights > 0 && (len(g.waiting) < cfg.Batch || g.flights >= cfg.InFlight) {
		return nil
	}
	if !g.k.b.start(g.fly) {
		g.waiting = g.waiting[:len(g.waiting)-1]
		return errClosed
	}
	g.flights++
	return nil
}

// fly sends requests until nobody waits.
func (g *group) fly() {
	for {
		items := g.take()
		if len(items) == 0 {
			return
		}
		g.send(items)
		for _, it := range items {
			close(it.done)
		}
	}
}

// take returns what the next request is to sign: the longest waiting whose callers still wait. None: the flight is over.
func (g *group) take() []*item {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting = slices.DeleteFunc(g.waiting, func(it *item) bool { return it.ctx.Err() != nil })
	n := min(len(g.waiting), g.k.b.cfg.Batch)
	items := slices.Clone(g.waiting[:n])
	g.waiting = slices.Delete(g.waiting, 0, n)
	if n == 0 {
		g.flights--
	}
	return items
}

// send signs the items, and sets the result of each.
func (g *group) send(items []*item) {
	ctx, end := together(g.k.b.ctx, items)
	defer end()
	err := g.k.b.enter(ctx)
	if err == nil {
		defer g.k.b.leave()
		switch {
		case len(items) == 1:
			items[0].sig, items[0].err = g.k.request(ctx, g.alg, items[0].input)
			return
		case g.k.b.single.Load():
			g.each(items)
			return
		}
		err = g.batch(ctx, items)
	}
	if err != nil {
		for _, it := range items {
			it.err = err
		}
	}
}

// together returns a context that ends when the contexts of all items have ended, or the base.
func together(base context.Context, items []*item) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(base)
	var left atomic.Int32
	left.Store(int32(len(items)))
	stops := make([]func() bool, len(items))
	for i, it := range items {
		stops[i] = context.AfterFunc(it.ctx, func() {
			if left.Add(-1) == 0 {
				cancel(context.Cause(it.ctx))
			}
		})
	}
	return ctx, func() {
		for _, stop := range stops {
			stop()
		}
		cancel(nil)
	}
}

// batch signs the items with one request. It sets the result of each, or returns an error that is all of theirs.
func (g *group) batch(ctx context.Context, items []*item) error {
	r := g.k.parameters(g.alg)
	r.Batch = make([]signInput, len(items))
	for i, it := range items {
		r.Batch[i].Input = it.input
	}
	a, err := g.k.post(ctx, &r)
	if a != nil {
		// Some servers answer with a status of failure if one item failed, and all the results.
		if out, ok := decodeBatch(a.body, len(items)); ok {
			g.deal(items, out, a.status)
			return nil
		}
	}
	if err != nil && (a == nil || a.status != http.StatusBadRequest || errors.Is(err, signer.ErrNotFound)) {
		return err
	}
	// Whoever does not know batches signs nothing, or refuses the request as malformed.
	g.each(items)
	if !g.k.b.single.Load() && slices.ContainsFunc(items, func(it *item) bool { return it.err == nil }) {
		g.k.b.single.Store(true)
		g.k.b.cfg.Logger.Warn("transit server does not know batches", "home", g.k.b.name)
	}
	return nil
}

// deal gives each item its result.
func (g *group) deal(items []*item, out []signOutput, status int) {
	for i, it := range items {
		if out[i].Error == "" {
			sig, err := decodeSignature(out[i].Signature, g.k.pub, g.k.version)
			if err != nil {
				err = g.k.wrong(err)
			} else if err = g.k.check(g.alg, it.input, sig); err != nil {
				sig = nil
			}
			it.sig, it.err = sig, err
			continue
		}
		// The engine's word for one item tells as much as the status of a request of its own would.
		if status == http.StatusOK {
			status = http.StatusBadRequest
		}
		body, err := json.Marshal(map[string][]string{"errors": {out[i].Error}})
		if err != nil {
			body = nil
		}
		it.err = g.k.b.refusal(&answer{status: status, body: body}, fmt.Sprintf("sign with key %q version %d", g.k.keyName, g.k.version), "")
		g.k.note(it.err)
	}
}

// each signs the items one by one.
func (g *group) each(items []*item) {
	for _, it := range items {
		it.sig, it.err = g.k.request(it.ctx, g.alg, it.input)
	}
}
