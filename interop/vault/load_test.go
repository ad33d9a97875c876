package vault

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/interop/vault/server"
	"github.com/keyhaven/keyhaven/signer"
)

var (
	pss256  = signer.Algorithm{Kind: signer.PSS, Hash: crypto.SHA256}
	edwards = signer.Algorithm{Kind: signer.Ed25519}
)

// storm has callers sign at the same time, each signature verified.
func storm(t *testing.T, k signer.Key, alg signer.Algorithm, callers, each int) {
	t.Helper()
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for range each {
				input := inputFor(t, alg)
				sig, err := k.Sign(context.Background(), alg, input)
				if err != nil {
					t.Error(err)
					return
				}
				verify(t, k.Public(), alg, input, sig)
			}
		})
	}
	wg.Wait()
}

func TestBatching(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		typ     string
		alg     signer.Algorithm
		batch   int
		batches bool
	}{
		"P-256":          {"ecdsa-p256", p256, 0, true},
		"P-256 with 384": {"ecdsa-p256", signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA384}, 0, true},
		"Ed25519":        {"ed25519", edwards, 0, true},
		"RSA":            {"rsa-2048", pss256, 0, false},
		"batch of one":   {"ecdsa-p256", p256, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t)
			l.make("web", test.typ)
			cfg := l.config("web")
			cfg.Batch = test.batch
			k := keys(t, l.open(cfg), 1)["web"]
			// The first request is slow, so that the others surely come together.
			l.Inject(server.Fault{Path: "transit/sign/", Count: 1, Delay: 200 * time.Millisecond})
			storm(t, k, test.alg, 32, 5)
			c := l.Counters()
			if c.SignItems != 160 {
				t.Errorf("the server was asked for %d signatures, want 160", c.SignItems)
			}
			if got := c.SignRequests < c.SignItems; got != test.batches {
				t.Errorf("%d signatures in %d requests, want batches: %v", c.SignItems, c.SignRequests, test.batches)
			}
		})
	}
}

// A caller who gives up leaves the others of the batch alone.
func TestBatchOutlivesACaller(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	k := keys(t, l.open(l.config("web")), 1)["web"]
	l.Inject(server.Fault{Path: "transit/sign/", Count: 2, Delay: 300 * time.Millisecond})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for i := range 8 {
		mine := context.Background()
		if i%2 == 0 {
			mine = ctx
		}
		wg.Go(func() {
			input := inputFor(t, p256)
			sig, err := k.Sign(mine, p256, input)
			if mine == ctx {
				if !errors.Is(err, context.Canceled) {
					t.Errorf("got %v, want that of its context", err)
				}
				return
			}
			if err != nil {
				t.Error(err)
				return
			}
			verify(t, k.Public(), p256, input, sig)
		})
	}
	eventually(t, "a first request", func() bool { return l.Counters().Faults >= 1 })
	cancel()
	wg.Wait()
}

// Every fault of the server has its class, and the next operation is well.
func TestFaults(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	l.make("rsa", "rsa-2048")
	for name, test := range map[string]struct {
		fault server.Fault
		is    []error
		isNot []error
	}{
		"sealed":          {server.Fault{Status: 503}, []error{signer.ErrUnavailable}, []error{signer.ErrThrottled}},
		"internal error":  {server.Fault{Status: 500}, []error{signer.ErrUnavailable}, nil},
		"bad gateway":     {server.Fault{Status: 502, Body: "<html>"}, []error{signer.ErrUnavailable}, nil},
		"standby":         {server.Fault{Status: 473}, []error{signer.ErrUnavailable}, nil},
		"lagging replica": {server.Fault{Status: 412}, []error{signer.ErrUnavailable}, nil},
		"redirect":        {server.Fault{Status: 307, Location: "http://127.0.0.1:1/v1/transit/sign/web"}, []error{signer.ErrUnavailable}, nil},
		"throttled":       {server.Fault{Status: 429}, []error{signer.ErrThrottled}, []error{signer.ErrUnavailable}},
		"bad request":     {server.Fault{Status: 400}, nil, []error{signer.ErrUnavailable, signer.ErrThrottled}},
		"gone":            {server.Fault{Status: 404}, []error{signer.ErrNotFound, signer.ErrUnavailable}, nil},
		// A kept connection that is lost is replaced; one that is lost as well is an outage.
		"connections lost":    {server.Fault{Drop: true, Count: 2}, []error{signer.ErrUnavailable}, nil},
		"not JSON":            {server.Fault{Status: 200, Body: "<html>"}, []error{signer.ErrUnavailable}, nil},
		"no signature":        {server.Fault{Status: 200, Body: `{"data":{}}`}, []error{signer.ErrUnavailable}, nil},
		"wrong version":       {server.Fault{Status: 200, Body: `{"data":{"signature":"vault:v2:AAAA"}}`}, []error{signer.ErrUnavailable}, nil},
		"malformed signature": {server.Fault{Status: 200, Body: `{"data":{"signature":"vault:v1:AAAA"}}`}, []error{signer.ErrUnavailable}, nil},
		"endless answer":      {server.Fault{Status: 200, Body: `{"data":"` + fmt.Sprintf("%02000000d", 0) + `"}`}, []error{signer.ErrUnavailable}, nil},
		"endless error":       {server.Fault{Status: 500, Body: fmt.Sprintf("%02000000d", 0)}, []error{signer.ErrUnavailable}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			ks := keys(t, l.open(l.config("web", "rsa")), 2)
			for label, alg := range map[string]signer.Algorithm{"web": p256, "rsa": pss256} {
				before := l.Counters()
				f := test.fault
				f.Path, f.Count = "transit/sign/", max(f.Count, 1)
				l.Inject(f)
				_, err := ks[label].Sign(context.Background(), alg, make([]byte, 32))
				if err == nil {
					t.Fatal("signed")
				}
				for _, want := range test.is {
					if !errors.Is(err, want) {
						t.Errorf("got %v, want %v", err, want)
					}
				}
				for _, not := range test.isNot {
					if errors.Is(err, not) {
						t.Errorf("got %v, which is %v", err, not)
					}
				}
				if len(err.Error()) > 700 {
					t.Errorf("the error has %d bytes", len(err.Error()))
				}
				if got := l.Counters().Faults - before.Faults; got != int64(f.Count) {
					t.Errorf("%d requests met the fault, want %d", got, f.Count)
				}
				sign(t, ks[label], alg)
			}
		})
	}
}

// A digest of a wrong length, at which the engine answers HTTP 500, never reaches it.
func TestWrongDigestLength(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "rsa-2048")
	k := keys(t, l.open(l.config("web")), 1)["web"]
	_, err := k.Sign(context.Background(), pss256, make([]byte, 20))
	if err == nil || errors.Is(err, signer.ErrUnavailable) || l.Counters().SignRequests != 0 {
		t.Errorf("got %v after %d requests", err, l.Counters().SignRequests)
	}
}

// A server that asks to be left alone is left alone as long as it says.
func TestRetryAfter(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	k := keys(t, l.open(l.config("web")), 1)["web"]
	l.Inject(server.Fault{Path: "transit/sign/", Count: 1, Status: http.StatusTooManyRequests, RetryAfter: 1})
	_, err := k.Sign(context.Background(), p256, make([]byte, 32))
	if !errors.Is(err, signer.ErrThrottled) {
		t.Fatalf("got %v, want ErrThrottled", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := k.Sign(ctx, p256, make([]byte, 32)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	if got := l.Counters().SignItems; got != 0 {
		t.Errorf("%d signatures were asked for in the meantime", got)
	}
	sign(t, k, p256)
}

// A slow server costs the caller's deadline, or ours, and not more.
func TestSlowServer(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	l.make("rsa", "rsa-2048")
	cfg := l.config("web", "rsa")
	cfg.Timeout = 500 * time.Millisecond
	ks := keys(t, l.open(cfg), 2)
	for label, alg := range map[string]signer.Algorithm{"web": p256, "rsa": pss256} {
		l.Inject(server.Fault{Path: "transit/sign/", Delay: time.Minute})
		ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
		if _, err := ks[label].Sign(ctx, alg, make([]byte, 32)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: got %v, want the caller's deadline", label, err)
		}
		cancel()
		if _, err := ks[label].Sign(context.Background(), alg, make([]byte, 32)); !errors.Is(err, signer.ErrUnavailable) {
			t.Errorf("%s: got %v, want ErrUnavailable", label, err)
		}
		l.Clear()
		eventually(t, "a signature", func() bool {
			_, err := ks[label].Sign(context.Background(), alg, make([]byte, 32))
			return err == nil
		})
	}
}

// The rights of one namespace are worth nothing in another, and its keys are its own.
func TestNamespaces(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	if err := l.AddNamespace("team/a"); err != nil {
		t.Fatal(err)
	}
	l.make("web", "ecdsa-p256")
	if _, err := l.DoIn("team/a", "keys/web", map[string]any{"type": "ed25519"}); err != nil {
		t.Fatal(err)
	}
	cfg := l.config("web")
	cfg.Namespace = "team/a"
	b := l.open(cfg)
	k := keys(t, b, 1)["web"]
	if got := k.Info().Type; got != "Ed25519" {
		t.Errorf("got a key of type %s: that of another namespace", got)
	}
	sign(t, k, edwards)
	if want := "/team/a/transit"; !matches(b.Name(), want) {
		t.Errorf("got name %q, want one with %s", b.Name(), want)
	}
}

// Batches and single requests on the same engine, in one run.
func BenchmarkP256(b *testing.B) {
	for _, batch := range []int{1, 16} {
		for _, callers := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("batch=%d/callers=%d", batch, callers), func(b *testing.B) {
				benchmark(b, batch, callers, "ecdsa-p256", p256)
			})
		}
	}
}

// RSA signatures cost the server so much that batches would gain nothing.
func BenchmarkRSA2048(b *testing.B) {
	for _, callers := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) { benchmark(b, 16, callers, "rsa-2048", pss256) })
	}
}

func benchmark(b *testing.B, batch, callers int, typ string, alg signer.Algorithm) {
	l := newLab(b)
	l.make("web", typ)
	cfg := l.config("web")
	cfg.Batch, cfg.Logger = batch, nil
	k := keys(b, l.open(cfg), 1)["web"]
	input := inputFor(b, alg)
	work := make(chan struct{})
	var wg sync.WaitGroup
	for range callers {
		wg.Go(func() {
			for range work {
				if _, err := k.Sign(context.Background(), alg, input); err != nil {
					b.Error(err)
				}
			}
		})
	}
	b.ReportAllocs()
	for b.Loop() {
		work <- struct{}{}
	}
	close(work)
	wg.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sign/s")
}
