package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/keyhaven/keyhaven/edge/proxy"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// visitors is the edge's proxy over TLS, with one zone that leads to the ingress of a tunnel.
func visitors(t *testing.T, e *realEdge, h2c bool) *httptest.Server {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"*.shop.test"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(48 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(t, err)
	cfg := zone.Config{Name: "shop", Hosts: []string{"*.shop.test"}, KeyServer: "keys", Origins: []zone.Origin{{Tunnel: "shop", H2C: h2c}},
		CertificatePEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
	zones, _ := zone.Compile("zones", []zone.Config{cfg}, func(string) bool { return true }, func(key, format string, args ...any) {
		t.Fatalf("%s: %s", key, fmt.Sprintf(format, args...))
	})
	h := proxy.New(proxy.Config{Zones: zone.NewTable(zones), Dialer: e, ConnectTimeout: patience})
	s := httptest.NewUnstartedServer(h)
	s.EnableHTTP2 = true
	s.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"h2", "http/1.1"}}
	s.StartTLS()
	t.Cleanup(func() { s.Close(); h.CloseIdle() })
	return s
}

func visitor(t *testing.T, s *httptest.Server, http2 bool) *http.Client {
	tr := &http.Transport{ForceAttemptHTTP2: http2, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.Listener.Addr().String())
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

// What visitors of a zone get whose origin is the ingress of a tunnel, over both ways from the edge to the connector.
func TestVisitorsOfAnIngress(t *testing.T) {
	t.Parallel()
	e := openEdge(t)
	_, err := e.AddTunnel(t.Context(), "shop", "")
	must(t, err)
	grant, err := e.CreateToken(t.Context(), "shop", time.Hour)
	must(t, err)
	dir := filepath.Join(t.TempDir(), "id")
	if out, code := runProgram(t, grant.Token, "join", "--token-file", "-", "--dir", dir); code != 0 {
		t.Fatalf("join: %s", out)
	}
	url, _ := site(t, "one")
	echo := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s %s %s", r.RequestURI, r.Host, r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Proto"))
	}))
	t.Cleanup(echo.Close)
	start(t, "run", "--config", write(t, filepath.Join(t.TempDir(), "c.yaml"), fmt.Sprintf(`identity:
  dir: %s
allow: []
ingress:
  - {hostname: echo.shop.test, path: "^/a", service: %q}
  - {hostname: grpc.shop.test, service: "http://%s", origin: {http2_origin: true}}
  - {hostname: down.shop.test, service: "http://127.0.0.1:9"}
  - service: %s
`, dir, echo.URL, serveGRPC(t), url)))
	for _, h2c := range []bool{false, true} {
		t.Run(fmt.Sprintf("h2c=%t", h2c), func(t *testing.T) {
			s := visitors(t, e, h2c)
			soon(t, "the connector serves", func() bool { return fetch(t, s, "https://www.shop.test/") == "200 one" })
			visits(t, s, h2c)
		})
	}
}

func fetch(t *testing.T, s *httptest.Server, url string) string {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, url, nil)
	must(t, err)
	req.Header.Set("X-Forwarded-For", "192.0.2.66") // forged
	res, err := visitor(t, s, true).Do(req)
	if err != nil {
		return err.Error()
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(res.StatusCode, " ", string(b))
}

func visits(t *testing.T, s *httptest.Server, h2c bool) {
	if got := fetch(t, s, "https://echo.shop.test/a%2Fb?x=%zz"); !strings.HasPrefix(got, "400 ") { // the rule looks at the path
		t.Errorf("an ambiguous path: got %q", got)
	}
	if got, want := fetch(t, s, "https://echo.shop.test/a%7Eb?x;y"), "200 /a%7Eb?x;y echo.shop.test 127.0.0.1 https"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := fetch(t, s, "https://down.shop.test/"); !strings.HasPrefix(got, "502 ") || !strings.Contains(got, "request ") {
		t.Errorf("an origin that is down: got %q", got)
	}
	for _, http2 := range []bool{false, true} {
		res, err := visitor(t, s, http2).Get("https://www.shop.test/cut")
		must(t, err)
		// The reset may overtake the header, and the edge then says so itself.
		if b, err := io.ReadAll(res.Body); err == nil && res.StatusCode != http.StatusBadGateway {
			t.Errorf("HTTP/2 %t: a broken answer ended cleanly: %q", http2, b)
		}
		res.Body.Close()
		res, err = visitor(t, s, http2).Get("https://www.shop.test/events")
		must(t, err)
		r := bufio.NewReader(res.Body)
		for _, want := range []string{"data: 0\n", "\n", "data: 1\n"} {
			if line, err := r.ReadString('\n'); err != nil || line != want {
				t.Fatalf("HTTP/2 %t: got %q, %v, want %q", http2, line, err, want)
			}
		}
		res.Body.Close()
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if !h2c { // a zone that speaks HTTP/2 to its origin has no WebSockets
		ws, _, err := websocket.Dial(ctx, "wss://www.shop.test/ws", &websocket.DialOptions{HTTPClient: visitor(t, s, false)})
		must(t, err)
		must(t, ws.Write(ctx, websocket.MessageText, []byte("hello")))
		if _, b, err := ws.Read(ctx); err != nil || string(b) != "one hello" {
			t.Errorf("WebSocket: %q, %v", b, err)
		}
		must(t, ws.Close(websocket.StatusNormalClosure, ""))
	}
	grpcVisits(t, ctx, s)
}

func grpcVisits(t *testing.T, ctx context.Context, s *httptest.Server) {
	conn, err := grpc.NewClient("passthrough:///"+s.Listener.Addr().String(), grpc.WithAuthority("grpc.shop.test"),
		grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true, ServerName: "grpc.shop.test"})))
	must(t, err)
	defer conn.Close()
	out, trailer := new(wrapperspb.StringValue), metadata.MD{}
	if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("hello"), out, grpc.Trailer(&trailer)); err != nil || out.Value != "hello" || len(trailer["x-trailer"]) != 1 {
		t.Fatalf("unary: %q, %v, trailer %v", out.Value, err, trailer)
	}
	for range 20 {
		if err := conn.Invoke(ctx, "/test.Echo/Nothing", wrapperspb.String(""), out); status.Code(err) != codes.Unimplemented {
			t.Fatalf("unknown method: %v", err)
		}
	}
	b, err := conn.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Bidi")
	must(t, err)
	for range 10 {
		must(t, b.SendMsg(wrapperspb.String("ping")))
		must(t, b.RecvMsg(out))
	}
	must(t, b.CloseSend())
	if err := b.RecvMsg(out); status.Code(err) != codes.DataLoss || len(b.Trailer()["x-trailer"]) != 1 {
		t.Errorf("bidi: %v, trailer %v", err, b.Trailer())
	}
}

// The service of these tests has a unary method and a bidirectional one, both on strings.
var echoService = grpc.ServiceDesc{
	ServiceName: "test.Echo", HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(wrapperspb.StringValue)
		if err := dec(in); err != nil {
			return nil, err
		}
		return in, grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "unary"))
	}}},
	Streams: []grpc.StreamDesc{{StreamName: "Bidi", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for {
			in := new(wrapperspb.StringValue)
			if err := s.RecvMsg(in); errors.Is(err, io.EOF) {
				s.SetTrailer(metadata.Pairs("x-trailer", "bidi"))
				return status.Error(codes.DataLoss, "the end")
			} else if err != nil {
				return err
			}
			if err := s.SendMsg(in); err != nil {
				return err
			}
		}
	}}},
}

func serveGRPC(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := grpc.NewServer()
	srv.RegisterService(&echoService, new(any))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return ln.Addr().String()
}
