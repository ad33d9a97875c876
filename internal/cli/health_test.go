package cli

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/freeport"
)

func TestHealth(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("/readyz", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "not ready: no session to an edge", http.StatusServiceUnavailable)
	})
	srv := httptest.NewServer(mux)
	defer srv.Close()
	up := srv.Listener.Addr().String()
	_, port, err := net.SplitHostPort(up)
	if err != nil {
		t.Fatal(err)
	}
	down, err := freeport.Addr("127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("line 3: no such key")
	tests := []struct {
		name, addr string
		conf, ask  error
		args       []string
		code       int
		want       string
	}{
		{"live", up, nil, nil, []string{"--live"}, ExitOK, "ok\n"},
		{"live, on all addresses", ":" + port, nil, nil, []string{"--live"}, ExitOK, "ok\n"},
		{"live, on all of IPv4", "0.0.0.0:" + port, nil, nil, []string{"--live"}, ExitOK, "ok\n"},
		{"not ready", up, nil, nil, nil, ExitRuntime, "no session to an edge"},
		{"nobody", down, nil, nil, nil, ExitRuntime, "ops.listen"},
		{"asked another way", "", nil, nil, nil, ExitOK, "ok\n"},
		{"refused another way", "", nil, errors.New("no socket"), nil, ExitRuntime, "no socket"},
		{"wrong configuration", up, broken, nil, nil, ExitConfig, "line 3"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			root := New("prog", "a program")
			root.AddCommand(Health("/etc/prog.yaml", func(config string) (string, error) {
				if config != "here.yaml" {
					t.Errorf("asked for the configuration %s", config)
				}
				return tt.addr, tt.conf
			}, func(*cobra.Command, bool) error { return tt.ask }))
			root.SetOut(&out)
			root.SetArgs(append([]string{"health", "--config", "here.yaml"}, tt.args...))
			if code := Execute(context.Background(), root, &out); code != tt.code || !strings.Contains(out.String(), tt.want) {
				t.Errorf("got %d, %q, want %d, %q", code, out.String(), tt.code, tt.want)
			}
		})
	}
}

func TestOnThisHost(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:9": "127.0.0.1:9", ":9": "127.0.0.1:9", "0.0.0.0:9": "127.0.0.1:9", "[::]:9": "[::1]:9", "[::1]:9": "[::1]:9", "localhost:9": "localhost:9",
	} {
		if got := onThisHost(addr); got != want {
			t.Errorf("%s: got %s, want %s", addr, got, want)
		}
	}
}
