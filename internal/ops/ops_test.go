package ops

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func TestServer(t *testing.T) {
	var fault error
	reg := NewRegistry()
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "keyhaven_test_total", Help: "A test."})
	reg.MustRegister(c)
	c.Inc()
	addr := make(chan net.Addr, 1)
	s := &Server{Addr: "127.0.0.1:0", Registry: reg, Ready: func(context.Context) error { return fault }, Degraded: func() []string { return []string{"one home of two"} },
		Listening: func(a net.Addr) { addr <- a }}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	base := "http://" + (<-addr).String()

	if code, _ := get(t, base+"/healthz"); code != 200 {
		t.Errorf("healthz: got %d, want 200", code)
	}
	if code, body := get(t, base+"/readyz"); code != 200 || body != "ready\ndegraded: one home of two\n" {
		t.Errorf("readyz: got %d %q, want 200 with what does not work", code, body)
	}
	fault = errors.New("token away")
	if code, body := get(t, base+"/readyz"); code != 503 || !strings.Contains(body, "token away") || strings.Contains(body, "degraded") {
		t.Errorf("readyz: got %d %q, want 503 with the reason", code, body)
	}
	if _, body := get(t, base+"/metrics"); !strings.Contains(body, "keyhaven_test_total 1") || !strings.Contains(body, "go_goroutines") {
		t.Errorf("metrics lack names: %.200s", body)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestLoopbackOnly(t *testing.T) {
	for _, addr := range []string{"0.0.0.0:9100", ":9100", "192.0.2.1:9100", "[::]:9100", "nonsense"} {
		if err := (&Server{Addr: addr}).Run(t.Context()); err == nil {
			t.Errorf("Run on %q: got nil, want a refusal", addr)
		}
	}
	for _, addr := range []string{"", "127.0.0.1:9100", "[::1]:9100", "localhost:9100"} {
		if err := CheckAddr(addr, false); err != nil {
			t.Errorf("CheckAddr(%q): %v", addr, err)
		}
	}
}
