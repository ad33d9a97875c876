package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// An agent reports over the control socket, an edge gets the report and gives a directive, and status shows both.
func TestDeviceReport(t *testing.T) {
	t.Parallel()
	in := install(t)
	tmp := t.TempDir()
	socket := filepath.Join(tmp, "control.sock")
	config := write(t, filepath.Join(tmp, "connector.yaml"), fmt.Sprintf("identity:\n  dir: %s\nallow: []\ncontrol: %s\n", in.joined(t), socket))
	start(t, "run", "--config", config).wait(t, "session up")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	edge := in.session(t)
	if b, err := edge.Device(ctx, nil); err != nil || len(b) != 0 {
		t.Errorf("without an agent: %q, %v", b, err)
	}
	if text, _ := runProgram(t, "", "status", "--config", config); strings.Contains(text, "device") {
		t.Errorf("status shows a device without an agent:\n%s", text)
	}
	r := fleet.Report{Product: "keyhaven-appliance", Version: "1.0.0", State: fleet.RolledBack, Target: "1.1.0", Error: "no tunnel in time"}
	if d, err := fleet.Exchange(ctx, socket, r); err != nil || d != (fleet.Directive{}) {
		t.Errorf("before the edge spoke: %+v, %v", d, err)
	}
	want := fleet.Directive{Policy: fleet.Update, Version: "1.2.0", Rollout: "spring"}
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	answer, err := edge.Device(ctx, b)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := fleet.ParseReport(answer); err != nil || got != r {
		t.Errorf("the edge got %+v, %v; want %+v", got, err, r)
	}
	if d, err := fleet.Exchange(ctx, socket, r); err != nil || d != want {
		t.Errorf("directive %+v, %v; want %+v", d, err, want)
	}
	text, _ := runProgram(t, "", "status", "--config", config)
	for _, part := range []string{"keyhaven-appliance 1.0.0, rolled_back 1.1.0 (no tunnel in time)", "the edge wants 1.2.0"} {
		if !strings.Contains(text, part) {
			t.Errorf("status does not say %q:\n%s", part, text)
		}
	}
	client := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	for name, tt := range map[string]struct {
		body   string
		change func(*http.Request)
		status int
	}{
		"garbage": {"x", nil, http.StatusBadRequest},
		"a code":  {`{"product":"p","version":"1","state":"idle","run":"rm"}`, nil, http.StatusBadRequest},
		// Not so large that the server, which reads no more than it may, hangs up on who still sends.
		"too large":  {strings.Repeat(" ", 2*fleet.MaxSize), nil, http.StatusBadRequest},
		"a web page": {"{}", func(r *http.Request) { r.Header.Set("Origin", "http://evil.example") }, http.StatusForbidden},
		"other host": {"{}", func(r *http.Request) { r.Host = "localhost" }, http.StatusForbidden},
		"get":        {"", func(r *http.Request) { r.Method = http.MethodGet }, http.StatusMethodNotAllowed},
	} {
		req, err := http.NewRequest(http.MethodPut, "http://"+fleet.Host+fleet.Path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		if tt.change != nil {
			tt.change(req)
		}
		resp, err := client.RoundTrip(req)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		io.Copy(io.Discard, resp.Body) //nolint:errcheck // only the status counts
		resp.Body.Close()
		if resp.StatusCode != tt.status {
			t.Errorf("%s: status %d, want %d", name, resp.StatusCode, tt.status)
		}
	}
}
