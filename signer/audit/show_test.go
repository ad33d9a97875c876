package audit

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/csv"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

var discard = slog.New(slog.DiscardHandler)

// mixedLog writes a log of n operations in two files, of which every third is refused, and one is hostile.
func mixedLog(t testing.TB, key CheckpointSigner, n int) string {
	t.Helper()
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key})
	for i := range n {
		r := testRecord(i)
		r.Time = time.Date(2026, 1, 2, 3, 0, i, 0, time.UTC)
		if i%3 == 0 {
			r.Result, r.Reason = signer.ResultRefused, "no"
		}
		if i == 4 {
			r.SNI = "=cmd()\x1b[2J\n\xff\u202e"
		}
		if err := l.Commit(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		if i == n/2 {
			if err := l.Rotate(t.Context()); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a checkpoint", func() bool { return l.Stats().Covered >= uint64(i) })
		}
	}
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestShow(t *testing.T) {
	key, _ := newKey(t)
	dir := mixedLog(t, key, 12)
	at := func(s int) time.Time { return time.Date(2026, 1, 2, 3, 0, s, 0, time.UTC) }
	for _, c := range []struct {
		name string
		f    Filter
		want int
	}{
		{"refused", Filter{Result: "refused"}, 4},
		{"time", Filter{Since: at(2), Until: at(5)}, 3},
		{"one name", Filter{SNI: "host7.example"}, 1},
		{"names", Filter{SNI: "host*.example"}, 11},
		{"pattern in two parts", Filter{SNI: "h*1*e"}, 3}, // 1, 10, 11
		{"client", Filter{Client: "spiffe://*/edge/one"}, 12},
		{"other client", Filter{Client: "spiffe://*/edge/two"}, 0},
		{"label", Filter{Key: "www"}, 12},
		{"key", Filter{Key: "0102030000000000000000000000000000000000"}, 12},
		{"other op", Filter{Op: "decrypt"}, 0},
		{"both", Filter{Result: "refused", Since: at(6)}, 2},
		{"seq", Filter{First: 1, Last: 1}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, table bytes.Buffer
			if err := Show(t.Context(), Source{Dir: dir}, c.f, "json", &out); err != nil {
				t.Fatal(err)
			}
			if got := len(lines(out.Bytes())); got != c.want {
				t.Errorf("got %d lines, want %d:\n%s", got, c.want, out.String())
			}
			for _, raw := range lines(out.Bytes()) {
				if _, err := ParseLine(raw); err != nil {
					t.Error(err)
				}
			}
			if err := Show(t.Context(), Source{Dir: dir}, c.f, "table", &table); err != nil {
				t.Fatal(err)
			}
			if got := len(lines(table.Bytes())); got != c.want+1 {
				t.Errorf("got %d rows, want %d and a head:\n%s", got, c.want, table.String())
			}
			if bytes.ContainsFunc(table.Bytes(), func(r rune) bool { return r != '\n' && (r < ' ' || r > '~') }) {
				t.Errorf("the table holds what a terminal acts on: %q", table.String())
			}
		})
	}
	if err := Show(t.Context(), Source{Dir: dir}, Filter{First: 2, Last: 1}, "json", new(bytes.Buffer)); err == nil {
		t.Error("an empty range was taken")
	}
	path := filepath.Join(dir, fileName(2))
	write(t, path, bytes.Replace(read(t, path), []byte("host9"), []byte("host8"), 1))
	var p *Problem
	var out bytes.Buffer
	if err := Show(t.Context(), Source{Dir: dir}, Filter{Result: "ok"}, "json", &out); !errors.As(err, &p) || p.Kind != Altered || len(lines(out.Bytes())) != 6 {
		t.Errorf("got %v and\n%s", err, out.String())
	}
}

func TestExport(t *testing.T) {
	key, pub := newKey(t)
	dir := mixedLog(t, key, 12)
	keys := []crypto.PublicKey{pub}
	last := verify(t, VerifyConfig{Dir: dir, Keys: keys}).Last
	upTo := make([]uint64, last+1) // operations up to a seq
	if _, err := (Source{Dir: dir}).walk(t.Context(), func(l *Line, _ []byte) error {
		upTo[l.Seq] = upTo[l.Seq-1]
		if l.Kind == KindOp {
			upTo[l.Seq]++
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "export.jsonl")
	for first := uint64(1); first <= last; first++ {
		for end := first; end <= last; end += 4 {
			var out bytes.Buffer
			if err := Export(t.Context(), Source{Dir: dir}, Filter{First: first, Last: end}, "jsonl", &out); err != nil {
				t.Fatal(err)
			}
			write(t, path, out.Bytes())
			rep := verify(t, VerifyConfig{Files: []string{path}, Keys: keys})
			if rep.Problem != nil || rep.First != first || rep.Last < end || end < last && rep.Covered < upTo[end]-upTo[first-1] || rep.Server != testServer {
				t.Fatalf("seq %d to %d: got %+v (%v)", first, end, rep, rep.Problem)
			}
		}
	}
	since := time.Date(2026, 1, 2, 3, 0, 3, 0, time.UTC)
	var out bytes.Buffer
	if err := Export(t.Context(), Source{Dir: dir}, Filter{Since: since, Until: since.Add(3 * time.Second)}, "jsonl", &out); err != nil {
		t.Fatal(err)
	}
	for i := range out.Len() {
		b := bytes.Clone(out.Bytes())
		b[i] ^= 1
		write(t, path, b)
		if rep, err := Verify(t.Context(), VerifyConfig{Files: []string{path}, Keys: keys}); err == nil && rep.Problem == nil {
			t.Errorf("byte %d was changed and nobody noticed", i)
		}
	}
	out.Reset()
	if err := Export(t.Context(), Source{Dir: dir}, Filter{Result: "refused"}, "jsonl", &out); err != nil {
		t.Fatal(err)
	}
	write(t, path, out.Bytes())
	if _, err := Verify(t.Context(), VerifyConfig{Files: []string{path}, Keys: keys}); err == nil || !strings.Contains(err.Error(), "filtered") {
		t.Errorf("a filtered export: got %v", err)
	}
	if err := Export(t.Context(), Source{Dir: dir}, Filter{Client: "nobody"}, "jsonl", &out); err == nil {
		t.Error("an export of nothing was written")
	}
}

func TestExportCSV(t *testing.T) {
	key, _ := newKey(t)
	dir := mixedLog(t, key, 12)
	var out bytes.Buffer
	if err := Export(t.Context(), Source{Dir: dir}, Filter{}, "csv", &out); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(&out).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(rows) != 13 || strings.Join(rows[0], " ") != strings.Join(csvHead, " ") {
		t.Fatalf("got %d rows", len(rows))
	}
	if got := rows[5][18]; !strings.HasPrefix(got, "'=cmd()") {
		t.Errorf("got %q, want no formula", got)
	}
	if got, want := rows[2][3], testRecord(1).Peer; got != want {
		t.Errorf("got client %q, want %q", got, want)
	}
}

func pemFile(t testing.TB, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	write(t, path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	return path
}

// Checkpoints by keys of the registry, of each type, verified with what is in a certificate or a public key file.
func TestKeySigner(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]crypto.Signer{"rsa-pss-sha256": rsaKey, "ed25519": ed}
	for alg, curve := range map[string]elliptic.Curve{"ecdsa-sha256": elliptic.P256(), "ecdsa-sha384": elliptic.P384(), "ecdsa-sha512": elliptic.P521()} {
		if keys[alg], err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	for alg, k := range keys {
		t.Run(alg, func(t *testing.T) {
			t.Parallel()
			mem, err := signer.NewMemoryKey(k, "audit")
			if err != nil {
				t.Fatal(err)
			}
			reg := signer.NewRegistry()
			find := func() *signer.Entry {
				if found := reg.ByName("audit"); len(found) == 1 {
					return found[0]
				}
				return nil
			}
			dir := t.TempDir()
			// At first the key's home is away.
			l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: KeySigner(find)})
			l.commit(t, 0, 2)
			eventually(t, "a failure", func() bool { return strings.Contains(l.Stats().CheckpointErr, "not available") })
			if err := reg.Replace([]signer.Home{{Key: mem}}); err != nil {
				t.Fatal(err)
			}
			eventually(t, "a checkpoint", func() bool { return l.Stats().Checkpoints > 0 })
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			spki, err := x509.MarshalPKIXPublicKey(k.Public())
			if err != nil {
				t.Fatal(err)
			}
			template := &x509.Certificate{SerialNumber: big.NewInt(1)}
			cert, err := x509.CreateCertificate(rand.Reader, template, template, k.Public(), k)
			if err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{pemFile(t, "key.pem", "PUBLIC KEY", spki), pemFile(t, "cert.pem", "CERTIFICATE", cert)} {
				pubs, err := LoadKeys(path)
				if err != nil {
					t.Fatal(err)
				}
				rep := verify(t, VerifyConfig{Dir: dir, Keys: pubs})
				if rep.Problem != nil || rep.Covered != 2 || rep.Checkpoints == 0 {
					t.Errorf("got %+v (%v)", rep, rep.Problem)
				}
			}
			anchor, err := LoadAnchor(filepath.Join(dir, headFile))
			if err != nil || anchor.Checkpoint.Alg != alg {
				t.Errorf("got %+v, %v", anchor, err)
			}
		})
	}
}

func TestKeyFilesThatAreRefused(t *testing.T) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(t.TempDir(), "open.key")
	writeKey(t, open)
	chmod(t, open, 0o640)
	for _, c := range []struct{ name, path, says string }{
		{"readable by others", open, "chmod 600"},
		{"ECDSA", pemFile(t, "a", "PRIVATE KEY", der), "Ed25519"},
		{"a certificate", pemFile(t, "b", "CERTIFICATE", der), "PRIVATE KEY"},
		{"garbage", pemFile(t, "c", "PRIVATE KEY", []byte("canary-secret")), "PKCS #8"},
		{"nothing", filepath.Join(t.TempDir(), "none"), "no such file"},
	} {
		_, err := FileSigner(c.path)
		if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.path) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: got %v, want %q", c.name, err, c.says)
		}
	}
	if _, err := LoadKeys(pemFile(t, "d", "PRIVATE KEY", der)); err == nil || !strings.Contains(err.Error(), "PUBLIC KEY") {
		t.Errorf("private key as public key: got %v", err)
	}
}
