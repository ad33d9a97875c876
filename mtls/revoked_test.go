package mtls

import (
	"bytes"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestRevocations(t *testing.T) {
	a := newAuthority(t, testDomain)
	here, err := a.Revocations()
	if err != nil {
		t.Fatal(err)
	}
	there, err := OpenRevocations(a.dir) // as another process
	if err != nil {
		t.Fatal(err)
	}
	c1, c2 := newIdentity(t, a, testID(KindConnector, "c1")), newIdentity(t, a, testID(KindConnector, "c2"))
	check := func(r *Revocations, s *Source, want error) {
		t.Helper()
		if err := r.AcceptCert(s.Identity(), s.Leaf()); !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", s.Identity(), err, want)
		}
	}
	check(here, c1, nil)
	if err := here.RevokeCert(c1.Leaf(), "stolen"); err != nil {
		t.Fatal(err)
	}
	check(here, c1, ErrRevoked)
	check(here, c2, nil)
	if err := here.Accept(c1.Identity()); err != nil {
		t.Errorf("one certificate was revoked, but the identity is refused: %v", err)
	}
	check(there, c1, nil)
	if err := there.Reload(); err != nil {
		t.Fatal(err)
	}
	check(there, c1, ErrRevoked)

	// A change over there does not undo the one here.
	if err := there.RevokeIdentity(c2.Identity(), "sold"); err != nil {
		t.Fatal(err)
	}
	if err := here.RevokeSerial("abc123", "by hand", time.Time{}); err != nil {
		t.Fatal(err)
	}
	check(here, c1, ErrRevoked)
	check(here, c2, ErrRevoked)
	if err := here.Accept(c2.Identity()); !errors.Is(err, ErrRevoked) {
		t.Errorf("got %v, want ErrRevoked", err)
	}
	// Renewing does not help.
	if err := c2.Renew(t.Context(), issuer(a, c2.Identity())); err != nil {
		t.Fatal(err)
	}
	check(here, c2, ErrRevoked)

	if err := here.RevokeIdentity(c2.Identity(), "again"); err != nil {
		t.Fatal(err)
	}
	if list := here.List(); len(list) != 3 || list[0].Reason != "stolen" || list[1].Identity != c2.Identity() || list[2].Serial != "abc123" {
		t.Errorf("list is %v", list)
	}
	if err := here.Reinstate(c2.Identity()); err != nil {
		t.Fatal(err)
	}
	check(here, c2, nil)
	check(here, c1, ErrRevoked)
	again, err := OpenRevocations(a.dir)
	if err != nil {
		t.Fatal(err)
	}
	check(again, c2, nil)
	check(again, c1, ErrRevoked)
}

// TestRevocationsOfMany revokes from several sides at once, each with a list of its own, as processes have.
func TestRevocationsOfMany(t *testing.T) {
	a := newAuthority(t, testDomain)
	const sides, each = 4, 8
	var wg sync.WaitGroup
	for side := range sides {
		r, err := a.Revocations()
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for i := range each {
				if err := r.RevokeIdentity(testID(KindConnector, string(rune('a'+side))+string(rune('a'+i))), ""); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	r, err := a.Revocations()
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.List()); n != sides*each {
		t.Errorf("%d of %d revocations were kept", n, sides*each)
	}
}

func TestRevocationsForgetExpired(t *testing.T) {
	a := newAuthority(t, testDomain)
	r, err := a.Revocations()
	if err != nil {
		t.Fatal(err)
	}
	old := forge(t, a, testID(KindConnector, "c1"), func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-72*time.Hour), time.Now().Add(-48*time.Hour)
	})
	young := forge(t, a, testID(KindConnector, "c1"), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Hour) })
	for _, c := range []*x509.Certificate{old.Leaf, young.Leaf} {
		if err := r.RevokeCert(c, ""); err != nil {
			t.Fatal(err)
		}
	}
	if list := r.List(); len(list) != 1 || list[0].Serial != SerialOf(young.Leaf) {
		t.Errorf("list is %v, want only the one that ran out an hour ago", list)
	}
}

func TestRevocationsRefuse(t *testing.T) {
	a := newAuthority(t, testDomain)
	r, err := a.Revocations()
	if err != nil {
		t.Fatal(err)
	}
	if err := r.RevokeIdentity(testID(KindConnector, "c1"), ""); err != nil {
		t.Fatal(err)
	}
	for _, serial := range []string{"", "ABC", "0abc", "xyz", "12:34", strings.Repeat("a", 41)} {
		if err := r.RevokeSerial(serial, "", time.Time{}); err == nil {
			t.Errorf("serial %q was revoked", serial)
		}
	}
	if err := r.RevokeIdentity(Identity{}, ""); err == nil {
		t.Error("no identity was revoked")
	}
	path := filepath.Join(a.dir, revocationsFile)
	for name, text := range map[string]string{
		"empty":              "",
		"no list":            "{}",
		"null":               `{"revoked":null}`,
		"unknown field":      `{"revoked":[],"more":1}`,
		"text after it":      `{"revoked":[]} {"revoked":[]}`,
		"neither":            `{"revoked":[{"reason":"x","at":"2030-01-01T00:00:00Z"}]}`,
		"both":               `{"revoked":[{"serial":"ab","identity":"spiffe://keyhaven.test/edge/e1","at":"2030-01-01T00:00:00Z"}]}`,
		"malformed serial":   `{"revoked":[{"serial":"AB","at":"2030-01-01T00:00:00Z"}]}`,
		"malformed identity": `{"revoked":[{"identity":"edge/e1","at":"2030-01-01T00:00:00Z"}]}`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := r.Reload(); err == nil {
			t.Errorf("%s: was read", name)
		}
		if err := r.RevokeIdentity(testID(KindConnector, "c2"), ""); err == nil {
			t.Errorf("%s: was written over", name)
		}
		if err := r.Accept(testID(KindConnector, "c1")); !errors.Is(err, ErrRevoked) {
			t.Errorf("%s: the list in use was lost: %v", name, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenRevocations(a.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the file: got %v, want ErrNotExist", err)
	}
}

// FuzzRevocations stands for a file that was edited by hand or damaged.
func FuzzRevocations(f *testing.F) {
	f.Add(emptyRevocations)
	data, err := encodeRevocations([]Revocation{
		{Serial: "ab12", Reason: "stolen", At: time.Unix(1e9, 0).UTC(), NotAfter: time.Unix(2e9, 0).UTC()},
		{Identity: testID(KindEdge, "e1"), At: time.Unix(1e9, 0).UTC()},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, data []byte) {
		set, err := decodeRevocations(data)
		if err != nil {
			return
		}
		text, err := encodeRevocations(set.list)
		if err != nil {
			// Text may grow when it is written: by indentation, and six-fold by escapes.
			if 6*len(data)+len(set.list)*64 < maxFileLen {
				t.Errorf("a list of %d bytes cannot be written: %v", len(data), err)
			}
			return
		}
		again, err := decodeRevocations(text)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		if text2, err := encodeRevocations(again.list); err != nil || !bytes.Equal(text, text2) {
			t.Errorf("the list changes when it is written again: %v", err)
		}
	})
}
