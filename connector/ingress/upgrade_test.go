package ingress

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"testing"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func echoSocket(t *testing.T, name string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") == "" {
			fmt.Fprint(w, name)
			return
		}
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			t.Errorf("accept: %v", err)
			return
		}
		defer c.CloseNow() //nolint:errcheck // it may be closed
		for {
			kind, b, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := c.Write(r.Context(), kind, append([]byte(name+" "), b...)); err != nil {
				return
			}
		}
	}
}

// An open WebSocket and a request in flight go on through a change of the rules; what comes later follows the new ones.
func TestWebSocketSurvivesAChange(t *testing.T) {
	old, next := server(t, echoSocket(t, "old")), server(t, echoSocket(t, "new"))
	for name, options := range map[string]string{"HTTP/1.1": "{}", "h2c for the rest": "{http2_origin: true}"} {
		t.Run(name, func(t *testing.T) {
			rules := func(url string) string {
				return "ingress:\n  - service: " + url + "\n    origin: " + options + "\n"
			}
			bed := newBed(t, rules(old.URL))
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			ws, _, err := websocket.Dial(ctx, "ws://a.test/", &websocket.DialOptions{HTTPClient: bed.client()})
			must(t, err)
			defer ws.CloseNow() //nolint:errcheck // it may be closed
			say := func(want string) {
				t.Helper()
				must(t, ws.Write(ctx, websocket.MessageText, []byte("hello")))
				_, b, err := ws.Read(ctx)
				must(t, err)
				if string(b) != want {
					t.Fatalf("got %q, want %q", b, want)
				}
			}
			say("old hello")
			must(t, bed.SetLocal(rulesOf(t, rules(next.URL))))
			say("old hello")
			if options == "{}" {
				if _, body := bed.get("http://a.test/"); body != "new" {
					t.Errorf("a later request: got %q, want %q", body, "new")
				}
			}
			say("old hello")
			must(t, ws.Close(websocket.StatusNormalClosure, ""))
		})
	}
}

// An upgraded connection that breaks at the origin is cut at the visitor's side.
func TestUpgradeBreaks(t *testing.T) {
	addr := rawOrigin(t, func(c *net.TCPConn) {
		http.ReadRequest(bufio.NewReader(c)) //nolint:errcheck // it is there
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\npart")
		io.ReadFull(c, make([]byte, 4)) //nolint:errcheck // the visitor has the part then
		c.SetLinger(0)                  //nolint:errcheck // the test fails then
	})
	bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n")
	c := bed.open(netip.AddrPort{})
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\n")
	r := bufio.NewReader(c)
	res, err := http.ReadResponse(r, nil)
	must(t, err)
	if res.StatusCode != 101 {
		t.Fatalf("got %d, want 101", res.StatusCode)
	}
	_, err = io.ReadFull(r, make([]byte, 4))
	must(t, err)
	fmt.Fprint(c, "seen")
	if _, err := io.ReadAll(r); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the flow ended with %v, want a reset", err)
	}
}

// Much passes after an upgrade, in both directions at once, unchanged and with its half-closes.
func TestUpgradeCarriesMuch(t *testing.T) {
	addr := rawOrigin(t, func(c *net.TCPConn) {
		r := bufio.NewReader(c)
		http.ReadRequest(r) //nolint:errcheck // it is there
		fmt.Fprint(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\n")
		io.Copy(c, r) //nolint:errcheck // the test notices
	})
	bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n")
	c := bed.open(netip.AddrPort{})
	fmt.Fprint(c, "GET / HTTP/1.1\r\nHost: a.test\r\nConnection: Upgrade\r\nUpgrade: own\r\n\r\n")
	r := bufio.NewReader(c)
	if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != 101 {
		t.Fatalf("got %v, %v", res, err)
	}
	sent := make([]byte, 3<<20)
	for i := range sent {
		sent[i] = byte(i * 7 >> 3)
	}
	done := make(chan error, 1)
	go func() {
		var err error
		for left := sent; len(left) > 0 && err == nil; { // sizes about those of the buffers
			n := min(len(left), 1+rand.IntN(40<<10))
			_, err = c.Write(left[:n])
			left = left[n:]
		}
		done <- errors.Join(err, c.CloseWrite())
	}()
	got, err := io.ReadAll(r)
	if err := errors.Join(err, <-done); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("got %d bytes, %v, want the %d that were sent", len(got), err, len(sent))
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
		if in.Value == "fail" {
			return nil, status.Error(codes.FailedPrecondition, "as asked")
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

// An origin that switches protocols unasked gets neither the flow nor a connection that nobody closes.
func TestSwitchThatWasNotAskedFor(t *testing.T) {
	for _, head := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		ended := make(chan error, 1)
		addr := rawOrigin(t, func(c *net.TCPConn) {
			http.ReadRequest(bufio.NewReader(c))                                  //nolint:errcheck // the test then fails
			io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\n"+head+"\r\n") //nolint:errcheck // the test then fails
			_, err := c.Read(make([]byte, 1))
			ended <- err
		})
		bed := newBed(t, "ingress:\n  - service: http://"+addr+"\n")
		if status, _ := bed.get("http://a.test/"); status != http.StatusBadGateway {
			t.Errorf("got %d, want 502", status)
		}
		if err := <-ended; err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the origin's connection stays open: %v", err)
		}
	}
}

func TestGRPC(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	srv := grpc.NewServer()
	srv.RegisterService(&echoService, new(any))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	defer func() { srv.Stop(); <-served }()

	bed := newBed(t, "ingress:\n  - service: http://"+ln.Addr().String()+"\n    origin: {http2_origin: true}\n")
	conn, err := grpc.NewClient("passthrough:///a.test:80", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return bed.open(netip.AddrPort{}), nil }))
	must(t, err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, trailer := new(wrapperspb.StringValue), metadata.MD{}
	if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("hello"), out, grpc.Trailer(&trailer)); err != nil || out.Value != "hello" || len(trailer["x-trailer"]) != 1 {
		t.Fatalf("unary: %q, %v, trailer %v", out.Value, err, trailer)
	}
	if err := conn.Invoke(ctx, "/test.Echo/Unary", wrapperspb.String("fail"), out); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("unary that fails: %v", err)
	}
	for range 20 {
		if err := conn.Invoke(ctx, "/test.Echo/Nothing", wrapperspb.String(""), out); status.Code(err) != codes.Unimplemented {
			t.Fatalf("unknown method: %v", err)
		}
	}
	s, err := conn.NewStream(ctx, &echoService.Streams[0], "/test.Echo/Bidi")
	must(t, err)
	for range 10 {
		must(t, s.SendMsg(wrapperspb.String("ping")))
		must(t, s.RecvMsg(out))
	}
	must(t, s.CloseSend())
	if err := s.RecvMsg(out); status.Code(err) != codes.DataLoss || len(s.Trailer()["x-trailer"]) != 1 {
		t.Errorf("bidi: %v, trailer %v", err, s.Trailer())
	}
}
