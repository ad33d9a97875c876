// Swarm opens many WebSockets or UDP sessions at one time, and is the service that they lead to, for tests of what idle ones
// cost. It is a program of its own so that tests can run it in a namespace, without the race detector.
//
//	swarm serve ADDR                   sends WebSocket messages and packets back
//	swarm ws ADDR HOST ROOTS N         opens WebSockets at the edge
//	swarm udp ADDR N                   opens UDP sessions at the edge
//
// A client says "open" when all are open. For each line that it reads it sends a message over each and says "good" when all
// are back; at the end of its input it closes them and says "closed".
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/coder/websocket"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "swarm:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "serve":
		return serve(args[1])
	case len(args) == 5 && args[0] == "ws":
		open, err := webSockets(args[1], args[2], args[3])
		if err != nil {
			return err
		}
		return swarm(args[4], open)
	case len(args) == 3 && args[0] == "udp":
		return swarm(args[2], func(context.Context) (conn, error) {
			c, err := net.Dial("udp", args[1])
			return packets{c}, err
		})
	}
	return errors.New("see the source for how to call it")
}

// A conn is one member of the swarm.
type conn interface {
	talk(ctx context.Context) error // sends a message and has it back
	close()
}

// opening is how many are opened, and spoken over, at one time.
const opening = 32

func swarm(number string, open func(context.Context) (conn, error)) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	all := make([]conn, n)
	err = each(n, func(ctx context.Context, i int) (err error) {
		if all[i], err = open(ctx); err == nil {
			err = all[i].talk(ctx)
		}
		return err
	})
	if err != nil {
		return err
	}
	fmt.Println("open")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		if err := each(n, func(ctx context.Context, i int) error { return all[i].talk(ctx) }); err != nil {
			return err
		}
		fmt.Println("good")
	}
	for _, c := range all {
		c.close()
	}
	fmt.Println("closed")
	return nil
}

// each does something n times, several at a time, until one fails.
func each(n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	next := make(chan int)
	var wg sync.WaitGroup
	for range opening {
		wg.Go(func() {
			for i := range next {
				one, done := context.WithTimeout(ctx, 30*time.Second)
				if err := do(one, i); err != nil {
					cancel(fmt.Errorf("%d: %w", i, err))
				}
				done()
			}
		})
	}
	for i := range n {
		if ctx.Err() != nil {
			break
		}
		next <- i
	}
	close(next)
	wg.Wait()
	return context.Cause(ctx)
}

type socket struct{ *websocket.Conn }

func (s socket) talk(ctx context.Context) error {
	if err := s.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		return err
	}
	_, got, err := s.Read(ctx)
	if err == nil && string(got) != "hello" {
		err = fmt.Errorf("got %q", got)
	}
	return err
}

func (s socket) close() { s.CloseNow() } //nolint:errcheck // it is over

func webSockets(addr, host, roots string) (func(context.Context) (conn, error), error) {
	pem, err := os.ReadFile(roots)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	client := &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: host, ClientSessionCache: tls.NewLRUClientSessionCache(4 * opening)},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		},
	}}
	return func(ctx context.Context) (conn, error) {
		c, _, err := websocket.Dial(ctx, "https://"+host+"/ws", &websocket.DialOptions{HTTPClient: client})
		return socket{c}, err
	}, nil
}

type packets struct{ net.Conn }

func (p packets) talk(ctx context.Context) error {
	buf := make([]byte, 64)
	for ctx.Err() == nil { // packets may be lost
		if _, err := p.Write([]byte("hello")); err != nil {
			return err
		}
		p.SetReadDeadline(time.Now().Add(2 * time.Second))
		if n, err := p.Read(buf); err == nil && string(buf[:n]) == "hello" {
			return nil
		}
	}
	return context.Cause(ctx)
}

func (p packets) close() { p.Close() }

func serve(addr string) error {
	pc, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				continue
			}
			pc.WriteTo(buf[:n], from) //nolint:errcheck // packets may be lost
		}
	}()
	return http.ListenAndServe(addr, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			typ, msg, err := c.Read(r.Context())
			if err != nil || c.Write(r.Context(), typ, msg) != nil {
				return
			}
		}
	}))
}
