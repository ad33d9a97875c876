package mtls

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

type issueFunc = func(context.Context, []byte) ([][]byte, error)

// keep runs KeepRenewed in a bubble of synctest for a time and returns its error.
func keep(t *testing.T, s *Source, d time.Duration, issue issueFunc, meanwhile func()) error {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, errEnough)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.KeepRenewed(ctx, issue) }()
	if meanwhile != nil {
		meanwhile()
	}
	return <-done
}

var errEnough = errors.New("enough")

func TestKeepRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		s := newIdentity(t, a, testID(KindConnector, "c1"))
		last, leaf := time.Now(), s.Leaf()
		count := 0
		err := keep(t, s, 10*24*time.Hour, func(ctx context.Context, csr []byte) ([][]byte, error) {
			count++
			if err := s.Check(); err != nil {
				t.Errorf("renewal %d: %v", count, err)
			}
			if gap := time.Since(last); gap < 13*time.Hour+35*time.Minute || gap > 16*time.Hour+time.Second {
				t.Errorf("renewal %d after %s, want between 17/30 and 2/3 of 24h", count, gap)
			}
			last = time.Now()
			return a.IssueCSR(csr, s.Identity(), 0)
		}, nil)
		if err != errEnough {
			t.Errorf("got %v, want the context's cause", err)
		}
		if count < 15 || count > 17 {
			t.Errorf("%d renewals in 10 days, want 15 to 17", count)
		}
		if s.Leaf().Equal(leaf) || samePublicKey(s.Leaf().PublicKey, leaf.PublicKey) {
			t.Error("certificate or key is still the first one")
		}
		if err := s.Reload(); err != nil {
			t.Errorf("the files do not hold what was renewed: %v", err)
		}
	})
}

// TestKeepRenewedRetries has the authority away until after the certificate ran out.
func TestKeepRenewedRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		s := newIdentity(t, a, testID(KindConnector, "c1"))
		start := time.Now()
		var tries []time.Time
		keep(t, s, 30*time.Hour, func(ctx context.Context, csr []byte) ([][]byte, error) {
			tries = append(tries, time.Now())
			if time.Since(start) < 26*time.Hour {
				return nil, errors.New("away")
			}
			return a.IssueCSR(csr, s.Identity(), 0)
		}, nil)
		if err := s.Check(); err != nil {
			t.Errorf("the certificate was not renewed in the end: %v", err)
		}
		for i := 1; i < len(tries)-1; i++ {
			if gap := tries[i].Sub(tries[i-1]); gap < minRenewRetry/2 || gap > maxRenewRetry {
				t.Errorf("try %d came %s after the one before", i, gap)
			}
		}
		if gap := tries[1].Sub(tries[0]); gap > minRenewRetry {
			t.Errorf("the first retry came after %s", gap)
		}
		if n := len(tries); n < 60 || n > 200 {
			t.Errorf("%d tries in 10 to 12 hours", n)
		}
	})
}

// TestKeepRenewedShort has an authority whose root is about to end, so that each certificate is shorter.
func TestKeepRenewedShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		s := newIdentity(t, a, testID(KindConnector, "c1"))
		start, count, refused := time.Now(), 0, 0
		end := start.Add(17 * time.Hour)
		keep(t, s, 20*time.Hour, func(ctx context.Context, csr []byte) ([][]byte, error) {
			if left := time.Until(end); left > 0 {
				count++
				return a.IssueCSR(csr, s.Identity(), left)
			}
			refused++
			return nil, errors.New("root has ended")
		}, nil)
		if refused < 18 || refused > 60 {
			t.Errorf("%d tries in the 3 hours after the end", refused)
		}
		if count < 3 || count > 60 {
			t.Errorf("%d renewals before the end", count)
		}
	})
}

func TestKeepRenewedFollowsReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		s := newIdentity(t, a, testID(KindConnector, "c1"))
		start := time.Now()
		var first time.Duration
		keep(t, s, 25*24*time.Hour, func(ctx context.Context, csr []byte) ([][]byte, error) {
			if first == 0 {
				first = time.Since(start)
			}
			return a.IssueCSR(csr, s.Identity(), 30*24*time.Hour)
		}, func() {
			time.Sleep(12 * time.Hour)
			key, csr, err := NewKeyCSR()
			if err != nil {
				t.Fatal(err)
			}
			chain, err := a.IssueCSR(csr, s.Identity(), 30*24*time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			steps := writeSteps(s.files, mustKey(t, key), encodeCerts(chain), nil)
			for _, step := range steps {
				if err := step(); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.Reload(); err != nil {
				t.Fatal(err)
			}
		})
		if first < 16*24*time.Hour {
			t.Errorf("renewed after %s, though a certificate for 30 days was loaded", first)
		}
	})
}

func TestKeepRenewedEndsInIssue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, testDomain)
		s := newIdentity(t, a, testID(KindConnector, "c1"))
		err := keep(t, s, 18*time.Hour, func(ctx context.Context, csr []byte) ([][]byte, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, nil)
		if err != errEnough {
			t.Errorf("got %v, want the context's cause", err)
		}
	})
}

func TestRenewRefuses(t *testing.T) {
	a, other := newAuthority(t, testDomain), newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindConnector, "c1"))
	id := s.Identity()
	broken := errors.New("broken")
	files := func() (all []byte) {
		for _, path := range []string{s.files.CertFile, s.files.KeyFile, s.files.RootsFile} {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, data...)
		}
		return all
	}
	before, current := files(), s.current.Load()
	for _, c := range []struct {
		name, want string
		issue      func(csr []byte) ([][]byte, error)
	}{
		{"error", "broken", func([]byte) ([][]byte, error) { return nil, broken }},
		{"nothing", "no PEM certificate", func([]byte) ([][]byte, error) { return nil, nil }},
		{"garbage", "malformed", func([]byte) ([][]byte, error) { return [][]byte{[]byte("x")}, nil }},
		{"another identity", "names spiffe://keyhaven.test/connector/c2", func(csr []byte) ([][]byte, error) {
			return a.IssueCSR(csr, testID(KindConnector, "c2"), 0)
		}},
		{"another kind", "names spiffe://keyhaven.test/edge/c1", func(csr []byte) ([][]byte, error) {
			return a.IssueCSR(csr, testID(KindEdge, "c1"), 0)
		}},
		{"another authority", "does not verify", func(csr []byte) ([][]byte, error) { return other.IssueCSR(csr, id, 0) }},
		{"another key", "does not match", func([]byte) ([][]byte, error) {
			_, csr, err := NewKeyCSR()
			if err != nil {
				return nil, err
			}
			return a.IssueCSR(csr, id, 0)
		}},
		{"root first", "does not match", func(csr []byte) ([][]byte, error) {
			chain, err := a.IssueCSR(csr, id, 0)
			if err != nil {
				return nil, err
			}
			return [][]byte{chain[1], chain[0]}, nil
		}},
		{"expired", "not valid now", func(csr []byte) ([][]byte, error) {
			pub, err := parseCSR(csr)
			if err != nil {
				return nil, err
			}
			return forgeFor(t, a, id, pub, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), nil
		}},
	} {
		err := s.Renew(t.Context(), func(_ context.Context, csr []byte) ([][]byte, error) { return c.issue(csr) })
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), id.String()) {
			t.Errorf("%s: got %v, want an error with %q", c.name, err, c.want)
		}
		if c.name == "error" && !errors.Is(err, broken) {
			t.Errorf("%s: the error is not wrapped", c.name)
		}
	}
	if !bytes.Equal(files(), before) || s.current.Load() != current {
		t.Error("a refused renewal changed the identity")
	}
}

// TestRenewCannotWrite has a directory that takes no files: the identity in use stays.
func TestRenewCannotWrite(t *testing.T) {
	a := newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindConnector, "c1"))
	// A directory in the place of the staged key makes the rename fail, whoever runs the test.
	if err := os.MkdirAll(s.files.KeyFile+stagedSuffix+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	current := s.current.Load()
	if err := s.Renew(t.Context(), issuer(a, s.Identity())); err == nil {
		t.Error("renewed without writing")
	}
	if s.current.Load() != current {
		t.Error("a failed renewal changed the identity")
	}
	if err := s.Reload(); err != nil {
		t.Errorf("a failed renewal spoiled the files: %v", err)
	}
}

func TestRenewCancelled(t *testing.T) {
	a := newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindConnector, "c1"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := s.Renew(ctx, func(ctx context.Context, _ []byte) ([][]byte, error) { return nil, ctx.Err() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want context.Canceled", err)
	}
}

// TestReloadDuringRenewal: an authority that takes its time does not keep the files from being read, and a certificate
// that an operator brings in meanwhile is not replaced.
func TestReloadDuringRenewal(t *testing.T) {
	a := newAuthority(t, testDomain)
	s := newIdentity(t, a, testID(KindConnector, "c1"))
	issue := func(ctx context.Context, csr []byte) ([][]byte, error) {
		if err := s.Reload(); err != nil {
			t.Errorf("Reload: %v", err)
		}
		return a.IssueCSR(csr, s.Identity(), 0)
	}
	if err := s.Renew(t.Context(), issue); err != nil {
		t.Errorf("Renew beside a Reload of the same certificate: %v", err)
	}
	key, csr, err := NewKeyCSR()
	if err != nil {
		t.Fatal(err)
	}
	chain, err := a.IssueCSR(csr, s.Identity(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	err = s.Renew(t.Context(), func(ctx context.Context, csr []byte) ([][]byte, error) {
		if err := WriteIdentity(filepath.Dir(s.files.CertFile), key, chain, a.RootPEM()); err != nil {
			t.Error(err)
		}
		return issue(ctx, csr)
	})
	if err == nil || !strings.Contains(err.Error(), "another certificate was loaded") {
		t.Errorf("Renew beside a Reload of another certificate: %v, want an error that says so", err)
	}
	if !bytes.Equal(s.Leaf().Raw, chain[0]) || s.Reload() != nil || !bytes.Equal(s.Leaf().Raw, chain[0]) {
		t.Error("the operator's certificate was replaced")
	}
}
