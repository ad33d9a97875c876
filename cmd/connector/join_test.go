package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

func TestJoin(t *testing.T) {
	t.Parallel()
	in := install(t)
	hour := time.Now().Add(time.Hour)
	used := in.token(t, hour)
	if out, code := runProgram(t, used, "join", "--token-file", "-", "--dir", filepath.Join(t.TempDir(), "id")); code != 0 {
		t.Fatalf("join: exit code %d: %s", code, out)
	}
	unknown := in.token(t, hour)
	if tok, err := mtls.ParseJoinToken(unknown); err != nil {
		t.Fatal(err)
	} else {
		delete(in.tokens, tok.ID)
	}
	other, err := mtls.NewJoinToken([32]byte{1}, []string{in.addr})
	if err != nil {
		t.Fatal(err)
	}
	open := write(t, filepath.Join(t.TempDir(), "token"), in.token(t, hour))
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	taken := in.joined(t)
	for _, tt := range []struct {
		name  string
		token string // on standard input
		args  []string
		code  int
		says  []string
	}{
		{"good", in.token(t, hour), nil, 0, []string{"spiffe://test.example/connector/site-1", "tunnel-1", in.addr}},
		{"used", used, nil, 1, []string{"used before", "ask for a new one", "keyhaven-edge tunnel token create"}},
		{"named", in.token(t, hour), []string{"--name", "site-2"}, 0, []string{"connector/site-2"}},
		{"expired", in.token(t, time.Now().Add(-time.Minute)), nil, 1, []string{"expired", "ask for a new one"}},
		{"unknown", unknown, nil, 1, []string{"does not know the join token"}},
		{"second edge answers", in.token(t, hour, silentEdge, in.addr), nil, 0, []string{"site-1"}},
		{"unreachable edge", in.token(t, hour, silentEdge), nil, 1, []string{silentEdge, "not used up"}},
		{"edge of another authority", other.Reveal(), nil, 1, []string{in.addr}},
		{"malformed", "khj1_nonsense", nil, 3, []string{"join token", "khj1_"}},
		{"empty", "", nil, 3, []string{"join token"}},
		{"too long", strings.Repeat("x", 9000), nil, 3, []string{"8192"}},
		{"missing file", "", []string{"--token-file", "/nonexistent/token"}, 3, []string{"/nonexistent/token"}},
		{"file open to others", "", []string{"--token-file", open}, 3, []string{"chmod 600"}},
		{"taken directory", in.token(t, hour), []string{"--dir", taken}, 3, []string{taken, "another directory"}},
		{"no directory", "", []string{"--dir", ""}, 2, []string{"--dir"}},
		{"no token", "", []string{"--token-file", ""}, 2, []string{"--token-file"}},
		{"unknown carrier", "", []string{"--carrier", "sctp"}, 2, []string{"--carrier", "auto"}},
		{"proxy over QUIC alone", "", []string{"--carrier", "quic", "--proxy", "http://127.0.0.1:9"}, 2, []string{"--proxy"}},
		{"password in the proxy's URL", "", []string{"--proxy", "http://u:canary@127.0.0.1:9"}, 2, []string{"--proxy", "password_file"}},
		{"half of a proxy's login", "", []string{"--proxy", "http://127.0.0.1:9", "--proxy-user", "u"}, 2, []string{"--proxy-password-file", "both"}},
		{"password open to others", "", []string{"--proxy", "http://127.0.0.1:9", "--proxy-user", "u", "--proxy-password-file", open}, 3,
			[]string{"--proxy-password-file", "chmod 600"}},
		{"token as argument", "", []string{used}, 2, []string{"--token-file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := append([]string{"join", "--token-file", "-", "--dir", filepath.Join(t.TempDir(), "id")}, tt.args...)
			out, code := runProgram(t, tt.token, args...)
			if code != tt.code {
				t.Errorf("exit code %d, want %d: %s", code, tt.code, out)
			}
			for _, want := range tt.says {
				if !strings.Contains(out, want) {
					t.Errorf("output %q, want it to say %q", out, want)
				}
			}
			for _, secret := range []string{tt.token, used} {
				if len(secret) > 40 && strings.Contains(out, secret[30:]) {
					t.Errorf("the token is in the output: %s", out)
				}
			}
		})
	}
}

// authProxy is an HTTP proxy that wants a login, and lets it connect to host alone, which is at addr. It counts what it was asked.
func authProxy(t *testing.T, user, password, host, addr string) (proxy *httptest.Server, asked *atomic.Int32) {
	t.Helper()
	asked = &atomic.Int32{}
	proxy = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		r.Header.Set("Authorization", r.Header.Get("Proxy-Authorization"))
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		if r.Method != http.MethodConnect || r.Host != host {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		to, err := net.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer to.Close() //nolint:errcheck // a test's
		w.WriteHeader(http.StatusOK)
		conn, rw, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close() //nolint:errcheck // a test's
		if err := rw.Flush(); err != nil {
			t.Error(err)
			return
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			io.Copy(to, rw)                //nolint:errcheck // ends with either side
			to.(*net.TCPConn).CloseWrite() //nolint:errcheck // a test's
		})
		io.Copy(conn, to) //nolint:errcheck // ends with either side
		conn.Close()      //nolint:errcheck // the other copy ends
		wg.Wait()
	}))
	t.Cleanup(proxy.Close)
	return proxy, asked
}

// A site whose way out is a proxy alone joins through it, and the token is used once.
func TestJoinThroughProxy(t *testing.T) {
	t.Parallel()
	const canary = "s3cret-canary"
	in := install(t)
	const edge = "edge.test:7844" // a name that the proxy alone knows
	proxy, asked := authProxy(t, "site", canary, edge, in.addr)
	password := write(t, filepath.Join(t.TempDir(), "password"), canary+"\n")
	wrong := write(t, filepath.Join(t.TempDir(), "wrong"), "other\n")
	token := in.token(t, time.Now().Add(time.Hour), edge)
	through := func(carrier, password string) (string, int) {
		return runProgram(t, token, "join", "--token-file", "-", "--dir", filepath.Join(t.TempDir(), "id"), "--carrier", carrier,
			"--proxy", proxy.URL, "--proxy-user", "site", "--proxy-password-file", password)
	}
	if out, code := through("auto", wrong); code != 1 || !strings.Contains(out, "407") || strings.Contains(out, canary) {
		t.Errorf("wrong password: exit code %d: %s", code, out)
	}
	if out, code := through("auto", password); code != 0 || strings.Contains(out, canary) || !strings.Contains(out, "under transport") {
		t.Errorf("auto: exit code %d: %s", code, out)
	}
	token = in.token(t, time.Now().Add(time.Hour), edge)
	if out, code := through("tcp", password); code != 0 {
		t.Errorf("tcp: exit code %d: %s", code, out)
	}
	if asked.Load() < 3 {
		t.Errorf("the proxy was asked %d times", asked.Load())
	}
}

// silentEdge is an address where nothing listens.
const silentEdge = "127.0.0.1:9"
