package edge

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// The service of these tests has a unary method and a bidirectional one, both on strings.
var echoService = grpc.ServiceDesc{
	ServiceName: "test.Echo", HandlerType: (*any)(nil),
	Methods: []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, dec func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		in := new(wrapperspb.StringValue)
		if err := dec(in); err != nil {
			return nil, err
		}
		if in.Value == "fail" {
			return nil, status.Error(codes.FailedPrecondition, "as asked")
		}
		_ = grpc.SetTrailer(ctx, metadata.Pairs("x-trailer", "unary"))
		return in, nil
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

func serveGRPC(t *testing.T, opts ...grpc.ServerOption) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := grpc.NewServer(opts...)
	srv.RegisterService(&echoService, new(any))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-done })
	return ln.Addr().String()
}

func TestGRPC(t *testing.T) {
	w := newWorld(t)
	plain := w.addZone("plain", "p256", "http://"+serveGRPC(t), "plain.test")
	plain.Origins[0].H2C = true
	key := newKey(t, "p256")
	cert := w.ca.issue(t, key.Public(), 48*time.Hour, "inside.test")
	secured := w.addZone("secured", "p256", "https://"+serveGRPC(t, grpc.Creds(credentials.NewServerTLSFromCert(&tls.Certificate{Certificate: [][]byte{cert}, PrivateKey: key}))), "secured.test")
	secured.Origins[0].TLS.ServerName = "inside.test"
	secured.Origins[0].TLS.CA = writePEM(t, filepath.Join(w.dir, "ca.pem"), w.ca.cert.Raw)
	w.start()
	for _, host := range []string{"plain.test", "secured.test"} {
		t.Run(host, func(t *testing.T) { grpcCalls(t, w, host) })
	}
	t.Run("tunnel down", func(t *testing.T) {
		conn := dialGRPC(t, w, "plain.test")
		w.loop.cut(plain.Origins[0].URL[len("http://"):], errAway)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("x"), new(wrapperspb.StringValue))
		if code := status.Code(err); code != codes.Unavailable && code != codes.Unknown {
			t.Errorf("%v", err)
		}
	})
}

func dialGRPC(t *testing.T, w *world, host string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+w.addr(), grpc.WithTransportCredentials(credentials.NewTLS(w.tlsConfig(host))), grpc.WithAuthority(host))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func grpcCalls(t *testing.T, w *world, host string) {
	conn := dialGRPC(t, w, host)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var trailer metadata.MD
	out := new(wrapperspb.StringValue)
	if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("hello"), out, grpc.Trailer(&trailer)); err != nil || out.Value != "hello" || len(trailer["x-trailer"]) != 1 {
		t.Fatalf("unary: %q, %v, trailer %v", out.Value, err, trailer)
	}
	if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("fail"), out); status.Code(err) != codes.FailedPrecondition || status.Convert(err).Message() != "as asked" {
		t.Errorf("unary that fails: %v", err)
	}
	for range 50 { // the answer is a header alone, which must stay one with the end of its stream
		if err := conn.Invoke(ctx, "/test.Echo/Nothing", wrapperspb.String(""), out); status.Code(err) != codes.Unimplemented {
			t.Fatalf("unknown method: %v", err)
		}
	}
	s, err := conn.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Bidi")
	must(t, err)
	for range 10 { // each answer comes before the next question
		must(t, s.SendMsg(wrapperspb.String("ping")))
		if err := s.RecvMsg(out); err != nil || out.Value != "ping" {
			t.Fatalf("bidi: %q, %v", out.Value, err)
		}
	}
	must(t, s.CloseSend())
	if err := s.RecvMsg(out); status.Code(err) != codes.DataLoss || len(s.Trailer()["x-trailer"]) != 1 {
		t.Errorf("bidi: %v, trailer %v", err, s.Trailer())
	}
}
