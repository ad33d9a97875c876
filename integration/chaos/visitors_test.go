//go:build netns

package chaos

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coder/websocket"
)

// patience bounds one exchange of a visitor.
const patience = 10 * time.Second

// A visitor does one kind of exchange again and again at one edge, and looks at each byte that it gets.
type visitor struct {
	w     *world
	name  string
	edge  string // address
	host  string
	net   string // whose bytes it must get
	mark  mark
	tls   *tls.Config
	seeds *rand.Rand
	visit func(*visitor, context.Context) error

	mu     sync.Mutex // guards the rest
	good   int
	bad    int
	latest time.Time // when the newest exchange that succeeded began
	err    error     // of the newest that did not
}

// visitors are all kinds at each edge, for each network.
func visitors(w *world) (all []*visitor, err error) {
	pem, err := os.ReadFile(w.Roots())
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	kinds := []struct {
		name  string
		visit func(*visitor, context.Context) error
	}{{"new", (*visitor).fresh}, {"kept", (*visitor).kept}, {"websocket", (*visitor).websocket}, {"tcp", (*visitor).stream}, {"udp", (*visitor).datagrams}}
	for e, edge := range w.edges {
		add := func(kind, host, net string, visit func(*visitor, context.Context) error) {
			all = append(all, &visitor{w: w, name: fmt.Sprintf("%s of %s at edge%d", kind, host, e+1), edge: edge, host: host, net: net, mark: marks[net],
				tls: &tls.Config{RootCAs: roots, ServerName: host}, seeds: rand.New(rand.NewPCG(*seed, uint64(len(all)))), visit: visit})
		}
		for _, k := range kinds {
			add(k.name, hostA, "a", k.visit)
			add(k.name, hostB, "b", k.visit)
		}
		add("new", hostPool, "a", (*visitor).fresh)
	}
	return all, nil
}

// run visits until ctx ends.
func (v *visitor) run(ctx context.Context) {
	for ctx.Err() == nil {
		if err := v.visit(v, ctx); err != nil && ctx.Err() == nil {
			v.mu.Lock()
			v.bad++
			v.err = err
			v.mu.Unlock()
		}
		sleep(ctx, time.Duration(50+v.seeds.IntN(250))*time.Millisecond)
	}
}

// served notes an exchange that succeeded.
func (v *visitor) served(began time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.good++
	if began.After(v.latest) {
		v.latest = began
	}
}

// since reports whether an exchange that began after t succeeded.
func (v *visitor) since(t time.Time) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.latest.After(t) {
		return nil
	}
	return fmt.Errorf("%s is not served: %w", v.name, v.err)
}

// compare looks at what came: it must be want, or its beginning. whole says that the end has come.
func (v *visitor) compare(what string, got, want []byte, whole bool) error {
	for i, b := range got {
		if b&0xf0 != v.mark.answer {
			v.w.violate("%s: %s: byte %d of the answer is 0x%02x, which is of another network: %.200q", v.name, what, i, b, got)
			return errors.New("a byte of another network")
		}
	}
	if !bytes.HasPrefix(want, got) || whole && len(got) != len(want) {
		v.w.violate("%s: %s: got %d bytes that are not the %d bytes of this visitor", v.name, what, len(got), len(want))
		return errors.New("wrong bytes")
	}
	return nil
}

// dial connects to the edge with TLS.
func (v *visitor) dial(ctx context.Context, cfg *tls.Config) (net.Conn, error) {
	raw, err := v.w.visitor.Dial(ctx, v.edge+":443")
	if err != nil {
		return nil, err
	}
	c := tls.Client(raw, cfg)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// client makes an HTTP client of the edge.
func (v *visitor) client(http2 bool) (*http.Client, *http.Transport) {
	cfg := v.tls.Clone()
	t := &http.Transport{ForceAttemptHTTP2: http2}
	if http2 {
		cfg.NextProtos = []string{"h2"}
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(4)
	}
	t.DialTLSContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return v.dial(ctx, cfg) }
	return &http.Client{Transport: t}, t
}

// answer reads a response and compares it. What is no success is the edge's own word, or the origin's that it is not well.
func (v *visitor) answer(resp *http.Response, want []byte) error {
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 200))
		return fmt.Errorf("%s: %s", resp.Status, text)
	}
	if got := resp.Header.Get("X-Network"); got != v.net {
		v.w.violate("%s: answered by network %q", v.name, got)
	}
	got, err := io.ReadAll(resp.Body)
	return errors.Join(v.compare("response", got, want, err == nil), err)
}

// fresh is a new visitor: a full handshake and one request.
func (v *visitor) fresh(ctx context.Context) error {
	client, t := v.client(false)
	defer t.CloseIdleConnections()
	return v.get(ctx, client)
}

func (v *visitor) get(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	began, seed, n := time.Now(), v.seeds.Uint64(), 1+v.seeds.IntN(30_000)
	url := fmt.Sprintf("https://%s/bytes?net=%s&n=%d&seed=%d", v.host, v.net, n, seed)
	req, err := http.NewRequestWithContext(ctx, "GET", url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	if err := v.answer(resp, content(v.mark.answer, seed, n)); err != nil {
		return err
	}
	v.served(began)
	return nil
}

// kept is a visitor who stays: several requests over one connection, then another one with a ticket.
func (v *visitor) kept(ctx context.Context) error {
	client, t := v.client(true)
	defer t.CloseIdleConnections()
	for range 20 {
		if err := errors.Join(v.post(ctx, client), v.get(ctx, client)); err != nil {
			return err
		}
		if v.seeds.IntN(4) == 0 {
			t.CloseIdleConnections()
		}
		sleep(ctx, time.Duration(50+v.seeds.IntN(150))*time.Millisecond)
	}
	return nil
}

func (v *visitor) post(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	began, seed, n := time.Now(), v.seeds.Uint64(), 1+v.seeds.IntN(30_000)
	req, err := http.NewRequestWithContext(ctx, "POST", "https://"+v.host+"/echo", bytes.NewReader(content(v.mark.ask, seed, n)))
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	if err := v.answer(resp, content(v.mark.answer, seed, n)); err != nil {
		return err
	}
	v.served(began)
	return nil
}

// websocket sends messages over one connection and wants each back.
func (v *visitor) websocket(ctx context.Context) error {
	client, t := v.client(false)
	defer t.CloseIdleConnections()
	dctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, _, err := websocket.Dial(dctx, "https://"+v.host+"/ws", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		return err
	}
	defer c.CloseNow()
	c.SetReadLimit(1 << 20)
	for range 100 {
		if err := v.message(ctx, c); err != nil {
			return err
		}
		sleep(ctx, time.Duration(50+v.seeds.IntN(150))*time.Millisecond)
	}
	return nil
}

func (v *visitor) message(ctx context.Context, c *websocket.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	began, seed, n := time.Now(), v.seeds.Uint64(), 1+v.seeds.IntN(8_000)
	if err := c.Write(ctx, websocket.MessageBinary, content(v.mark.ask, seed, n)); err != nil {
		return err
	}
	_, got, err := c.Read(ctx)
	if err != nil {
		return err
	}
	if err := v.compare("message", got, content(v.mark.answer, seed, n), true); err != nil {
		return err
	}
	v.served(began)
	return nil
}

// stream talks to the echo service over the public TCP port, and ends its side first.
func (v *visitor) stream(ctx context.Context) error {
	dctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	c, err := v.w.visitor.Dial(dctx, net.JoinHostPort(v.edge, echoPorts[v.net]))
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	for range 50 {
		began, seed, n := time.Now(), v.seeds.Uint64(), 1+v.seeds.IntN(20_000)
		c.SetDeadline(began.Add(patience))
		if _, err := c.Write(content(v.mark.ask, seed, n)); err != nil {
			return err
		}
		got := make([]byte, n)
		m, err := io.ReadFull(c, got)
		if err := errors.Join(v.compare("stream", got[:m], content(v.mark.answer, seed, n), false), err); err != nil {
			return err
		}
		v.served(began)
		sleep(ctx, time.Duration(50+v.seeds.IntN(150))*time.Millisecond)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return err
	}
	rest, err := io.ReadAll(c)
	return errors.Join(v.compare("end of the stream", rest, nil, err == nil), err)
}

// datagrams talks to the echo service over the public UDP port. Some may be lost.
func (v *visitor) datagrams(ctx context.Context) error {
	var c net.Conn
	err := v.w.visitor.Do(func() (err error) {
		c, err = net.Dial("udp", net.JoinHostPort(v.edge, echoPorts[v.net]))
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	sent := map[string]bool{} // what may come back
	answered, buf := 0, make([]byte, 64<<10)
	for i := range 50 {
		began, n := time.Now(), 16+v.seeds.IntN(1_000)
		if i%10 == 9 {
			n += 3_000
		}
		seed := v.seeds.Uint64()
		want := string(content(v.mark.answer, seed, n))
		sent[want] = true
		if _, err := c.Write(content(v.mark.ask, seed, n)); err != nil {
			return err
		}
		c.SetReadDeadline(began.Add(time.Second))
		for {
			m, err := c.Read(buf)
			if err != nil {
				break
			}
			if !sent[string(buf[:m])] {
				v.w.violate("%s: a datagram of %d bytes that nobody sent: %x", v.name, m, buf[:min(m, 64)])
				return errors.New("wrong datagram")
			}
			if string(buf[:m]) == want {
				answered++
				v.served(began)
				break
			}
		}
		if answered == 0 && i == 4 {
			return errors.New("no datagram came back")
		}
		sleep(ctx, time.Duration(50+v.seeds.IntN(100))*time.Millisecond)
	}
	return nil
}

// intrude tries what must never be had: a name whose key no rule permits, a name without a zone, and a public port that
// admits others.
func (w *world) intrude(ctx context.Context, edge string, roots *tls.Config) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, host := range []string{hostForbidden, "nobody.keyhaven.test"} {
		cfg := roots.Clone()
		cfg.ServerName = host
		v := &visitor{w: w, edge: edge}
		if c, err := v.dial(ctx, cfg); err == nil {
			c.Close()
			w.violate("a handshake for %s succeeded", host)
		}
	}
	c, err := w.visitor.Dial(ctx, net.JoinHostPort(edge, "7009"))
	if err != nil {
		return
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(2 * time.Second))
	c.Write(content(marks["a"].ask, 1, 10))
	if n, _ := c.Read(make([]byte, 10)); n > 0 {
		w.violate("the port that admits others answered with %d bytes", n)
	}
}
