package keyless

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/freeport"
)

func TestClientPipelines(t *testing.T) {
	// The handler answers nobody until 1,000 requests are in flight at once.
	var arrived atomic.Int32
	all := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		if arrived.Add(1) == 1000 {
			close(all)
		}
		<-all
		return req.Payload, nil
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 2, MaxInFlight: 1000})
	var wg sync.WaitGroup
	for i := range 1000 {
		wg.Go(func() {
			want := binary.BigEndian.AppendUint32(nil, uint32(i))
			got, err := c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: want})
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("got %x, %v, want %x", got, err, want)
			}
		})
	}
	wg.Wait()
	if st := c.Stats().Servers[0]; st.InFlight != 0 {
		t.Errorf("%d in flight when all is done", st.InFlight)
	}
}

func TestClientRepliesOutOfOrder(t *testing.T) {
	release := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		if string(req.Payload) == "slow" {
			<-release
		}
		return req.Payload, nil
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 1})
	slow := make(chan error, 1)
	go func() {
		got, err := c.Do(context.Background(), &Operation{Opcode: OpSeal, Payload: []byte("slow")})
		if err == nil && string(got) != "slow" {
			err = errors.New("got " + string(got))
		}
		slow <- err
	}()
	eventually(t, "the slow request is out", func() bool { return c.Stats().Servers[0].InFlight == 1 })
	for range 10 {
		if got, err := c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: []byte("fast")}); err != nil || string(got) != "fast" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	close(release)
	if err := <-slow; err != nil {
		t.Error(err)
	}
}

func TestClientReturnsRefusal(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) { return nil, ErrKeyNotFound })})
	var results []ClientResult
	c := startClient(t, ClientConfig{Servers: []string{addr}, OnResult: func(r ClientResult) { results = append(results, r) }})
	_, err := c.Do(t.Context(), &Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign, SKI: SKI{1}})
	wantErr(t, err, ErrKeyNotFound)
	if want := "keyless: keyhaven/tls-sign by " + addr; !strings.HasPrefix(err.Error(), want) {
		t.Errorf("got %q, want it to start with %q", err, want)
	}
	if len(results) != 1 {
		t.Fatalf("got %d results, want 1", len(results))
	}
	if r := results[0]; r.Server != addr || r.Func != FuncTLSSign || r.Attempts != 1 || !errors.Is(r.Err, ErrKeyNotFound) {
		t.Errorf("got %+v", r)
	}
}

func TestClientRefusesTooLongRequest(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	_, err := c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: make([]byte, MaxBody)})
	wantErr(t, err, ErrFormat)
	if _, err := c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: make([]byte, 60_000)}); err != nil {
		t.Errorf("after a request that was too long: %v", err)
	}
}

func TestNewClientRefuses(t *testing.T) {
	for name, cfg := range map[string]ClientConfig{
		"no servers":    {TLS: clientTLS},
		"no TLS":        {Servers: []string{"127.0.0.1:1"}},
		"slow heart":    {Servers: []string{"127.0.0.1:1"}, TLS: clientTLS, Heartbeat: 30 * time.Second},
		"nothing given": {},
	} {
		if c, err := NewClient(cfg); err == nil {
			c.Close()
			t.Errorf("%s: NewClient succeeded", name)
		}
	}
}

// With one of two servers killed, requests go on without an error, those in flight included.
func TestClientFailsOver(t *testing.T) {
	var stops []func() error
	var addrs []string
	var served [2]atomic.Int32
	for i := range served {
		addr, stop := startServer(t, &Server{DrainTimeout: time.Millisecond, Handler: handlerFunc(func(ctx context.Context, req *Request) ([]byte, error) {
			served[i].Add(1)
			select {
			case <-time.After(2 * time.Millisecond):
				return req.Payload, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		})})
		addrs, stops = append(addrs, addr), append(stops, stop)
	}
	c := startClient(t, ClientConfig{Servers: addrs})
	eventually(t, "both are connected", func() bool { st := c.Stats(); return st.Servers[0].Conns == 2 && st.Servers[1].Conns == 2 })
	var wg sync.WaitGroup
	killed := make(chan struct{})
	for range 32 {
		wg.Go(func() {
			for i := 0; ; i++ {
				if _, err := c.Do(context.Background(), &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}); err != nil {
					t.Errorf("request failed: %v", err)
					return
				}
				select {
				case <-killed:
					if i > 50 {
						return
					}
				default:
				}
			}
		})
	}
	eventually(t, "both have served", func() bool { return served[0].Load() > 50 && served[1].Load() > 50 })
	if err := stops[0](); err != nil {
		t.Error(err)
	}
	close(killed)
	wg.Wait()
	if !c.Healthy() {
		t.Error("not healthy with one server left")
	}
	if st := c.Stats().Servers[0]; st.Conns != 0 || st.Failures == 0 || st.LastErr == nil {
		t.Errorf("stats of the killed server: %+v", st)
	}
}

// A peer that takes requests and then breaks the connection: what may be repeated is, a custom function is not.
func TestClientRepeatsOnlyWhatIsSafe(t *testing.T) {
	for _, tt := range []struct {
		name   string
		op     Operation
		repeat bool
	}{
		{"tls-sign", Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign, SKI: SKI{1}}, true},
		{"plain signature", Operation{Opcode: OpEd25519Sign, SKI: SKI{1}}, true},
		{"decryption", Operation{Opcode: OpRSADecrypt, SKI: SKI{1}}, true},
		{"renewal", Operation{Opcode: OpCustom, CustomFunc: FuncRenew}, false},
		{"custom function", Operation{Opcode: OpCustom, CustomFunc: "other/function"}, false},
		{"seal", Operation{Opcode: OpSeal}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var server *Server
			var calls atomic.Int32
			server = &Server{Handler: handlerFunc(func(ctx context.Context, _ *Request) ([]byte, error) {
				if calls.Add(1) == 1 {
					server.CloseIf(func(Peer) bool { return true })
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return []byte("second"), nil
			})}
			addr, _ := startServer(t, server)
			c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 1})
			got, err := c.Do(t.Context(), &tt.op)
			if tt.repeat && (err != nil || string(got) != "second") {
				t.Errorf("got %q, %v, want the second attempt's reply", got, err)
			}
			if !tt.repeat {
				wantErr(t, err, errBroken)
			}
			want := int32(1)
			if tt.repeat {
				want = 2
			}
			if calls.Load() != want {
				t.Errorf("the server was asked %d times, want %d", calls.Load(), want)
			}
		})
	}
}

func TestClientMovesOnFromInternalError(t *testing.T) {
	var sick atomic.Int32
	bad, _ := startServer(t, &Server{Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) {
		sick.Add(1)
		return nil, ErrInternal
	})})
	good, _ := startServer(t, &Server{Handler: echo})
	c := startClient(t, ClientConfig{Servers: []string{bad, good}})
	eventually(t, "both are connected", func() bool { st := c.Stats(); return st.Servers[0].Conns == 2 && st.Servers[1].Conns == 2 })
	for range 20 {
		if _, err := c.Do(t.Context(), &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}); err != nil {
			t.Fatal(err)
		}
	}
	if sick.Load() == 0 {
		t.Error("the ailing server was never asked, so nothing was proved")
	}
}

// A server whose token is away does not know the token's keys: another one may. When none does, each was asked once.
func TestClientMovesOnFromMissingKey(t *testing.T) {
	var asked atomic.Int32
	empty := handlerFunc(func(context.Context, *Request) ([]byte, error) {
		asked.Add(1)
		return nil, ErrKeyNotFound
	})
	first, _ := startServer(t, &Server{Handler: empty})
	second, _ := startServer(t, &Server{Handler: empty})
	full, _ := startServer(t, &Server{Handler: echo})
	op := &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}, Payload: []byte("m")}
	connected := func(c *Client) {
		eventually(t, "both are connected", func() bool { st := c.Stats(); return st.Servers[0].Conns == 2 && st.Servers[1].Conns == 2 })
	}
	c := startClient(t, ClientConfig{Servers: []string{first, full}})
	connected(c)
	for range 20 {
		if _, err := c.Do(t.Context(), op); err != nil {
			t.Fatal(err)
		}
	}
	if asked.Swap(0) == 0 {
		t.Error("the server without the key was never asked, so nothing was proved")
	}
	c = startClient(t, ClientConfig{Servers: []string{first, second}})
	connected(c)
	_, err := c.Do(t.Context(), op)
	wantErr(t, err, ErrKeyNotFound)
	if n := asked.Swap(0); n != 2 {
		t.Errorf("%d servers were asked, want each once", n)
	}
	_, err = c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: []byte("m")})
	wantErr(t, err, ErrKeyNotFound)
	if n := asked.Load(); n != 1 {
		t.Errorf("sealing was asked for %d times, want once", n)
	}
}

// While nothing can be reached, requests fail at once; when the server is back, they work again by themselves.
func TestClientUnavailableAndBack(t *testing.T) {
	addr := must(freeport.Addr("127.0.0.1"))
	stop := serveOn(t, &Server{Handler: echo}, must(net.Listen("tcp", addr)))
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	ping := func() error {
		_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
		return err
	}
	if err := ping(); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client has noticed", func() bool { return !c.Healthy() })
	wantErr(t, ping(), ErrUnavailable)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	serveOn(t, &Server{Handler: echo}, ln)
	eventually(t, "the server is used again", func() bool { return ping() == nil })
}

// A server whose TLS handshake succeeds but which does not admit the client is down, not up and down.
func TestClientNotAdmitted(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo, Identify: func(tls.ConnectionState) (string, error) {
		return "", errors.New("nobody is admitted")
	}})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
	wantErr(t, err, ErrUnavailable)
	if c.Healthy() {
		t.Error("healthy")
	}
}

func TestClientDoesNotTrustAnyServer(t *testing.T) {
	other := newTestCA()
	cfg := serverTLS()
	cfg.Certificates = []tls.Certificate{other.issue("", "keyserver.test")}
	addr, _ := startServer(t, &Server{Handler: echo, TLS: cfg})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
	wantErr(t, err, ErrUnavailable)
	if last := c.Stats().Servers[0].LastErr; last == nil || !strings.Contains(last.Error(), "certificate") {
		t.Errorf("LastErr = %v, want it to name the certificate", last)
	}
}

func TestClientNeedsAuthenticatingTLS(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo})
	for name, cfg := range map[string]*tls.Config{"none": nil, "trusts anybody": {InsecureSkipVerify: true, Certificates: clientTLS("").Certificates}} {
		c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: func(string) *tls.Config { return cfg }})
		_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
		wantErr(t, err, ErrUnavailable)
		if last := c.Stats().Servers[0].LastErr; last == nil || !strings.Contains(last.Error(), "does not authenticate") {
			t.Errorf("%s: LastErr = %v", name, last)
		}
	}
}

func TestAddrPort(t *testing.T) {
	for in, want := range map[net.Addr]string{
		&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5}:     "192.0.2.1:5",
		&net.TCPAddr{IP: net.ParseIP("2001:db8::1"), Port: 6}: "[2001:db8::1]:6",
		&net.UnixAddr{Name: "/run/x", Net: "unix"}:            "invalid AddrPort",
	} {
		if got := addrPort(in).String(); got != want {
			t.Errorf("%v: got %s, want %s", in, got, want)
		}
	}
}

func TestClientOverloaded(t *testing.T) {
	release := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) { <-release; return nil, nil })})
	c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 1, MaxInFlight: 4})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := c.Do(context.Background(), &Operation{Opcode: OpSeal}); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "the connection is full", func() bool { return c.Stats().Servers[0].InFlight == 4 })
	_, err := c.Do(t.Context(), &Operation{Opcode: OpSeal})
	wantErr(t, err, ErrOverloaded)
	close(release)
	wg.Wait()
}

func TestClientCallerGivesUp(t *testing.T) {
	release := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) { <-release; return req.Payload, nil })})
	c := startClient(t, ClientConfig{Servers: []string{addr}, ConnsPerServer: 1})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := c.Do(ctx, &Operation{Opcode: OpSeal, Payload: []byte("late")})
		done <- err
	}()
	eventually(t, "the request is out", func() bool { return c.Stats().Servers[0].InFlight == 1 })
	cancel()
	wantErr(t, <-done, context.Canceled)
	close(release)
	// The late reply belongs to nobody and must not reach the next request.
	for range 100 {
		if got, err := c.Do(t.Context(), &Operation{Opcode: OpSeal, Payload: []byte("next")}); err != nil || string(got) != "next" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
}

func TestClientClose(t *testing.T) {
	started := make(chan struct{})
	addr, _ := startServer(t, &Server{DrainTimeout: time.Millisecond, Handler: handlerFunc(func(ctx context.Context, _ *Request) ([]byte, error) {
		close(started)
		<-ctx.Done()
		return nil, ctx.Err()
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	done := make(chan error, 1)
	go func() {
		_, err := c.Do(context.Background(), &Operation{Opcode: OpEd25519Sign, SKI: SKI{1}})
		done <- err
	}()
	<-started
	for range 2 {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
	wantErr(t, <-done, ErrClosed)
	_, err := c.Do(t.Context(), &Operation{Opcode: OpPing})
	wantErr(t, err, ErrClosed)
}

// A server that answers with nonsense costs the connection, and is not believed.
func TestClientBadServers(t *testing.T) {
	reply := func(id uint32, op Operation) []byte {
		return must((&Packet{Major: 1, ID: id, Operation: op}).Append(nil))
	}
	for _, tt := range []struct {
		name string
		raw  func(id uint32) []byte
		want string
	}{
		{"another major version", func(id uint32) []byte {
			b := reply(id, Operation{Opcode: OpResponse})
			b[0] = 2
			return b
		}, "major version 2"},
		{"malformed body", func(id uint32) []byte { return []byte{1, 0, 0, 1, 0, 0, 0, byte(id), 0x11} }, "left over"},
		{"a ping for a reply", func(id uint32) []byte { return reply(id, Operation{Opcode: OpPing}) }, "no reply"},
		{"a pong for a signature", func(id uint32) []byte { return reply(id, Operation{Opcode: OpPong}) }, "no reply"},
		{"an error of two bytes", func(id uint32) []byte {
			return reply(id, Operation{Opcode: OpError, Payload: []byte{1, 2}})
		}, "no reply"},
		{"an error without a code", func(id uint32) []byte { return reply(id, Operation{Opcode: OpError}) }, "no reply"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ln := must(tls.Listen("tcp", "127.0.0.1:0", serverTLS()))
			var wg sync.WaitGroup
			wg.Go(func() {
				for {
					conn, err := ln.Accept()
					if err != nil {
						return
					}
					wg.Go(func() {
						defer conn.Close()
						for r := newFrameReader(conn); ; {
							h, body, err := r.next()
							if err != nil {
								return
							}
							if op, _ := ParseBody(body); op.Opcode == OpPing {
								conn.Write(reply(h.ID, Operation{Opcode: OpPong}))
								continue
							}
							conn.Write(tt.raw(h.ID))
						}
					})
				}
			})
			c := startClient(t, ClientConfig{Servers: []string{ln.Addr().String()}, Timeout: 5 * time.Second})
			_, err := c.Do(t.Context(), &Operation{Opcode: OpSeal})
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want it to say %q", err, tt.want)
			}
			c.Close()
			ln.Close()
			wg.Wait()
		})
	}
}
