//go:build netns

package integration

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// Two zones lead to the same origins: by an address in the network, and by the tunnel's ingress rules.
const (
	brokenHost   = "broken.keyhaven.test"
	ingressHost  = "ingress.keyhaven.test"
	brokenOrigin = "10.20.0.20:8090"
)

// rules hands site a's connectors the ingress rules of these tests.
func (f *flowSites) rules(t *testing.T) {
	t.Helper()
	must(t, f.WriteYAML("rules.yaml", obj{"ingress": []obj{
		{"hostname": ingressHost, "path": "^/grpc[.]health", "service": "http://" + grpcOrigin, "origin": obj{"http2_origin": true}},
		{"hostname": ingressHost, "path": "^/down", "service": "http://10.20.0.20:8099"},
		{"hostname": ingressHost, "path": "^/(request|upload|events)", "service": "http://" + origin},
		{"service": "http://" + brokenOrigin}}}))
	f.admin(t, "tunnel", "config", "set", "a", f.Path("rules.yaml"))
	f.applied(t, "a", 2)
}

// applied waits until so many connectors have the present configuration.
func (w *world) applied(t *testing.T, tunnel string, connectors int) {
	t.Helper()
	eventually(t, "connectors have the configuration", func(context.Context) error {
		v := w.tunnelConfig(t, 0, tunnel)
		n := 0
		for _, c := range v.Connectors {
			if c.Applied == v.Version {
				n++
			}
		}
		if n != connectors {
			return fmt.Errorf("%d of %d have version %d: %+v", n, connectors, v.Version, v.Connectors)
		}
		return nil
	})
}

// breaks is an origin whose answers end as no answer should, and one that sends its parts when it is told to.
type breaks struct{ next chan struct{} }

func (b *breaks) serve(c net.Conn) {
	r := bufio.NewReader(c)
	for {
		req, err := http.ReadRequest(r)
		if err != nil {
			return
		}
		switch req.URL.Path {
		case "/short": // fewer bytes than announced, then a clean end of the connection
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this\n")
			<-b.next
			return
		case "/chunk": // no last chunk, then a clean end
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\nonly this\n\r\n")
			<-b.next
			return
		case "/reset": // no last chunk, then a reset
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\na\r\nonly this\n\r\n")
			<-b.next
			c.(*net.TCPConn).SetLinger(0)
			return
		case "/garbage":
			io.WriteString(c, "220 mail.example.com ESMTP\r\n")
			return
		case "/nothing":
			c.(*net.TCPConn).SetLinger(0)
			return
		case "/parts": // each part only when the visitor has read the one before
			io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			for i := range 5 {
				part := fmt.Sprintf("part %d\n", i)
				fmt.Fprintf(c, "%x\r\n%s\r\n", len(part), part)
				<-b.next
			}
			io.WriteString(c, "0\r\n\r\n")
		default:
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ngood")
		}
	}
}

// origins are those that are down, break, and send slowly, by both ways and over HTTP/1.1 and HTTP/2.
func (f *flowSites) origins(t *testing.T) {
	f.rules(t)
	b := &breaks{next: make(chan struct{})}
	serveTCP(t, f.listen(t, brokenOrigin), b.serve)
	for _, host := range []string{brokenHost, ingressHost} {
		for _, version := range []string{"1.1", "2"} {
			t.Run(host+" HTTP/"+version, func(t *testing.T) {
				flag := map[string]string{"1.1": "--http1.1", "2": "--http2"}[version]
				out, err := f.curl(t.Context(), host, "/good", flag, "-w", " %{http_version} %{http_code}")
				if err != nil || out != "good "+version+" 200" {
					t.Fatalf("got %q, %v", out, err)
				}
				for _, path := range []string{"/short", "/chunk", "/reset"} {
					f.truncated(t, b, host, version, path)
				}
				for _, path := range []string{"/garbage", "/nothing"} {
					if out, err := f.curl(t.Context(), host, path, flag, "-o", "/dev/null", "-w", "%{http_code}"); err != nil || out != "502" {
						t.Errorf("%s: got %q, %v; want 502", path, out, err)
					}
				}
				f.parts(t, b, host, version)
				// What broke leaves nothing behind.
				if out, err := f.curl(t.Context(), host, "/good", flag); err != nil || out != "good" {
					t.Errorf("afterwards: got %q, %v", out, err)
				}
			})
		}
	}
	t.Run("down", func(t *testing.T) {
		if out, err := f.curl(t.Context(), ingressHost, "/down", "-o", "/dev/null", "-w", "%{http_code}"); err != nil || out != "502" {
			t.Errorf("got %q, %v; want 502", out, err)
		}
	})
	t.Run("forged headers by ingress", func(t *testing.T) {
		out, err := f.curl(t.Context(), ingressHost, "/request", "-H", "X-Forwarded-For: 192.0.2.66", "-H", "Forwarded: for=192.0.2.66", "-H", "X-Real-IP: 192.0.2.66")
		if err != nil || strings.Contains(out, "192.0.2.66") || !strings.Contains(out, `"X-Forwarded-For":["203.0.113.2"]`) {
			t.Errorf("got %v\n%s", err, out)
		}
	})
}

// get asks as a visitor with a client of its own, and returns the answer with the first line of its body read.
func (f *flowSites) get(t *testing.T, host, version, path string) (*bufio.Reader, func()) {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: f.trust(host), DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return f.visitor.Dial(ctx, edgeVisitors)
	}}
	if version == "2" {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetHTTP2(true)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	req, err := http.NewRequestWithContext(ctx, "GET", "https://"+host+path, nil)
	must(t, err)
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		cancel()
		t.Fatalf("%s: %v", path, err)
	}
	if want := version[:1]; resp.StatusCode != 200 || !strings.HasPrefix(resp.Proto, "HTTP/"+want) {
		t.Errorf("%s: got %s %s", path, resp.Proto, resp.Status)
	}
	return bufio.NewReader(resp.Body), func() {
		resp.Body.Close()
		transport.CloseIdleConnections()
		cancel()
	}
}

// goOn lets the origin send its next part, or break.
func (b *breaks) goOn(t *testing.T) {
	t.Helper()
	select {
	case b.next <- struct{}{}:
	case <-time.After(30 * time.Second):
		t.Fatal("the origin does not wait")
	}
}

// truncated reads an answer whose origin breaks off when the visitor has its beginning: it must not seem to be whole.
func (f *flowSites) truncated(t *testing.T, b *breaks, host, version, path string) {
	t.Helper()
	r, done := f.get(t, host, version, path)
	defer done()
	if line, err := r.ReadString('\n'); err != nil || line != "only this\n" {
		t.Errorf("%s: got %q, %v", path, line, err)
	}
	b.goOn(t)
	if rest, err := io.ReadAll(r); err == nil || len(rest) > 0 {
		t.Errorf("%s: then got %q and %v, want an error", path, rest, err)
	}
}

// parts reads an answer whose origin goes on only when the visitor has what was sent: nothing may wait for more.
func (f *flowSites) parts(t *testing.T, b *breaks, host, version string) {
	t.Helper()
	r, done := f.get(t, host, version, "/parts")
	defer done()
	for i := range 5 {
		line, err := r.ReadString('\n')
		if err != nil || line != fmt.Sprintf("part %d\n", i) {
			t.Errorf("part %d: got %q, %v", i, line, err)
		}
		b.goOn(t)
	}
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Errorf("at the end: got %q, %v", rest, err)
	}
}

// grpcIngress is gRPC through the connector's rules: calls, their status in the trailers, and streams.
func (f *flowSites) grpcIngress(t *testing.T) {
	f.rules(t)
	srv := grpc.NewServer()
	hs := health.NewServer()
	healthpb.RegisterHealthServer(srv, hs)
	ln := f.listen(t, grpcOrigin)
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() { srv.Stop(); <-served }()
	conn, err := grpc.NewClient("passthrough:///"+edgeVisitors, grpc.WithTransportCredentials(credentials.NewTLS(f.trust(ingressHost))), grpc.WithAuthority(ingressHost),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return f.visitor.Dial(ctx, addr) }))
	must(t, err)
	defer conn.Close()
	client := healthpb.NewHealthClient(conn)
	eventually(t, "a call", func(ctx context.Context) error {
		resp, err := client.Check(ctx, new(healthpb.HealthCheckRequest))
		if err == nil && resp.Status != healthpb.HealthCheckResponse_SERVING {
			err = fmt.Errorf("got %v", resp.Status)
		}
		return err
	})
	if _, err := client.Check(t.Context(), &healthpb.HealthCheckRequest{Service: "unknown"}); status.Code(err) != codes.NotFound {
		t.Errorf("unknown service: got %v, want NotFound", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	watch, err := client.Watch(ctx, new(healthpb.HealthCheckRequest))
	must(t, err)
	for i := range 4 {
		want := healthpb.HealthCheckResponse_SERVING
		if i%2 == 1 {
			want = healthpb.HealthCheckResponse_NOT_SERVING
		}
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
	// The origin dies in the middle of the stream: its visitor is told so.
	srv.Stop()
	if _, err = watch.Recv(); err == nil { // the last change was still on its way
		_, err = watch.Recv()
	}
	if err == nil || errors.Is(err, io.EOF) {
		t.Errorf("stream of a dead origin: got %v, want an error", err)
	}
}
