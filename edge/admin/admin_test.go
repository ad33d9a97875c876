package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 20 * time.Second

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newControl(t *testing.T) *control.Control {
	t.Helper()
	c, _ := newControlOver(t)
	return c
}

func newControlOver(t *testing.T) (*control.Control, state.Store) {
	t.Helper()
	dir := t.TempDir()
	a, err := mtls.InitAuthority(filepath.Join(dir, "ca"), "edge.test")
	must(t, err)
	s, err := state.OpenBolt(filepath.Join(dir, "state.db"))
	must(t, err)
	c, err := control.Open(t.Context(), control.Config{Store: s, Authority: a, Edges: []string{"edge.test:7844"}})
	must(t, err)
	c.SetLocal(control.Local{KeyServers: []string{"hsm"}})
	t.Cleanup(func() { must(t, errors.Join(c.Close(), s.Close())) })
	return c, s
}

// serve starts a server and returns the path of its socket.
func serve(t *testing.T, change ...func(*Server)) string {
	t.Helper()
	return serveOf(t, newControl(t), change...)
}

func serveOf(t *testing.T, c *control.Control, change ...func(*Server)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "edge.sock")
	s, err := Listen(Config{Socket: path, Control: c})
	must(t, err)
	for _, f := range change {
		f(s)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	return path
}

func dial(t *testing.T, path string) *Client {
	c := NewClient(path)
	t.Cleanup(c.Close)
	return c
}

func TestWholeAPI(t *testing.T) {
	own, store := newControlOver(t)
	c, w := watched(t, serveOf(t, own))
	ctx := t.Context()
	red, err := c.AddVNet(ctx, "red", "a comment", true)
	must(t, err)
	if !red.Default || red.Comment != "a comment" {
		t.Errorf("AddVNet: %+v", red)
	}
	_, err = c.SetVNet(ctx, "default", control.VNetChange{Default: true})
	must(t, err)
	_, err = c.AddTunnel(ctx, "plant", "")
	must(t, err)
	r, err := c.AddRoute(ctx, control.RouteSpec{VNet: "red", Prefix: "10.0.0.0/8", Tunnel: "plant"})
	must(t, err)
	if r.VNetName != "red" || r.TunnelName != "plant" || r.VNet != red.ID {
		t.Errorf("AddRoute: %+v", r)
	}
	_, err = c.AddRoute(ctx, control.RouteSpec{Host: "*.corp.example", Tunnel: "plant"})
	must(t, err)
	a, err := c.FindHost(ctx, "10.1.1.1", "red")
	must(t, err)
	if a.Chosen == nil || a.Chosen.Prefix != "10.0.0.0/8" {
		t.Errorf("FindHost: %+v", a)
	}
	if a, err := c.FindHost(ctx, "10.1.1.1", ""); err != nil || a.Chosen != nil || len(a.Everywhere) != 1 {
		t.Errorf("FindHost in the default network: %+v, %v", a, err)
	}
	g, err := c.CreateToken(ctx, "plant", 10*time.Minute)
	must(t, err)
	if _, err := mtls.ParseJoinToken(g.Token); err != nil || time.Until(g.Expires) > 10*time.Minute {
		t.Errorf("CreateToken: %v, expires %v", err, g.Expires)
	}
	vnets, err := c.VNets(ctx)
	must(t, err)
	tunnels, err := c.Tunnels(ctx)
	must(t, err)
	routes, err := c.Routes(ctx, "red")
	must(t, err)
	connectors, err := c.Connectors(ctx, "plant")
	must(t, err)
	status, err := c.Status(ctx)
	must(t, err)
	if len(vnets) != 2 || len(tunnels) != 1 || len(routes) != 1 || len(connectors) != 0 || status.Routes != 2 || status.TrustDomain != "edge.test" {
		t.Errorf("lists: %v, %v, %v, %v, %+v", vnets, tunnels, routes, connectors, status)
	}
	td, err := c.Tunnel(ctx, "plant")
	must(t, err)
	vd, err := c.VNet(ctx, string(red.ID))
	must(t, err)
	if len(td.RouteList) != 2 || len(vd.RouteList) != 1 || td.Status != control.Inactive {
		t.Errorf("details: %+v, %+v", td, vd)
	}
	tn, err := c.SetTunnel(ctx, "plant", control.TunnelChange{MaxFlows: new(7), Comment: new("hall")})
	must(t, err)
	vn, err := c.SetVNet(ctx, "red", control.VNetChange{MaxFlows: new(9)})
	must(t, err)
	if tn.MaxFlows != 7 || tn.Comment != "hall" || vn.MaxFlows != 9 || vn.Comment != "a comment" {
		t.Errorf("changes: %+v, %+v", tn, vn)
	}
	testRefusals(t, c)
	_, err = c.DeleteRoute(ctx, control.RouteSpec{Host: "*.corp.example"})
	must(t, err)
	testTokens(t, c)
	testServing(t, c)
	testTunnelConfig(t, c)
	testFleet(t, c, store)
	must(t, c.DeleteVNet(ctx, "red", true))
	must(t, c.DeleteTunnel(ctx, "plant", true))
	for _, e := range endpoints(api{}) {
		for m := range e.methods {
			// Some need a connector, or another edge: see cmd/edge.
			if name := m + " " + e.path + " 200"; !w.seen[name] && e.path != "/v1/connectors/{name}/revoke" && e.path != "/v1/echo" && !strings.HasPrefix(e.path, "/v1/edges/") {
				t.Errorf("%s was not exercised", name)
			}
		}
	}
}

// Refusals keep code, message, remedy and users on their way over the socket.
func testRefusals(t *testing.T, c *Client) {
	ctx := t.Context()
	second := func(_ any, err error) error { return err }
	for _, tt := range []struct {
		err    error
		want   error
		status int
		says   string
	}{
		{second(c.AddVNet(ctx, "red", "", false)), control.ErrExists, 409, "choose another name"},
		{second(c.AddVNet(ctx, "R", "", false)), control.ErrInvalid, 400, "a-z"},
		{second(c.VNet(ctx, "no/../such?x#y%2f")), control.ErrNotFound, 404, "no/../such?x#y%2f"},
		{second(c.Tunnel(ctx, "nope")), control.ErrNotFound, 404, "tunnel list"},
		{second(c.RemoveEdge(ctx, "e1")), control.ErrInvalid, 400, "another edge"},
		{second(c.RestoreEdge(ctx, "e1")), control.ErrNotFound, 404, "edge list"},
		{c.DeleteVNet(ctx, "red", false), control.ErrInUse, 409, "10.0.0.0/8"},
		{c.DeleteVNet(ctx, "default", true), control.ErrDefaultVNet, 409, "default"},
		{c.DeleteTunnel(ctx, "plant", false), control.ErrInUse, 409, "--force"},
		{second(c.RevokeConnector(ctx, "nobody")), control.ErrNotFound, 404, "nobody"},
		{second(c.AddRoute(ctx, control.RouteSpec{VNet: "red", Prefix: "10.0.0.0/8", Tunnel: "plant"})), control.ErrExists, 409, "10.0.0.0/8"},
		{second(c.DeleteRoute(ctx, control.RouteSpec{Prefix: "10.0.0.0/8"})), control.ErrNotFound, 404, "route list"},
		{second(c.FindHost(ctx, "", "")), control.ErrInvalid, 400, "empty"},
		{second(c.CreateToken(ctx, "plant", 1000*time.Hour)), control.ErrInvalid, 400, "168h"},
		{second(c.SetVNet(ctx, "red", control.VNetChange{MaxFlows: new(-1)})), control.ErrInvalid, 400, "-1"},
		{second(c.SetTunnel(ctx, "nope", control.TunnelChange{})), control.ErrNotFound, 404, "tunnel list"},
		{second(c.RevokeToken(ctx, "nope")), control.ErrNotFound, 404, "token list"},
		{second(c.Cleanup(ctx, control.CleanupSpec{Unseen: time.Second})), control.ErrInvalid, 400, "1h"},
		{second(c.Pool(ctx, "nope")), control.ErrNotFound, 404, "pool list"},
		{second(c.Port(ctx, "nope")), control.ErrNotFound, 404, "port list"},
		{second(c.Zone(ctx, "nope")), control.ErrNotFound, 404, "zone list"},
		{second(c.Device(ctx, "nope")), control.ErrNotFound, 404, "fleet list"},
		{second(c.Devices(ctx, "nope")), control.ErrNotFound, 404, "tunnel list"},
		{second(c.Rollout(ctx, "nope")), control.ErrNotFound, 404, "fleet rollout list"},
		{second(c.CreateRollout(ctx, control.RolloutSpec{Name: "r", Version: "../1"})), control.ErrInvalid, 400, "../1"},
		{second(c.PoolHealth(ctx, "nope")), control.ErrNotFound, 404, "pool list"},
	} {
		e, ok := errors.AsType[*Error](tt.err)
		if !ok || !errors.Is(tt.err, tt.want) || e.Status != tt.status || !strings.Contains(tt.err.Error(), tt.says) {
			t.Errorf("got %v (%+v), want %v, status %d, with %q", tt.err, e, tt.want, tt.status, tt.says)
		}
	}
}

// raw sends a request as anybody could.
func raw(t *testing.T, path, method, target, contentType, body string, header ...string) (int, *Error) {
	t.Helper()
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}, DisableKeepAlives: true}
	req, err := http.NewRequestWithContext(t.Context(), method, "http://"+hostName+target, strings.NewReader(body))
	must(t, err)
	if contentType != "" {
		req.Header.Set("Content-Type", contentType)
	}
	for i := 0; i < len(header); i += 2 {
		if header[i] == "Host" {
			req.Host = header[i+1]
		}
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := tr.RoundTrip(req)
	must(t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	must(t, err)
	var e errorBody
	if resp.StatusCode != http.StatusOK {
		if ct := resp.Header.Get("Content-Type"); ct != "application/json" {
			t.Errorf("%s %s: an error of type %q", method, target, ct)
		}
		if err := json.Unmarshal(b, &e); err != nil || e.Error == nil || e.Error.Code == "" || e.Error.Message == "" {
			t.Fatalf("%s %s: status %d with body %q, want an error in JSON", method, target, resp.StatusCode, b)
		}
	}
	return resp.StatusCode, e.Error
}

func TestMalformedRequests(t *testing.T) {
	path := serve(t)
	const js = "application/json"
	for _, tt := range []struct {
		name, method, target, contentType, body string
		status                                  int
		code                                    control.Code
		says                                    string
	}{
		{"unknown path", "GET", "/v2/vnets", "", "", 404, CodeNoSuchPath, "/v2/vnets"},
		{"root", "GET", "/", "", "", 404, CodeNoSuchPath, ""},
		{"wrong method", "PUT", "/v1/vnets", js, "{}", 405, CodeMethod, "GET or POST"},
		{"wrong method below", "POST", "/v1/status", js, "{}", 405, CodeMethod, "GET"},
		{"no content type", "POST", "/v1/vnets", "", `{"name":"x"}`, 400, CodeBadRequest, "content type"},
		{"form", "POST", "/v1/vnets", "text/plain", `{"name":"x"}`, 400, CodeBadRequest, "content type"},
		{"empty body", "POST", "/v1/vnets", js, "", 400, CodeBadRequest, "unexpected EOF"},
		{"cut off", "POST", "/v1/vnets", js, `{"name":"x"`, 400, CodeBadRequest, "unexpected EOF"},
		{"unknown name", "POST", "/v1/vnets", js, `{"name":"x","nmae":"y"}`, 400, CodeBadRequest, "nmae"},
		{"name in capitals", "POST", "/v1/vnets", js, `{"NAME":"x"}`, 400, CodeBadRequest, "NAME"},
		{"name twice", "POST", "/v1/vnets", js, `{"name":"x","name":"y"}`, 400, CodeBadRequest, "twice"},
		{"wrong type", "POST", "/v1/vnets", js, `{"name":7}`, 400, CodeBadRequest, "string"},
		{"array", "POST", "/v1/vnets", js, `[]`, 400, CodeBadRequest, "object"},
		{"two objects", "POST", "/v1/vnets", js, `{"name":"x"}{}`, 400, CodeBadRequest, "more data"},
		{"rubbish", "POST", "/v1/vnets", js, "\x00\xff", 400, CodeBadRequest, "JSON"},
		{"deep", "POST", "/v1/vnets", js, `{"name":` + strings.Repeat("[", 100), 400, CodeBadRequest, "deep"},
		{"unknown name below", "POST", "/v1/pools", js, `{"name":"x","endpoints":[{"host":"h","port":1,"prot":2}]}`, 400, CodeBadRequest, "prot"},
		{"capitals below", "POST", "/v1/pools", js, `{"name":"x","endpoints":[{"HOST":"h","port":1}]}`, 400, CodeBadRequest, "HOST"},
		{"twice below", "POST", "/v1/pools", js, `{"name":"x","endpoints":[{"host":"h","host":"g"}]}`, 400, CodeBadRequest, "twice"},
		{"port out of range", "POST", "/v1/pools", js, `{"name":"x","endpoints":[{"host":"h","port":65536}]}`, 400, CodeBadRequest, "port"},
		{"bad duration below", "POST", "/v1/pools", js, `{"name":"x","monitor":{"type":"tcp","interval":"soon"}}`, 400, CodeBadRequest, "soon"},
		{"zone too large", "POST", "/v1/zones", js, `{"name":"` + strings.Repeat("x", maxLargeBody) + `"}`, 413, CodeTooLarge, "524288"},
		{"other name", "PUT", "/v1/pools/x", js, `{"name":"y"}`, 400, CodeBadRequest, "names do not change"},
		{"nothing to change", "PATCH", "/v1/pools/x/endpoints/y", js, `{}`, 400, CodeBadRequest, "weight"},
		{"bad unseen", "POST", "/v1/cleanup", js, `{"unseen":"long"}`, 400, CodeBadRequest, "long"},
		{"too large", "POST", "/v1/vnets", js, `{"name":"` + strings.Repeat("x", maxBody) + `"}`, 413, CodeTooLarge, "65536"},
		{"unknown query", "GET", "/v1/routes?vent=red", "", "", 400, CodeBadRequest, "vent"},
		{"query twice", "GET", "/v1/routes?vnet=a&vnet=b", "", "", 400, CodeBadRequest, "twice"},
		{"broken query", "GET", "/v1/routes?vnet=%zz", "", "", 400, CodeBadRequest, "query"},
		{"bad force", "DELETE", "/v1/vnets/x?force=perhaps", "", "", 400, CodeBadRequest, "force"},
		{"bad ttl", "POST", "/v1/tunnels/x/tokens", js, `{"ttl":"soon"}`, 400, CodeBadRequest, "soon"},
		{"negative ttl", "POST", "/v1/tunnels/x/tokens", js, `{"ttl":"-1h"}`, 400, CodeBadRequest, "-1h"},
		{"no body to revoke", "POST", "/v1/connectors/x/revoke", "", "", 400, CodeBadRequest, "content type"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, e := raw(t, path, tt.method, tt.target, tt.contentType, tt.body)
			if status != tt.status || e == nil || e.Code != tt.code || !strings.Contains(e.Error(), tt.says) {
				t.Errorf("status %d, %+v, want %d, %s with %q", status, e, tt.status, tt.code, tt.says)
			}
		})
	}
	// The server is well after all that.
	if status, _ := raw(t, path, "GET", "/v1/status", "", ""); status != 200 {
		t.Errorf("afterwards: status %d", status)
	}
}

func TestWebPagesAreRefused(t *testing.T) {
	path := serve(t)
	for _, h := range [][]string{{"Origin", "http://evil.example"}, {"Origin", "null"}, {"Sec-Fetch-Site", "cross-site"}, {"Host", "localhost"}} {
		if status, e := raw(t, path, "GET", "/v1/status", "", "", h...); status != 403 || e.Code != CodeDenied {
			t.Errorf("%v: status %d, %+v, want it denied", h, status, e)
		}
	}
}

func TestCallers(t *testing.T) {
	own := uint32(os.Geteuid())
	as := func(uid uint32, err error) func(*Server) {
		return func(s *Server) { s.identify = func(net.Conn) (uint32, error) { return uid, err } }
	}
	for _, tt := range []struct {
		name   string
		change func(*Server)
		ok     bool
	}{
		{"kernel's word", func(*Server) {}, true},
		{"root", as(0, nil), true},
		{"own user", as(own, nil), true},
		{"another user", as(own+4711, nil), false},
		{"unknown", as(0, errors.New("no credentials")), false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := dial(t, serve(t, tt.change)).Status(t.Context())
			if tt.ok {
				must(t, err)
				return
			}
			if e, ok := errors.AsType[*Error](err); !ok || e.Code != CodeDenied || e.Status != 403 {
				t.Errorf("got %v, want it denied", err)
			}
		})
	}
}

func TestSocket(t *testing.T) {
	path := serve(t)
	info, err := os.Stat(path)
	must(t, err)
	if got := info.Mode().Perm(); got != 0o600 {
		t.Errorf("mode %o, want 600", got)
	}
	if _, err := Listen(Config{Socket: path}); err == nil || !strings.Contains(err.Error(), "another process") {
		t.Errorf("a second edge: %v, want it refused", err)
	}
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	if _, err := Listen(Config{Socket: file}); err == nil || !strings.Contains(err.Error(), "no socket") {
		t.Errorf("over a file: %v, want it refused", err)
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is lost")
	}
	// What a killed edge leaves is replaced.
	stale := filepath.Join(t.TempDir(), "stale")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	must(t, err)
	ln.SetUnlinkOnClose(false)
	must(t, ln.Close())
	s, err := Listen(Config{Socket: stale, Control: newControl(t)})
	must(t, err)
	must(t, s.Close())
}

func TestNoEdge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none")
	_, err := dial(t, path).Status(t.Context())
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "--socket") {
		t.Errorf("got %v, want it to name the socket and the flag", err)
	}
}

// A caller who says nothing keeps nobody else from being served, and does not hold up the end.
func TestSilentCallers(t *testing.T) {
	path := serve(t)
	for range 8 {
		c, err := net.Dial("unix", path)
		must(t, err)
		defer c.Close()
		_, err = fmt.Fprint(c, "POST /v1/vnets HTTP/1.1\r\nHost: "+hostName+"\r\n")
		must(t, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	_, err := dial(t, path).Status(ctx)
	must(t, err)
}

// Anybody who gets past the kernel's check can send any body.
func FuzzDecodeStrict(f *testing.F) {
	for _, v := range []any{vnetRequest{"red", "c", true}, tunnelRequest{"plant", ""}, tokenRequest{"1h"}, control.RouteSpec{VNet: "red", Prefix: "10.0.0.0/8", Tunnel: "t"}, testPool, testPort, zone.Config{Name: "z", Origins: []zone.Origin{{URL: "http://a"}}}} {
		b, err := json.Marshal(v)
		must(f, err)
		f.Add(b)
	}
	f.Add([]byte(`{"name":"a","name":"b"}`))
	f.Add([]byte(`{"name":{"a":[1,{"b":null}]}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, dst := range []any{&vnetRequest{}, &tunnelRequest{}, &tokenRequest{}, &control.RouteSpec{}, &spec.PoolConfig{}, &spec.PortConfig{}, &zone.Config{}} {
			if decodeStrict(b, dst) != nil {
				continue
			}
			// What is accepted means the same when it is written out again.
			again, err := json.Marshal(dst)
			must(t, err)
			back := reflect.New(reflect.TypeOf(dst).Elem()).Interface()
			err = decodeStrict(again, back)
			if third, merr := json.Marshal(back); err != nil || merr != nil || !bytes.Equal(again, third) { // an empty list is none
				t.Fatalf("%q decodes to %+v, then %q to %+v (%v)", b, dst, again, back, err)
			}
			if !json.Valid(bytes.TrimSpace(b)) {
				t.Fatalf("%q is accepted and is no JSON", b)
			}
		}
	})
}
