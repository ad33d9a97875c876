//go:build netns

package integration

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A connectProxy is an HTTP proxy that knows CONNECT alone, for one user, and leads to one address.
type connectProxy struct {
	tunnels, refused atomic.Int64
}

// startProxy starts a proxy at addr in a namespace. It ends with the test.
func startProxy(t *testing.T, ns *testnet.Namespace, addr, to, user, password string) *connectProxy {
	t.Helper()
	p := &connectProxy{}
	var ln net.Listener
	must(t, ns.Do(func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	}))
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				defer context.AfterFunc(ctx, func() { c.Close() })()
				p.serve(ctx, c, ns, to, want)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		ln.Close()
		wg.Wait()
	})
	return p
}

func (p *connectProxy) serve(ctx context.Context, c net.Conn, ns *testnet.Namespace, to, want string) {
	in := bufio.NewReader(c)
	req, err := http.ReadRequest(in)
	if err != nil {
		return
	}
	if req.Method != http.MethodConnect || req.Host != to || req.Header.Get("Proxy-Authorization") != want {
		p.refused.Add(1)
		fmt.Fprint(c, "HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
		return
	}
	up, err := ns.Dial(ctx, to)
	if err != nil {
		fmt.Fprint(c, "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
		return
	}
	defer up.Close()
	p.tunnels.Add(1)
	fmt.Fprint(c, "HTTP/1.1 200 OK\r\n\r\n")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		io.Copy(up, in)
		up.(*net.TCPConn).CloseWrite()
	}()
	io.Copy(c, up)
	c.Close()
	<-ended
}
