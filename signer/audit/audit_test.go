package audit

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("AUDIT_TEST_CHILD"); dir != "" {
		commitForever(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

const testServer = "spiffe://keys.example/keyserver/one"

// newKey writes an audit key and returns its signer, and its public half.
func newKey(t testing.TB) (CheckpointSigner, crypto.PublicKey) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.key")
	writeKey(t, path)
	s, err := FileSigner(path)
	if err != nil {
		t.Fatal(err)
	}
	return s, s.Public()
}

func writeKey(t testing.TB, path string) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// testRecord returns a record with every member set.
func testRecord(i int) *signer.Record {
	return &signer.Record{
		Time: time.Now(), Duration: 1234567, Peer: "spiffe://keys.example/edge/one", Op: "tls-sign", Scheme: "ecdsa-sha256",
		SKI: keyless.SKI{1, 2, 3}, Label: "www", SNI: fmt.Sprintf("host%d.example", i), ClientIP: netip.MustParseAddr("192.0.2.7"),
		ServerIP: netip.MustParseAddr("2001:db8::1"), Addr: netip.MustParseAddrPort("10.0.0.1:4711"), Hash: sha256.Sum256([]byte{byte(i)}),
		Home: "token:a", Waited: 5 * time.Microsecond, Took: 80 * time.Microsecond, Tries: 1, Hedged: i%2 == 0,
		TraceID: "4bf92f3577b34da6a3ce929d0e0e4736", RequestID: fmt.Sprintf("request %d", i), Result: signer.ResultOK,
	}
}

// running is a Log whose Run runs.
type running struct {
	*Log
	stop context.CancelFunc
	done chan error
}

func open(t testing.TB, c Config) *running {
	t.Helper()
	l, err := Open(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &running{Log: l, stop: stop, done: make(chan error, 1)}
	go func() { r.done <- l.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		<-l.w.ended
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// end stops the log and returns what Run returned.
func (r *running) end(t testing.TB) error {
	t.Helper()
	r.stop()
	err := <-r.done
	if cerr := r.Close(); cerr != nil {
		t.Error(cerr)
	}
	return err
}

func (r *running) commit(t testing.TB, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := r.Commit(t.Context(), testRecord(i)); err != nil {
			t.Fatalf("record %d: %v", i, err)
		}
	}
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 seconds: %s", what)
		}
	}
}

func TestLogIsKept(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	c := Config{Dir: dir, Mode: Required, Server: testServer, Signer: key}
	l := open(t, c)
	l.commit(t, 0, 10)
	if err := l.Rotate(t.Context()); err != nil {
		t.Fatal(err)
	}
	l.commit(t, 10, 15)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	if err := l.Commit(t.Context(), testRecord(0)); err != ErrClosed {
		t.Errorf("commit after the end: got %v, want %v", err, ErrClosed)
	}
	l = open(t, c)
	l.commit(t, 15, 20)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep, err := Verify(t.Context(), VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if err != nil || rep.Problem != nil {
		t.Fatal(err, rep.Problem)
	}
	if rep.Records != 20 || rep.Covered != 20 || rep.Uncovered != 0 || rep.Files != 3 || rep.Server != testServer {
		t.Errorf("got %+v", rep)
	}
	got := 0
	for i := 1; i <= 3; i++ {
		lines, err := openLines(filepath.Join(dir, fileName(i)), false)
		if err != nil {
			t.Fatal(err)
		}
		for line, err := lines.next(); err == nil; line, err = lines.next() {
			l, err := ParseLine(line)
			if err != nil {
				t.Fatal(err)
			}
			if l.Kind == KindOp {
				want := testRecord(got)
				want.Time = l.Op.Time
				if l.Op != *want {
					t.Errorf("got  %+v\nwant %+v", l.Op, *want)
				}
				got++
			}
		}
		lines.close()
	}
	if got != 20 {
		t.Errorf("got %d records, want 20", got)
	}
}
