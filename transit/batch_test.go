package transit

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

// together signs n times at once, after a first request that keeps them waiting, and returns the errors.
func (f *fake) together(k signer.Key, n int, release chan struct{}) []error {
	f.t.Helper()
	errs := make([]error, n+1)
	var wg sync.WaitGroup
	wg.Go(func() { errs[n] = signVerified(context.Background(), k) })
	for f.signs.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	for i := range n {
		wg.Go(func() { errs[i] = signVerified(context.Background(), k) })
	}
	g := k.(*key).groups[p256]
	for {
		g.mu.Lock()
		waiting := len(g.waiting)
		g.mu.Unlock()
		if waiting == n {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
	return errs
}

func TestBatchAnswers(t *testing.T) {
	for name, test := range map[string]struct {
		batch  func(f *fake, w http.ResponseWriter, req *signRequest)
		failed int // of 5 in the batch
		is     error
		signs  int64 // requests in all, the first included
		single bool
	}{
		"right": {func(f *fake, w http.ResponseWriter, req *signRequest) { f.right(w, req) }, 0, nil, 2, false},
		"one fails": {func(f *fake, w http.ResponseWriter, req *signRequest) {
			w.WriteHeader(http.StatusBadRequest)
			out := []map[string]any{{"error": "no luck"}}
			for _, in := range req.Batch[1:] {
				out = append(out, map[string]any{"signature": f.signature(in.Input)})
			}
			tell(w, map[string]any{"data": map[string]any{"batch_results": out}})
		}, 1, nil, 2, false},
		"one is gone, with status 200": {func(f *fake, w http.ResponseWriter, req *signRequest) {
			out := []map[string]any{{"error": "no such key version"}}
			for _, in := range req.Batch[1:] {
				out = append(out, map[string]any{"signature": f.signature(in.Input)})
			}
			tell(w, map[string]any{"data": map[string]any{"batch_results": out}})
		}, 1, signer.ErrNotFound, 2, false},
		"signatures exchanged for garbage": {func(f *fake, w http.ResponseWriter, req *signRequest) {
			out := []map[string]any{{"signature": "vault:v1:AAAA"}}
			for _, in := range req.Batch[1:] {
				out = append(out, map[string]any{"signature": f.signature(in.Input)})
			}
			tell(w, map[string]any{"data": map[string]any{"batch_results": out}})
		}, 1, signer.ErrUnavailable, 2, false},
		"unknown to the server": {func(f *fake, w http.ResponseWriter, req *signRequest) {
			tell(w, map[string]any{"data": map[string]any{"signature": f.signature(make([]byte, 32))}})
		}, 0, nil, 7, true},
		"too few results": {func(f *fake, w http.ResponseWriter, req *signRequest) {
			tell(w, map[string]any{"data": map[string]any{"batch_results": []map[string]any{{"signature": f.signature(req.Batch[0].Input)}}}})
		}, 0, nil, 7, true},
		"refused by the server": {func(_ *fake, w http.ResponseWriter, _ *signRequest) {
			http.Error(w, `{"errors":["batch_input is not allowed here"]}`, http.StatusBadRequest)
		}, 0, nil, 7, true},
		"sealed": {func(_ *fake, w http.ResponseWriter, _ *signRequest) {
			http.Error(w, `{"errors":["Vault is sealed"]}`, http.StatusServiceUnavailable)
		}, 5, signer.ErrUnavailable, 2, false},
		"throttled": {func(_ *fake, w http.ResponseWriter, _ *signRequest) {
			http.Error(w, `{"errors":["slow down"]}`, http.StatusTooManyRequests)
		}, 5, signer.ErrThrottled, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			release := make(chan struct{})
			f.sign = func(w http.ResponseWriter, _ *http.Request, req *signRequest) {
				<-release
				if req.Batch != nil {
					test.batch(f, w, req)
					return
				}
				f.right(w, req)
			}
			b, k := f.open(f.config())
			failed := 0
			for _, err := range f.together(k, 5, release) {
				if err == nil {
					continue
				}
				failed++
				if test.is != nil && !errors.Is(err, test.is) {
					t.Errorf("got %v, want %v", err, test.is)
				}
			}
			if failed != test.failed {
				t.Errorf("%d failed, want %d", failed, test.failed)
			}
			if got := f.signs.Load(); got != test.signs {
				t.Errorf("got %d requests, want %d", got, test.signs)
			}
			if got := b.single.Load(); got != test.single {
				t.Errorf("batches given up: got %v, want %v", got, test.single)
			}
		})
	}
}

// Signatures beyond a full batch leave at once, on further requests, and at most InFlight are under way.
func TestFullBatchesDoNotWait(t *testing.T) {
	f := newFake(t)
	release := make(chan struct{})
	f.sign = func(w http.ResponseWriter, _ *http.Request, req *signRequest) {
		<-release
		f.right(w, req)
	}
	cfg := f.config()
	cfg.Batch, cfg.InFlight = 2, 3
	b, k := f.open(cfg)
	if got := b.Capacity(); got != 6 {
		t.Errorf("got capacity %d, want 6", got)
	}
	var wg sync.WaitGroup
	for range 12 {
		wg.Go(func() {
			if err := signVerified(context.Background(), k); err != nil {
				t.Error(err)
			}
		})
	}
	for f.signs.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	g := k.(*key).groups[p256]
	for {
		g.mu.Lock()
		flights, waiting := g.flights, len(g.waiting)
		g.mu.Unlock()
		if flights > 3 {
			t.Errorf("got %d requests under way, want at most 3", flights)
		}
		if waiting >= 12-3*2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	close(release)
	wg.Wait()
}

// When all who wait for a request have given up, it is given up too, and those who come later are served.
func TestAbandonedRequest(t *testing.T) {
	f := newFake(t)
	gone := make(chan struct{})
	f.sign = func(w http.ResponseWriter, r *http.Request, req *signRequest) {
		if f.signs.Load() > 1 {
			f.right(w, req)
			return
		}
		<-r.Context().Done()
		close(gone)
	}
	_, k := f.open(f.config())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- signVerified(ctx, k) }()
	for f.signs.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want that of the context", err)
	}
	<-gone
	if err := signVerified(context.Background(), k); err != nil {
		t.Error(err)
	}
}

func TestWaitingIsBounded(t *testing.T) {
	f := newFake(t)
	release := make(chan struct{})
	f.sign = func(w http.ResponseWriter, _ *http.Request, req *signRequest) { <-release; f.right(w, req) }
	cfg := f.config()
	cfg.InFlight = 1
	_, k := f.open(cfg)
	g := k.(*key).groups[p256]
	first := make(chan error, 1)
	go func() { first <- signVerified(context.Background(), k) }()
	for f.signs.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithCancel(context.Background())
	for range maxWaiting {
		if err := g.join(&item{ctx: ctx, done: make(chan struct{})}); err != nil {
			t.Fatal(err)
		}
	}
	if err := signVerified(context.Background(), k); !errors.Is(err, signer.ErrOverloaded) || !strings.Contains(err.Error(), "1024") {
		t.Errorf("got %v, want ErrOverloaded", err)
	}
	cancel()
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
	// Those that waited leave the queue once the first is answered, a moment after that.
	err := signVerified(context.Background(), k)
	for errors.Is(err, signer.ErrOverloaded) && t.Context().Err() == nil {
		time.Sleep(time.Millisecond)
		err = signVerified(context.Background(), k)
	}
	if err != nil {
		t.Error(err)
	}
}

// Close waits for the requests under way and refuses the others.
func TestClose(t *testing.T) {
	f := newFake(t)
	release := make(chan struct{})
	f.sign = func(w http.ResponseWriter, _ *http.Request, req *signRequest) { <-release; f.right(w, req) }
	b, k := f.open(f.config())
	under := make(chan error, 1)
	go func() { under <- signVerified(context.Background(), k) }()
	for f.signs.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	closed := make(chan struct{})
	go func() { defer close(closed); b.Close() }()
	for {
		b.mu.Lock()
		is := b.closed
		b.mu.Unlock()
		if is {
			break
		}
		time.Sleep(time.Millisecond)
	}
	later := make(chan error, 1)
	go func() { later <- k.(*key).b.enter(context.Background()) }()
	close(release)
	if err := <-under; err != nil {
		t.Errorf("under way: %v", err)
	}
	<-closed
	if err := <-later; err == nil {
		b.leave()
	} else if !errors.Is(err, signer.ErrUnavailable) {
		t.Errorf("waiting: got %v, want ErrUnavailable", err)
	}
	for name, err := range map[string]error{
		"Sign": signVerified(context.Background(), k), "Check": b.Check(context.Background()), "second Close": b.Close(),
	} {
		if (name == "second Close") != (err == nil) || err != nil && !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
