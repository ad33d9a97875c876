package pkcs11

import (
	"context"
	"crypto"
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/internal/softhsm"
	"github.com/keyhaven/keyhaven/signer"
)

// Another token than a fresh one of SoftHSM2 is benched with -module and -uri; it must have the two keys.
var (
	benchModule = flag.String("module", "", "absolute path of the PKCS#11 module to bench; SoftHSM2 if empty")
	benchURI    = flag.String("uri", "", "PKCS#11 URI of the token to bench, with pin-source")
	benchP256   = flag.String("p256", "test-p256", "label of the P-256 key")
	benchRSA    = flag.String("rsa2048", "test-rsa2048", "label of the RSA-2048 key")
)

// benchToken opens the token to bench with so many sessions.
func benchToken(b *testing.B, st *softhsm.Token, sessions int) *Token {
	if *benchModule == "" {
		return openToken(b, st, func(c *Config) { c.Sessions = sessions })
	}
	u, err := ParseURI(*benchURI)
	if err != nil {
		b.Fatal(err)
	}
	t, err := Open(b.Context(), Config{URI: u, Module: *benchModule, Sessions: sessions})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { t.Close() })
	return t
}

func benchFixture(b *testing.B) *softhsm.Token {
	if *benchModule != "" {
		return nil
	}
	st := softhsm.New(b)
	cfg := configFor(b, st)
	t, err := Open(b.Context(), cfg)
	if err != nil {
		b.Fatal(err)
	}
	generate(b, t, "p256")
	generate(b, t, "rsa2048")
	if err := t.Close(); err != nil {
		b.Fatal(err)
	}
	return st
}

// BenchmarkRaw is C_SignInit and C_Sign in one crossing, nothing else: one caller for each session.
func BenchmarkRaw(b *testing.B) {
	st := benchFixture(b)
	for _, label := range []string{*benchP256, *benchRSA} {
		for _, sessions := range []int{1, 2, 4, 8} {
			b.Run(fmt.Sprintf("%s/sessions=%d", label, sessions), func(b *testing.B) {
				t := benchToken(b, st, sessions)
				k := benchKey(b, t, label)
				alg := probeAlgorithm(k.pub)
				in, err := k.prepare(nil, alg, k.methods[alg], input(alg))
				if err != nil {
					b.Fatal(err)
				}
				share(b, sessions, func(next func() bool) error {
					s, err := t.pool.take(b.Context(), false)
					if err != nil {
						return err
					}
					at, err := k.locate(b.Context(), s)
					for err == nil && next() {
						op := operation{mechanism: k.methods[alg].mechanism, in: in}
						err = t.m.operate(s, at.handle, &op)
					}
					t.pool.give(s, err)
					return err
				})
			})
		}
	}
}

// BenchmarkSign is Key.Sign by sessions and callers.
func BenchmarkSign(b *testing.B) {
	st := benchFixture(b)
	for _, label := range []string{*benchP256, *benchRSA} {
		for _, sessions := range []int{1, 2, 4, 8} {
			for _, callers := range []int{1, 8, 64} {
				b.Run(fmt.Sprintf("%s/sessions=%d/callers=%d", label, sessions, callers), func(b *testing.B) {
					t := benchToken(b, st, sessions)
					k := benchKey(b, t, label)
					alg := signer.Algorithm{Kind: probeAlgorithm(k.pub).Kind, Hash: crypto.SHA256}
					in := input(alg)
					share(b, callers, func(next func() bool) error {
						for next() {
							if _, err := k.Sign(context.Background(), alg, in); err != nil {
								return err
							}
						}
						return nil
					})
				})
			}
		}
	}
}

// BenchmarkMiekgSign is the same as BenchmarkRaw through miekg's SignInit and Sign, which asks for the length first.
func BenchmarkMiekgSign(b *testing.B) {
	st := benchFixture(b)
	for _, label := range []string{*benchP256, *benchRSA} {
		b.Run(label, func(b *testing.B) {
			t := benchToken(b, st, 1)
			k := benchKey(b, t, label)
			alg := probeAlgorithm(k.pub)
			in, err := k.prepare(nil, alg, k.methods[alg], input(alg))
			if err != nil {
				b.Fatal(err)
			}
			share(b, 1, func(next func() bool) error {
				s, err := t.pool.take(b.Context(), false)
				if err != nil {
					return err
				}
				at, err := k.locate(b.Context(), s)
				mech := []*ck.Mechanism{ck.NewMechanism(k.methods[alg].id, nil)}
				for err == nil && next() {
					if err = t.m.ctx.SignInit(s.handle, mech, at.handle); err == nil {
						_, err = t.m.ctx.Sign(s.handle, in)
					}
				}
				t.pool.give(s, err)
				return err
			})
		})
	}
}

func benchKey(b *testing.B, t *Token, label string) *key {
	k, err := t.Key(b.Context(), Selector{Label: label})
	if err != nil {
		b.Fatal(err)
	}
	return inner(k)
}

// share runs b.N operations on so many goroutines. Beside the rate it reports the processor time of an operation, which other
// work on the machine disturbs less.
func share(b *testing.B, workers int, f func(next func() bool) error) {
	b.Helper()
	b.ReportAllocs()
	before := cpuTime(b)
	b.ResetTimer()
	var done atomic.Int64
	next := func() bool { return done.Add(1) <= int64(b.N) }
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			if err := f(next); err != nil {
				b.Error(err)
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "ops/s")
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/op")
}

// cpuTime is the processor time that this process has used.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
