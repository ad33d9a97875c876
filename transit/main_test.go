package transit

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/signer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var p256 = signer.Algorithm{Kind: signer.ECDSA, Hash: crypto.SHA256}

// fake is a server that serves one P-256 key, web, and goes wrong as a test says. The real engine is met in interop/vault.
type fake struct {
	t     testing.TB
	key   *ecdsa.PrivateKey
	http  *httptest.Server
	dir   string
	signs atomic.Int64
	// silent has logins go unanswered.
	silent atomic.Bool
	// sign answers requests to sign in place of right. It may be set before the first request.
	sign func(w http.ResponseWriter, r *http.Request, req *signRequest)
	// info is merged into what keys/web says.
	info map[string]any
}

func newFake(t testing.TB) *fake {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	f := &fake{t: t, key: key, dir: t.TempDir()}
	f.http = httptest.NewUnstartedServer(f.handler())
	t.Cleanup(f.http.Close)
	return f
}

func (f *fake) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/auth/token/lookup-self", func(w http.ResponseWriter, r *http.Request) {
		if f.silent.Load() {
			<-r.Context().Done()
			return
		}
		tell(w, map[string]any{"data": map[string]any{"ttl": 0, "expire_time": nil}})
	})
	mux.HandleFunc("GET /v1/transit/keys/{name}", func(w http.ResponseWriter, r *http.Request) {
		der, err := x509.MarshalPKIXPublicKey(&f.key.PublicKey)
		if err != nil {
			f.t.Error(err)
		}
		data := map[string]any{
			"type": "ecdsa-p256", "exportable": false, "allow_plaintext_backup": false, "latest_version": 1, "min_decryption_version": 1,
			"keys": map[string]any{"1": map[string]any{"public_key": string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))}},
		}
		for k, v := range f.info {
			data[k] = v
		}
		tell(w, map[string]any{"data": data})
	})
	mux.HandleFunc("PUT /v1/transit/sign/{name}", func(w http.ResponseWriter, r *http.Request) {
		f.signs.Add(1)
		req := new(signRequest)
		if err := json.NewDecoder(r.Body).Decode(req); err != nil {
			f.t.Error(err)
		}
		if f.sign != nil {
			f.sign(w, r, req)
			return
		}
		f.right(w, req)
	})
	return mux
}

// right answers as a server should.
func (f *fake) right(w http.ResponseWriter, req *signRequest) {
	if req.Batch == nil {
		tell(w, map[string]any{"data": map[string]any{"signature": f.signature(req.Input)}})
		return
	}
	var out []map[string]any
	for _, in := range req.Batch {
		out = append(out, map[string]any{"signature": f.signature(in.Input)})
	}
	tell(w, map[string]any{"data": map[string]any{"batch_results": out}})
}

func (f *fake) signature(digest []byte) string {
	sig, err := ecdsa.SignASN1(rand.Reader, f.key, digest)
	if err != nil {
		f.t.Error(err)
	}
	return "vault:v1:" + base64.StdEncoding.EncodeToString(sig)
}

func tell(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v)
}

// config is one for the fake, which it starts unless it is started.
func (f *fake) config() Config {
	f.t.Helper()
	if f.http.URL == "" {
		f.http.Start()
	}
	return Config{
		Address: f.http.URL, Keys: []KeyConfig{{Name: "web"}}, Timeout: 20 * time.Second,
		Auth: AuthConfig{Method: AuthTokenFile, TokenFile: write(f.t, f.dir, "token", "hvs.canary\n", 0o600)},
	}
}

func (f *fake) open(cfg Config) (*Backend, signer.Key) {
	f.t.Helper()
	b, err := Open(context.Background(), cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := b.Close(); err != nil {
			f.t.Error(err)
		}
	})
	keys, err := b.Keys(context.Background())
	if err != nil || len(keys) != 1 {
		f.t.Fatalf("got keys %v, %v; faults %v", keys, err, b.Faults())
	}
	return b, keys[0]
}

func write(t testing.TB, dir, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// signVerified signs a random digest and checks the signature.
func signVerified(ctx context.Context, k signer.Key) error {
	digest := make([]byte, 32)
	rand.Read(digest)
	sig, err := k.Sign(ctx, p256, digest)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(k.Public().(*ecdsa.PublicKey), digest, sig) {
		return fmt.Errorf("the signature is wrong")
	}
	return nil
}
