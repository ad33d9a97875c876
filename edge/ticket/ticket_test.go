package ticket

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var options = Options{Rotate: time.Hour, Generations: 3}

func openStore(t *testing.T, path string) state.Store {
	t.Helper()
	s, err := state.OpenBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func openKeys(t *testing.T, s state.Store) *Keys {
	t.Helper()
	k, err := Open(t.Context(), s, options)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func testCertificate(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"a.example.com", "b.example.com"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

// A one-key session cache, whatever the server's name: the client of an attacker who carries tickets elsewhere.
type anyCache struct{ last *tls.ClientSessionState }

func (c *anyCache) Get(string) (*tls.ClientSessionState, bool) { return c.last, c.last != nil }
func (c *anyCache) Put(_ string, s *tls.ClientSessionState)    { c.last = s }
func serverConfig(cert tls.Certificate, vers uint16) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{cert}, MaxVersion: vers}
}

// shake runs one handshake and some data, so that a TLS 1.3 ticket arrives, and says whether it resumed a session.
func shake(t *testing.T, server, client *tls.Config) bool {
	t.Helper()
	cc, sc := net.Pipe()
	defer cc.Close()
	defer sc.Close()
	failed := make(chan error, 1)
	go func() {
		c := tls.Server(sc, server)
		_, err := c.Write([]byte("x"))
		failed <- err
	}()
	c := tls.Client(cc, client)
	buf := make([]byte, 1)
	if _, err := c.Read(buf); err != nil {
		t.Fatalf("client: %v", err)
	}
	if err := <-failed; err != nil {
		t.Fatalf("server: %v", err)
	}
	return c.ConnectionState().DidResume
}

func TestResumesWhereItBelongs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	store := openStore(t, path)
	keys := openKeys(t, store)
	cert, roots := testCertificate(t)
	home := Binding{Zone: "one", Key: [20]byte{1}, Epoch: 7}
	for _, vers := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		for _, tt := range []struct {
			name string
			to   Binding
			sni  string
			want bool
		}{
			{"same", home, "a.example.com", true},
			{"same name in another spelling", home, "A.Example.COM", true},
			{"other name", home, "b.example.com", false},
			{"other zone", Binding{"two", home.Key, home.Epoch}, "a.example.com", false},
			{"other key", Binding{home.Zone, [20]byte{2}, home.Epoch}, "a.example.com", false},
			{"later epoch", Binding{home.Zone, home.Key, 8}, "a.example.com", false},
			{"zone and name run together", Binding{"on", home.Key, home.Epoch}, "ea.example.com", false},
		} {
			t.Run(fmt.Sprintf("%s %s", tls.VersionName(vers), tt.name), func(t *testing.T) {
				from, to := serverConfig(cert, vers), serverConfig(cert, vers)
				keys.Bind(from, home)
				keys.Bind(to, tt.to)
				client := &tls.Config{RootCAs: roots, ServerName: "a.example.com", ClientSessionCache: &anyCache{}, InsecureSkipVerify: true}
				if shake(t, from, client) {
					t.Fatal("the first handshake resumed")
				}
				if !shake(t, from, client) {
					t.Fatal("the second handshake did not resume: the test cannot tell")
				}
				client.ServerName = tt.sni
				if got := shake(t, to, client); got != tt.want {
					t.Errorf("resumed = %v, want %v", got, tt.want)
				}
			})
		}
	}
}

func TestSurvivesRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	cert, roots := testCertificate(t)
	b := Binding{Zone: "one"}
	client := &tls.Config{RootCAs: roots, ServerName: "a.example.com", ClientSessionCache: &anyCache{}}
	resumed := func() bool {
		store := openStore(t, path)
		defer store.Close()
		cfg := serverConfig(cert, tls.VersionTLS13)
		openKeys(t, store).Bind(cfg, b)
		return shake(t, cfg, client)
	}
	if resumed() {
		t.Fatal("the first handshake resumed")
	}
	if !resumed() {
		t.Error("no resumption after a restart")
	}
}

func TestTwoEdgesAgree(t *testing.T) {
	store := openStore(t, filepath.Join(t.TempDir(), "state.db"))
	const edges = 8
	ids := make([][idSize]byte, edges)
	var wg sync.WaitGroup
	for i := range edges {
		wg.Go(func() {
			k, err := Open(t.Context(), store, options)
			if err != nil {
				t.Error(err)
				return
			}
			ids[i] = k.ring.Load().newest().id
		})
	}
	wg.Wait()
	for i, id := range ids {
		if id != ids[0] {
			t.Errorf("edge %d has another key than edge 0", i)
		}
	}
}

func TestRotation(t *testing.T) {
	store := &memory{}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		a, err := Open(ctx, store, options)
		if err != nil {
			t.Fatal(err)
		}
		b, err := Open(ctx, store, options)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for _, k := range []*Keys{a, b} {
			wg.Go(func() { _ = k.Run(ctx) })
		}
		defer wg.Wait()
		defer cancel()
		first := a.ring.Load().newest().id
		for hour := 1; hour <= 4; hour++ {
			time.Sleep(time.Hour + 3*time.Second)
			synctest.Wait()
			na, nb := a.ring.Load(), b.ring.Load()
			if na.newest().id != nb.newest().id {
				t.Fatalf("hour %d: the edges disagree", hour)
			}
			if want := min(hour+1, 3); len(na.keys) != want {
				t.Errorf("hour %d: %d keys, want %d", hour, len(na.keys), want)
			}
			if got, want := na.find(first) != nil, hour < 3; got != want {
				t.Errorf("hour %d: the first key is accepted: %v, want %v", hour, got, want)
			}
		}
	})
}

func TestStaleKeysAreDropped(t *testing.T) {
	store := &memory{}
	synctest.Test(t, func(t *testing.T) {
		k, err := Open(t.Context(), store, options)
		if err != nil {
			t.Fatal(err)
		}
		old := k.ring.Load().newest().id
		time.Sleep(30 * 24 * time.Hour)
		k, err = Open(t.Context(), store, options)
		if err != nil {
			t.Fatal(err)
		}
		if k.ring.Load().find(old) != nil {
			t.Error("a key a month old is accepted")
		}
	})
}

func TestGarbageIsNoTicket(t *testing.T) {
	keys := openKeys(t, openStore(t, filepath.Join(t.TempDir(), "state.db")))
	b := Binding{Zone: "one"}
	good, err := keys.wrap(b, "a.example.com", sessionState(t))
	if err != nil {
		t.Fatal(err)
	}
	if keys.unwrap(b, "a.example.com", good) == nil {
		t.Fatal("a good ticket is refused")
	}
	for i := range good {
		bad := bytes.Clone(good)
		bad[i] ^= 0x40
		if keys.unwrap(b, "a.example.com", bad) != nil {
			t.Fatalf("a ticket with byte %d changed is accepted", i)
		}
	}
	for n := range good {
		if keys.unwrap(b, "a.example.com", good[:n]) != nil {
			t.Fatalf("a ticket cut to %d bytes is accepted", n)
		}
	}
	if keys.unwrap(b, "a.example.com", append(good, make([]byte, maxTicket)...)) != nil {
		t.Fatal("a huge ticket is accepted")
	}
}

// sessionState obtains a server's session from a real handshake.
func sessionState(tb testing.TB) *tls.SessionState {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	var got *tls.SessionState
	server := &tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		WrapSession: func(_ tls.ConnectionState, ss *tls.SessionState) ([]byte, error) {
			got = ss
			return []byte("x"), nil
		},
	}
	cc, sc := net.Pipe()
	defer cc.Close()
	defer sc.Close()
	done := make(chan error, 1)
	go func() { done <- tls.Server(sc, server).Handshake() }()
	c := tls.Client(cc, &tls.Config{InsecureSkipVerify: true, ServerName: "a.example.com", ClientSessionCache: &anyCache{}})
	if err := c.Handshake(); err != nil {
		tb.Fatal(err)
	}
	go func() { _, _ = c.Read(make([]byte, 1)) }()
	if err := <-done; err != nil || got == nil {
		tb.Fatalf("handshake: %v, session %v", err, got)
	}
	return got
}

// The ticket comes from a visitor who has proved nothing.
func FuzzUnwrap(f *testing.F) {
	keys := &Keys{opts: options}
	r := (&Keys{opts: options}).successor(&ring{}, time.Now())
	keys.ring.Store(r)
	b := Binding{Zone: "one"}
	good, err := keys.wrap(b, "a.example.com", sessionState(f))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(good[:headSize+nonceSize])
	f.Fuzz(func(t *testing.T, ticket []byte) {
		if keys.unwrap(b, "a.example.com", ticket) != nil && !bytes.Equal(ticket, good) {
			t.Fatal("a ticket that was not made here is accepted")
		}
	})
}

// The record comes from the store, which other edges write.
func FuzzDecode(f *testing.F) {
	r := (&Keys{opts: options}).successor(&ring{}, time.Now())
	f.Add(r.encode())
	f.Add((&ring{}).encode())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := decode(b)
		if err == nil && !bytes.Equal(r.encode(), b) {
			t.Fatalf("decode(%x) encodes as %x", b, r.encode())
		}
	})
}

func TestMalformedRecordIsAnError(t *testing.T) {
	store := openStore(t, filepath.Join(t.TempDir(), "state.db"))
	if _, err := state.Create(t.Context(), store, storeKey, []byte("nonsense")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), store, options); err == nil || !strings.Contains(err.Error(), storeKey) {
		t.Errorf("Open = %v, want an error that names %s", err, storeKey)
	}
}

func TestSecretsDoNotPrint(t *testing.T) {
	keys := openKeys(t, openStore(t, filepath.Join(t.TempDir(), "state.db")))
	secret := keys.ring.Load().newest().secret
	for _, s := range []string{fmt.Sprint(keys), fmt.Sprintf("%+v", keys), fmt.Sprintf("%#v", keys)} {
		if strings.Contains(s, fmt.Sprintf("%x", secret[:8])) || strings.Contains(s, fmt.Sprint(secret[:8])) {
			t.Errorf("the secret shows in %q", s)
		}
	}
}

// memory is a store for synctest, which cannot wait for files.
type memory struct {
	mu      sync.Mutex
	value   []byte
	rev     state.Revision
	watches []chan state.Event
}

func (m *memory) Get(context.Context, string) (state.Entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rev == 0 {
		return state.Entry{}, state.ErrNotFound
	}
	return state.Entry{Key: storeKey, Value: m.value, Revision: m.rev}, nil
}

func (m *memory) List(context.Context, string) ([]state.Entry, state.Revision, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return nil, m.rev, nil
}

func (m *memory) Txn(_ context.Context, conds []state.Cond, ops []state.Op) (state.Revision, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if conds[0].Revision != m.rev {
		return 0, state.ErrConflict
	}
	m.rev++
	m.value = ops[0].Value
	for _, w := range m.watches {
		w <- state.Event{Entry: state.Entry{Key: storeKey, Value: m.value, Revision: m.rev}}
	}
	return m.rev, nil
}

func (m *memory) Watch(ctx context.Context, _ string, after state.Revision) (<-chan state.Event, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if after != m.rev {
		return nil, errors.New("the test's store has no history")
	}
	ch := make(chan state.Event, 16)
	m.watches = append(m.watches, ch)
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		for i, w := range m.watches {
			if w == ch {
				m.watches = append(m.watches[:i], m.watches[i+1:]...)
				close(ch)
				return
			}
		}
	})
	return ch, nil
}

func (m *memory) Close() error { return nil }
