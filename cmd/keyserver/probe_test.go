package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// A wilfulKey signs, or does not, as a test wants.
type wilfulKey struct {
	*ecdsa.PrivateKey
	home  string
	mood  atomic.Value // func(context.Context) error
	asked atomic.Int32
}

func newWilfulKey(t *testing.T, home string, key *ecdsa.PrivateKey) *wilfulKey {
	t.Helper()
	if key == nil {
		var err error
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	k := &wilfulKey{PrivateKey: key, home: home}
	k.be(func(context.Context) error { return nil })
	return k
}

func (k *wilfulKey) be(mood func(context.Context) error) { k.mood.Store(mood) }

func (k *wilfulKey) Public() crypto.PublicKey { return &k.PublicKey }

func (k *wilfulKey) Info() signer.KeyInfo {
	ski, err := keyless.SKIOf(&k.PublicKey)
	if err != nil {
		panic(err)
	}
	return signer.KeyInfo{SKI: ski, Label: "www", Home: k.home, Type: "ECDSA P-256"}
}

func (k *wilfulKey) Supports(a signer.Algorithm) bool { return signer.Fits(&k.PublicKey, a) }

func (k *wilfulKey) Sign(ctx context.Context, a signer.Algorithm, input []byte) ([]byte, error) {
	k.asked.Add(1)
	if err := k.mood.Load().(func(context.Context) error)(ctx); err != nil {
		return nil, err
	}
	return ecdsa.SignASN1(rand.Reader, k.PrivateKey, input)
}

// TestProber has two homes of a key sign, fail and hang.
func TestProber(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newWilfulKey(t, "a", nil)
		b := newWilfulKey(t, "b", a.PrivateKey)
		r := signer.NewRegistry()
		if err := r.Replace([]signer.Home{{Key: a}, {Key: b}}); err != nil {
			t.Fatal(err)
		}
		p := newProber(r, time.Minute, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.run(ctx) }()
		verdict := func() (failing, degraded string) {
			v := p.verdict(ctx)
			return lineOf(v.failing), lineOf(v.degraded)
		}

		if f, d := verdict(); f+d != "" { // waits for the first probes
			t.Errorf("all is well: got %q, %q", f, d)
		}
		time.Sleep(time.Hour)
		if n := a.asked.Load(); n < 60 || n > 130 {
			t.Errorf("got %d probes in an hour, want one a minute, give or take half", n)
		}

		before := b.asked.Load()
		b.be(func(context.Context) error { return errors.New("device failed") })
		time.Sleep(2 * time.Minute)
		if f, d := verdict(); f != "" || !strings.Contains(d, "in b: ") || !strings.Contains(d, "device failed") || strings.Contains(d, "in a: ") {
			t.Errorf("one home fails: got %q, %q", f, d)
		}
		if n := b.asked.Load() - before; n < 12 {
			t.Errorf("a home that fails was asked %d times in two minutes, want it more often than others", n)
		}

		a.be(func(ctx context.Context) error {
			<-ctx.Done()
			return ctx.Err()
		})
		time.Sleep(2 * time.Minute)
		if f, _ := verdict(); !strings.Contains(f, "in a: ") || !strings.Contains(f, "in b: ") {
			t.Errorf("both homes fail: got %q", f)
		}

		for _, k := range []*wilfulKey{a, b} {
			k.be(func(context.Context) error { return nil })
		}
		time.Sleep(time.Minute)
		if f, d := verdict(); f+d != "" {
			t.Errorf("all is well again: got %q, %q", f, d)
		}
		if err := r.Replace(nil); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if results, pending, _ := p.all(); len(results)+len(pending) != 0 || len(p.results) != 0 {
			t.Error("a key that is gone is remembered")
		}
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestProbesAreFew has a hundred keys probed no faster than the limit.
func TestProbesAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var homes []signer.Home
		var asked atomic.Int32
		for range 100 {
			k := newWilfulKey(t, "a", nil)
			k.be(func(context.Context) error {
				asked.Add(1)
				return errors.New("device failed")
			})
			homes = append(homes, signer.Home{Key: k})
		}
		r := signer.NewRegistry()
		if err := r.Replace(homes); err != nil {
			t.Fatal(err)
		}
		p := newProber(r, time.Second, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := p.run(ctx); err != nil {
			t.Error(err)
		}
		if n := asked.Load(); n < 100 || n > 11*probeRate {
			t.Errorf("got %d probes in 10 s, want each key probed and at most %d a second", n, probeRate)
		}
	})
}

func lineOf(errs []error) string {
	if err := errors.Join(errs...); err != nil {
		return err.Error()
	}
	return ""
}
