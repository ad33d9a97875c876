package keyless

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

func TestServerPing(t *testing.T) {
	addr, _ := startServer(t, &Server{Handler: echo})
	conn := dialRaw(t, addr)
	for _, v := range vectors(t) {
		if !strings.HasPrefix(v.name, "ping req") {
			continue
		}
		conn.Write(v.packet)
		got := make([]byte, 1024)
		if _, err := io.ReadFull(conn, got); err != nil {
			t.Fatal(err)
		}
		for _, want := range vectors(t) {
			if want.name == "pong id=0" && !bytes.Equal(got, want.packet) {
				t.Errorf("got %x, want %x", got, want.packet)
			}
		}
		return
	}
	t.Fatal("no ping among the vectors")
}

// Each bad request gets its code, and the connection lives on.
func TestServerRefusals(t *testing.T) {
	var handled atomic.Int32
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		handled.Add(1)
		switch req.CustomFunc {
		case "plain error":
			return nil, errors.New("HSM slot 3 is on fire")
		case "panic":
			panic("at the token")
		case "too long":
			return make([]byte, MaxBody), nil
		case "code 0":
			return nil, &Error{}
		}
		return nil, ErrKeyNotFound
	})})
	conn := dialRaw(t, addr)
	r := newFrameReader(conn)
	body := func(s string) []byte {
		b := must(hex.DecodeString(s))
		return append([]byte{1, 0, byte(len(b) >> 8), byte(len(b)), 0, 0, 0, 9}, b...)
	}
	packet := func(op Operation) []byte {
		p := Packet{Major: 1, ID: 9, Operation: op}
		return must(p.Append(nil))
	}
	ski := SKI{1}
	for _, tt := range []struct {
		name    string
		packet  []byte
		want    ErrorCode
		handler bool
	}{
		{"major version 2", append([]byte{2}, packet(Operation{Opcode: OpPing})[1:]...), CodeVersion, false},
		{"major version 0, garbage body", []byte{0, 0, 0, 3, 0, 0, 0, 9, 0xff, 0xff, 0xff}, CodeVersion, false},
		{"item past the end", body("110001f1120005"), CodeFormat, false},
		{"opcode twice", body("110001f1110001f1"), CodeFormat, false},
		{"empty body", body(""), CodeBadOpcode, false},
		{"opcode 0", body("11000100"), CodeBadOpcode, false},
		{"unknown opcode", body("11000199"), CodeBadOpcode, false},
		{"response as a request", packet(Operation{Opcode: OpResponse}), CodeUnexpectedOpcode, false},
		{"pong as a request", packet(Operation{Opcode: OpPong}), CodeUnexpectedOpcode, false},
		{"error as a request", packet(Operation{Opcode: OpError}), CodeUnexpectedOpcode, false},
		{"RPC", packet(Operation{Opcode: OpRPC}), CodeInternal, false},
		{"sign without a key", packet(Operation{Opcode: OpECDSASignSHA256, Payload: make([]byte, 32)}), CodeFormat, false},
		{"tls-sign without a key", packet(Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign}), CodeFormat, false},
		{"decrypt without a key", packet(Operation{Opcode: OpRSADecrypt}), CodeFormat, false},
		{"digest too long", packet(Operation{Opcode: OpECDSASignSHA256, SKI: ski, Payload: make([]byte, 33)}), CodeFormat, false},
		{"digest too short", packet(Operation{Opcode: OpRSASignMD5SHA1, SKI: ski, Payload: make([]byte, 35)}), CodeFormat, false},
		{"no digest", packet(Operation{Opcode: OpRSAPSSSignSHA256, SKI: ski}), CodeFormat, false},
		{"unknown key", packet(Operation{Opcode: OpECDSASignSHA256, SKI: ski, Payload: make([]byte, 32)}), CodeKeyNotFound, true},
		{"by digest", packet(Operation{Opcode: OpECDSASignSHA256, Digest: [32]byte{1}, Payload: make([]byte, 32)}), CodeKeyNotFound, true},
		{"any error of the handler", packet(Operation{Opcode: OpCustom, CustomFunc: "plain error"}), CodeInternal, true},
		{"error without a code", packet(Operation{Opcode: OpCustom, CustomFunc: "code 0"}), CodeInternal, true},
		{"panic of the handler", packet(Operation{Opcode: OpCustom, CustomFunc: "panic"}), CodeInternal, true},
		{"reply too long", packet(Operation{Opcode: OpCustom, CustomFunc: "too long"}), CodeInternal, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := handled.Load()
			conn.Write(tt.packet)
			id, op := receive(t, r)
			if id != 9 || op.Opcode != OpError || !bytes.Equal(op.Payload, []byte{byte(tt.want)}) {
				t.Errorf("got id %d, %s %x, want error %d", id, op.Opcode, op.Payload, tt.want)
			}
			if got := handled.Load() != before; got != tt.handler {
				t.Errorf("handler called: %v, want %v", got, tt.handler)
			}
		})
	}
	send(t, conn, 1, Operation{Opcode: OpPing})
	if _, op := receive(t, r); op.Opcode != OpPong {
		t.Errorf("after all that: got %s, want a pong", op.Opcode)
	}
}

// A malformed body among 1,000 requests in flight costs none of the others.
func TestServerBadBodyHarmsNoOther(t *testing.T) {
	release := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		<-release
		return req.Payload, nil
	})})
	conn := dialRaw(t, addr)
	var stream []byte
	for i := range 1000 {
		p := Packet{Major: 1, ID: uint32(i), Operation: Operation{Opcode: OpSeal, Payload: []byte{byte(i >> 8), byte(i)}}}
		stream = must(p.Append(stream))
		if i == 500 {
			stream = append(stream, 1, 0, 0, 3, 0xff, 0xff, 0xff, 0xff, 0x11, 0xff, 0xff)
		}
	}
	go conn.Write(stream)
	r := newFrameReader(conn)
	if id, op := receive(t, r); id != 0xffffffff || op.Payload[0] != byte(CodeFormat) {
		t.Fatalf("got id %d, %s %x, want the malformed one's error first", id, op.Opcode, op.Payload)
	}
	close(release)
	seen := map[uint32]bool{}
	for range 1000 {
		id, op := receive(t, r)
		if op.Opcode != OpResponse || !bytes.Equal(op.Payload, []byte{byte(id >> 8), byte(id)}) || seen[id] {
			t.Fatalf("id %d: %s %x (seen: %v)", id, op.Opcode, op.Payload, seen[id])
		}
		seen[id] = true
	}
}

// One id for all requests in flight, as some load generators do, and replies in another order than the requests.
func TestServerDuplicateIDsAndOrder(t *testing.T) {
	first := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		if string(req.Payload) == "first" {
			<-first
		}
		return req.Payload, nil
	})})
	conn := dialRaw(t, addr)
	r := newFrameReader(conn)
	send(t, conn, 7, Operation{Opcode: OpSeal, Payload: []byte("first")})
	send(t, conn, 7, Operation{Opcode: OpSeal, Payload: []byte("second")})
	if id, op := receive(t, r); id != 7 || string(op.Payload) != "second" {
		t.Errorf("got id %d, %q, want the second request's reply", id, op.Payload)
	}
	close(first)
	if id, op := receive(t, r); id != 7 || string(op.Payload) != "first" {
		t.Errorf("got id %d, %q, want the first request's reply", id, op.Payload)
	}
}

// The handler sees every field, and the bytes stay put while later packets pass through the read buffer.
func TestServerRequest(t *testing.T) {
	got := make(chan Request, 1)
	goOn := make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		if req.Opcode == OpSeal {
			<-goOn
			r := *req
			r.Payload, r.Extra = bytes.Clone(r.Payload), bytes.Clone(r.Extra)
			got <- r
		}
		return nil, nil
	})})
	conn := dialRaw(t, addr)
	send(t, conn, 1, Operation{Opcode: OpSeal, Payload: []byte("payload"), Extra: []byte("extra"), SNI: "a.test"})
	r := newFrameReader(conn)
	for range 200 {
		send(t, conn, 2, Operation{Opcode: OpUnseal, Payload: bytes.Repeat([]byte("X"), 900)})
		receive(t, r)
	}
	close(goOn)
	req := <-got
	if string(req.Payload) != "payload" || string(req.Extra) != "extra" || req.SNI != "a.test" {
		t.Errorf("got %+v", req.Operation)
	}
	if req.Peer.ID != "spiffe://test/edge/one" || req.Peer.Addr.String() != conn.LocalAddr().String() {
		t.Errorf("got peer %+v", req.Peer)
	}
}

// Beyond MaxInFlight the connection is not read; nothing is refused and nothing lost.
func TestServerMaxInFlight(t *testing.T) {
	var now, most atomic.Int32
	addr, _ := startServer(t, &Server{MaxInFlight: 3, Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		n := now.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		time.Sleep(time.Millisecond)
		now.Add(-1)
		return req.Payload, nil
	})})
	conn := dialRaw(t, addr)
	go func() {
		for i := range 100 {
			p := Packet{Major: 1, ID: uint32(i), Operation: Operation{Opcode: OpSeal}}
			conn.Write(must(p.Append(nil)))
		}
	}()
	r := newFrameReader(conn)
	for range 100 {
		receive(t, r)
	}
	if got := most.Load(); got != 3 {
		t.Errorf("%d operations at once, want 3", got)
	}
}

func TestServerRefusesToStart(t *testing.T) {
	for name, s := range map[string]*Server{
		"no handler":         {TLS: serverTLS()},
		"no TLS":             {Handler: echo},
		"no client auth":     {Handler: echo, TLS: &tls.Config{Certificates: []tls.Certificate{serverCert()}}},
		"optional":           {Handler: echo, TLS: &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: ca().pool}},
		"any, unverified":    {Handler: echo, TLS: &tls.Config{ClientAuth: tls.RequireAnyClientCert}},
		"the system's roots": {Handler: echo, TLS: &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert}},
	} {
		ln := must(net.Listen("tcp", "127.0.0.1:0"))
		if err := s.Serve(context.Background(), ln); err == nil {
			t.Errorf("%s: Serve succeeded", name)
		}
		if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s: the listener is still open", name)
		}
	}
}

func TestServerWhoMayConnect(t *testing.T) {
	other := newTestCA()
	for _, tt := range []struct {
		name string
		cert tls.Certificate
		ok   bool
	}{
		{"with a URI name", clientCert(), true},
		{"of another authority", other.issue("spiffe://test/edge/one", ""), false},
		{"without a URI name", ca().issue("", "edge.test"), false},
		{"no certificate", tls.Certificate{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			refused := make(chan string, 8)
			addr, _ := startServer(t, &Server{Handler: echo, Metrics: ServerMetrics{Refused: func(why string) { refused <- why }}})
			cfg := clientTLSWith(tt.cert)
			if tt.cert.Certificate == nil {
				cfg.Certificates = nil
			}
			conn, err := tls.Dial("tcp", addr, cfg)
			if err == nil { // in TLS 1.3 the client is done before the server has looked at its certificate
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(20 * time.Second))
				conn.Write(must((&Packet{Major: 1, Operation: Operation{Opcode: OpPing}}).Append(nil)))
				_, _, err = newFrameReader(conn).next()
			}
			if (err == nil) != tt.ok {
				t.Errorf("ping: got %v, want it to work: %v", err, tt.ok)
			}
			if !tt.ok {
				if why := <-refused; why != "handshake" && why != "identity" {
					t.Errorf("refused for %q", why)
				}
				return
			}
			if len(refused) != 0 {
				t.Errorf("refused for %q", <-refused)
			}
		})
	}
}

func TestServerConfigPerClientIsChecked(t *testing.T) {
	cfg := serverTLS()
	cfg.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		return &tls.Config{Certificates: []tls.Certificate{serverCert()}}, nil // forgets client authentication
	}
	addr, _ := startServer(t, &Server{Handler: echo, TLS: cfg})
	if conn, err := tls.Dial("tcp", addr, clientTLS(addr)); err == nil {
		conn.Close()
		t.Error("a configuration without client authentication was used")
	}
}

func TestServerTLS12ForOldClients(t *testing.T) {
	cfg := serverTLS()
	cfg.MinVersion = tls.VersionTLS12
	addr, _ := startServer(t, &Server{Handler: echo, TLS: cfg})
	ccfg := clientTLS(addr)
	ccfg.MaxVersion = tls.VersionTLS12
	ccfg.CipherSuites = []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384}
	c := startClient(t, ClientConfig{Servers: []string{addr}, TLS: func(string) *tls.Config { return ccfg }})
	if _, err := c.Do(t.Context(), &Operation{Opcode: OpPing}); err != nil {
		t.Error(err)
	}
	strict, _ := startServer(t, &Server{Handler: echo})
	if conn, err := tls.Dial("tcp", strict, ccfg); err == nil {
		conn.Close()
		t.Error("TLS 1.2 accepted without being asked for")
	}
}

func TestServerConnectionLimits(t *testing.T) {
	var perPeer, inAll atomic.Int32
	addr, _ := startServer(t, &Server{Handler: echo, MaxConns: 3, MaxConnsPerPeer: 2, Metrics: ServerMetrics{Refused: func(why string) {
		switch why {
		case "peer-limit":
			perPeer.Add(1)
		case "limit":
			inAll.Add(1)
		}
	}}})
	// connect reports whether a connection came about on which a ping is answered.
	connect := func(cert tls.Certificate) (*tls.Conn, bool) {
		conn, err := tls.Dial("tcp", addr, clientTLSWith(cert))
		if err != nil {
			return nil, false
		}
		t.Cleanup(func() { conn.Close() })
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		conn.Write(must((&Packet{Major: 1, Operation: Operation{Opcode: OpPing}}).Append(nil)))
		_, _, err = newFrameReader(conn).next()
		return conn, err == nil
	}
	other := ca().issue("spiffe://test/edge/two", "")
	first, ok := connect(clientCert())
	_, ok2 := connect(clientCert())
	if !ok || !ok2 {
		t.Fatal("two connections of one peer do not work")
	}
	if _, ok := connect(clientCert()); ok || perPeer.Load() != 1 {
		t.Errorf("third connection of one peer: works %v, refused %d times", ok, perPeer.Load())
	}
	eventually(t, "another peer connects", func() bool { _, ok := connect(other); return ok })
	before := inAll.Load() // the refused third may have held its place for a moment
	if _, ok := connect(other); ok || inAll.Load() != before+1 {
		t.Errorf("fourth connection: works %v, refused %d times", ok, inAll.Load()-before)
	}
	first.Close()
	eventually(t, "a place becomes free", func() bool { _, ok := connect(clientCert()); return ok })
}

func TestServerCloseIf(t *testing.T) {
	var ended atomic.Int32
	s := &Server{Handler: handlerFunc(func(ctx context.Context, req *Request) ([]byte, error) {
		if req.Opcode == OpSeal {
			<-ctx.Done()
			ended.Add(1)
		}
		return nil, nil
	})}
	addr, _ := startServer(t, s)
	one := dialRaw(t, addr)
	two := must(tls.Dial("tcp", addr, clientTLSWith(ca().issue("spiffe://test/edge/two", ""))))
	defer two.Close()
	for _, c := range []net.Conn{one, two} {
		send(t, c, 0, Operation{Opcode: OpPing})
		receive(t, newFrameReader(c))
	}
	send(t, one, 1, Operation{Opcode: OpSeal})
	send(t, one, 2, Operation{Opcode: OpPing})
	receive(t, newFrameReader(one)) // the seal is in the handler now
	s.CloseIf(func(p Peer) bool { return p.ID == "spiffe://test/edge/one" })
	if _, _, err := newFrameReader(one).next(); err == nil {
		t.Error("the connection of the dropped peer lives")
	}
	eventually(t, "the operation's context ends", func() bool { return ended.Load() == 1 })
	send(t, two, 3, Operation{Opcode: OpPing})
	receive(t, newFrameReader(two))
}

// When Serve's context ends, what is in flight is finished and answered, and then the peer sees the end of the stream.
func TestServerDrain(t *testing.T) {
	started, release := make(chan struct{}), make(chan struct{})
	addr, stop := startServer(t, &Server{Handler: handlerFunc(func(context.Context, *Request) ([]byte, error) {
		close(started)
		<-release
		return []byte("done"), nil
	})})
	conn := dialRaw(t, addr)
	send(t, conn, 1, Operation{Opcode: OpSeal})
	<-started
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	eventually(t, "the listener closes", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(release)
	r := newFrameReader(conn)
	if _, op := receive(t, r); string(op.Payload) != "done" {
		t.Errorf("got %q, want done", op.Payload)
	}
	if _, _, err := r.next(); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// A client that breaks off ends the contexts of its operations.
func TestServerCancelsForLostClient(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(ctx context.Context, req *Request) ([]byte, error) {
		close(started)
		<-ctx.Done()
		if cause := context.Cause(ctx); cause != errConnEnded {
			t.Errorf("ended with %v, want %v", cause, errConnEnded)
		}
		close(ended)
		return nil, ctx.Err()
	})})
	conn := dialRaw(t, addr)
	send(t, conn, 1, Operation{Opcode: OpSeal})
	<-started
	conn.NetConn().Close()
	<-ended // Serve's default OpTimeout would end it, too, but not with this cause
}

func TestServerMetrics(t *testing.T) {
	var mu sync.Mutex
	var conns, flying, most int
	var results []Result
	addr, stop := startServer(t, &Server{Handler: echo, Metrics: ServerMetrics{
		Connections: func(d int) { mu.Lock(); conns += d; mu.Unlock() },
		InFlight:    func(d int) { mu.Lock(); flying += d; most = max(most, flying); mu.Unlock() },
		Result:      func(r Result) { r.Duration = 0; mu.Lock(); results = append(results, r); mu.Unlock() },
	}})
	conn := dialRaw(t, addr)
	r := newFrameReader(conn)
	for _, op := range []Operation{
		{Opcode: OpPing}, {Opcode: OpRPC}, {Opcode: OpSeal}, {Opcode: OpCustom, CustomFunc: "a peer's text"},
		{Opcode: OpCustom, CustomFunc: FuncTLSSign, SKI: SKI{1}},
	} {
		send(t, conn, 1, op)
		receive(t, r)
	}
	conn.Close()
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	want := []Result{
		{Opcode: OpPing}, {Opcode: OpRPC, Code: CodeInternal}, {Opcode: OpSeal}, {Opcode: OpCustom, Func: "other"},
		{Opcode: OpCustom, Func: FuncTLSSign},
	}
	if len(results) != len(want) {
		t.Fatalf("got %+v, want %+v", results, want)
	}
	for i := range want {
		if results[i] != want[i] {
			t.Errorf("result %d: got %+v, want %+v", i, results[i], want[i])
		}
	}
	if conns != 0 || flying != 0 || most != 1 {
		t.Errorf("connections %d, in flight %d (at most %d), want 0, 0 (1)", conns, flying, most)
	}
}

func TestOnlyURI(t *testing.T) {
	leaf := func(c tls.Certificate) tls.ConnectionState {
		return tls.ConnectionState{PeerCertificates: []*x509.Certificate{must(x509.ParseCertificate(c.Certificate[0]))}}
	}
	two := leaf(clientCert())
	two.PeerCertificates[0].URIs = append(two.PeerCertificates[0].URIs, two.PeerCertificates[0].URIs[0])
	for name, cs := range map[string]tls.ConnectionState{"none": leaf(serverCert()), "two": two} {
		if id, err := onlyURI(cs); err == nil {
			t.Errorf("%s: got %q", name, id)
		}
	}
	if id, err := onlyURI(leaf(clientCert())); err != nil || id != "spiffe://test/edge/one" {
		t.Errorf("got %q, %v", id, err)
	}
}

// failing is a listener that fails as often as told before it works.
type failing struct {
	net.Listener
	errs []error
}

func (f *failing) Accept() (net.Conn, error) {
	if len(f.errs) > 0 {
		err := f.errs[0]
		f.errs = f.errs[1:]
		return nil, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", err)}
	}
	return f.Listener.Accept()
}

// Too many open files passes; an error that does not ends Serve, and ends what it has accepted.
func TestServerAcceptErrors(t *testing.T) {
	ln := must(net.Listen("tcp", "127.0.0.1:0"))
	serveOn(t, &Server{Handler: echo}, &failing{ln, []error{syscall.EMFILE, syscall.ECONNABORTED, syscall.ENFILE}})
	conn := dialRaw(t, ln.Addr().String())
	send(t, conn, 1, Operation{Opcode: OpPing})
	receive(t, newFrameReader(conn))

	broken := &failing{must(net.Listen("tcp", "127.0.0.1:0")), []error{syscall.EBADF}}
	err := (&Server{Handler: echo, TLS: serverTLS()}).Serve(t.Context(), broken)
	wantErr(t, err, syscall.EBADF)
}
