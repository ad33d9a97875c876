//go:build netns

package integration

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	"github.com/keyhaven/keyhaven/internal/lab"
)

const (
	grpcHost   = "grpc.keyhaven.test"
	grpcOrigin = "10.20.0.20:9090"
)

// listen opens a listener inside site a.
func (w *world) listen(t *testing.T, addr string) (ln net.Listener) {
	t.Helper()
	must(t, w.sites[0].Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	return ln
}

// trust is what a visitor's own TLS stack needs.
func (w *world) trust(host string) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(w.Issuer.Certificate())
	return &tls.Config{RootCAs: roots, ServerName: host}
}

// gRPC needs HTTP/2 to the end and trailers. Its origin is added while everything runs: to the edge by a reload, and to
// the connector's allow-list by another. Until the connector permits it, the edge cannot reach it, whatever it asks.
func TestGRPCAndAllowList(t *testing.T) {
	w := up(t, []lab.ZonePlan{{Host: plain, KeyType: "p256"}, {Host: grpcHost, KeyType: "p256"}}, (*world).siteA)
	srv := grpc.NewServer()
	hs := health.NewServer()
	healthpb.RegisterHealthServer(srv, hs)
	ln := w.listen(t, grpcOrigin)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() { srv.Stop(); <-served }()

	cfg := w.EdgeConfig()
	for _, z := range cfg["visitors"].(map[string]any)["zones"].([]map[string]any) {
		if z["hosts"].([]string)[0] == grpcHost {
			z["origins"] = []map[string]any{{"url": "http://" + grpcOrigin, "h2c": true}}
		}
	}
	must(t, w.WriteYAML("edge.yaml", cfg))
	must(t, w.EdgeProc.Signal(syscall.SIGHUP))

	conn, err := grpc.NewClient("passthrough:///"+edgeVisitors, grpc.WithTransportCredentials(credentials.NewTLS(w.trust(grpcHost))), grpc.WithAuthority(grpcHost),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return w.visitor.Dial(ctx, addr) }))
	must(t, err)
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	eventually(t, "the connector denies the flow", func(ctx context.Context) error {
		if _, err := client.Check(ctx, new(healthpb.HealthCheckRequest)); err == nil {
			t.Fatal("a flow passed that the connector's allow-list does not permit")
		}
		if out, err := w.curl(ctx, grpcHost, "/", "-w", "%{http_code}"); err != nil || !strings.HasSuffix(out, "502") {
			return fmt.Errorf("got %q, %v; want 502", out, err)
		}
		return nil
	})
	must(t, w.WriteYAML("connector-a.yaml", map[string]any{"identity": map[string]any{"dir": w.Path("connector-a")}, "edges": []string{edgeTunnel},
		"ops": map[string]any{"listen": "127.0.0.1:9601"}, "allow": []map[string]any{{"to": "10.20.0.0/24", "ports": []int{2407, 8080, 9090}}}}))
	must(t, w.Sites[0].Connector.Signal(syscall.SIGHUP))
	eventually(t, "gRPC passes", func(ctx context.Context) error {
		resp, err := client.Check(ctx, new(healthpb.HealthCheckRequest))
		if err == nil && resp.Status != healthpb.HealthCheckResponse_SERVING {
			err = fmt.Errorf("got %v", resp.Status)
		}
		return err
	})
	// The status of a call travels in the trailers.
	if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "unknown"}); status.Code(err) != codes.NotFound {
		t.Errorf("unknown service: got %v, want NotFound", err)
	}
	// A stream of answers, each as it comes.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch, err := client.Watch(ctx, new(healthpb.HealthCheckRequest))
	must(t, err)
	for _, want := range []healthpb.HealthCheckResponse_ServingStatus{healthpb.HealthCheckResponse_SERVING, healthpb.HealthCheckResponse_NOT_SERVING, healthpb.HealthCheckResponse_SERVING} {
		got, err := watch.Recv()
		if err != nil || got.Status != want {
			t.Fatalf("watch: got %v, %v; want %v", got.GetStatus(), err, want)
		}
		next := healthpb.HealthCheckResponse_NOT_SERVING
		if want == next {
			next = healthpb.HealthCheckResponse_SERVING
		}
		hs.SetServingStatus("", next)
	}
}

// A WebSocket through edge and tunnel, with messages both ways, that outlives a reload of the edge.
func TestWebSocket(t *testing.T) {
	w := up(t, onePlainZone, (*world).siteA)
	must(t, w.Sites[0].Origin.Stop())
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(rw, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			typ, msg, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), typ, append([]byte("echo "), msg...)) != nil {
				return
			}
		}
	})}
	ln := w.listen(t, origin)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() { srv.Close(); <-served }()

	transport := &http.Transport{TLSClientConfig: w.trust(plain), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return w.visitor.Dial(ctx, edgeVisitors)
	}}
	defer transport.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "https://"+plain+"/ws", &websocket.DialOptions{HTTPClient: &http.Client{Transport: transport}})
	must(t, err)
	defer c.CloseNow()
	for i := range 20 {
		if i == 10 {
			must(t, w.EdgeProc.Signal(syscall.SIGHUP))
			eventually(t, "the reload", func(context.Context) error {
				if !strings.Contains(w.EdgeProc.Log(), "configuration reloaded") {
					return errors.New("not yet")
				}
				return nil
			})
		}
		msg := fmt.Sprintf("message %d", i)
		must(t, c.Write(ctx, websocket.MessageText, []byte(msg)))
		_, got, err := c.Read(ctx)
		if err != nil || string(got) != "echo "+msg {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	must(t, c.Close(websocket.StatusNormalClosure, ""))
}
