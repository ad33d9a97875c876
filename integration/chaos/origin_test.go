//go:build netns

package chaos

import (
	"bufio"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"

	"github.com/coder/websocket"
)

// What services are sent and what they answer is marked, byte for byte: the upper half of a byte says of which network and
// of which direction it is, the lower half is content. Bytes of a visitor of network "a" are 0x1., the answers 0xa.; those
// of "b" are 0x2. and 0xb.
type mark struct{ ask, answer byte }

var marks = map[string]mark{"a": {0x10, 0xa0}, "b": {0x20, 0xb0}}

// convert makes the answer of what was asked. It fails on a byte that is of another network.
func (m mark) convert(p []byte) error {
	for i, b := range p {
		if b&0xf0 != m.ask {
			return fmt.Errorf("byte 0x%02x at %d is not of this network", b, i)
		}
		p[i] = m.answer | b&0x0f
	}
	return nil
}

// content is n bytes of a pseudo-random sequence, marked.
func content(mark byte, seed uint64, n int) []byte {
	p := make([]byte, n)
	x := seed*0x9e3779b97f4a7c15 | 1
	for i := range p {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		p[i] = mark | byte(x>>32)&0x0f
	}
	return p
}

// Ports of the services beside the origin's own.
const echoPort = "7007"

// runOrigin serves a network's services until it is killed: HTTP and WebSocket on the addresses of both hosts, echo over
// TCP and UDP. A byte of another network that comes is told as "FOREIGN".
func runOrigin(args []string) error {
	flags := flag.NewFlagSet("origin", flag.ContinueOnError)
	listen, name := flags.String("listen", "", ""), flags.String("name", "", "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	m := marks[*name]
	host, port, err := net.SplitHostPort(*listen)
	if err != nil {
		return err
	}
	done := make(chan error, 4)
	for _, h := range []string{host, secondOrigin} {
		srv := &http.Server{Addr: net.JoinHostPort(h, port), Handler: m.handler(*name)}
		go func() { done <- srv.ListenAndServe() }()
	}
	tcp, err := net.Listen("tcp", net.JoinHostPort(host, echoPort))
	if err != nil {
		return err
	}
	udp, err := net.ListenPacket("udp", net.JoinHostPort(host, echoPort))
	if err != nil {
		return err
	}
	go func() { done <- m.echoTCP(tcp) }()
	go func() { done <- m.echoUDP(udp) }()
	return <-done
}

func foreign(what string, err error) {
	fmt.Fprintf(os.Stderr, "FOREIGN %s: %v\n", what, err)
}

func (m mark) handler(name string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /bytes", func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.FormValue("n"))
		seed, _ := strconv.ParseUint(r.FormValue("seed"), 10, 64)
		if got := r.FormValue("net"); got != name {
			foreign("request", fmt.Errorf("%q", got))
		}
		w.Header().Set("X-Network", name)
		w.Write(content(m.answer, seed, min(n, 1<<20)))
	})
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		p, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		if err != nil {
			return // the visitor has gone
		}
		if err := m.convert(p); err != nil {
			foreign("body", err)
		}
		w.Header().Set("X-Network", name)
		w.Write(p)
	})
	mux.HandleFunc("GET /ws", func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer c.CloseNow()
		for {
			kind, p, err := c.Read(r.Context())
			if err != nil {
				return
			}
			if err := m.convert(p); err != nil {
				foreign("message", err)
			}
			if c.Write(r.Context(), kind, p) != nil {
				return
			}
		}
	})
	return mux
}

func (m mark) echoTCP(ln net.Listener) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			r, buf := bufio.NewReader(c), make([]byte, 16<<10)
			for {
				n, err := r.Read(buf)
				if n > 0 {
					if err := m.convert(buf[:n]); err != nil {
						foreign("stream", err)
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
				if err != nil {
					return
				}
			}
		}()
	}
}

func (m mark) echoUDP(pc net.PacketConn) error {
	buf := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return err
		}
		if err := m.convert(buf[:n]); err != nil {
			foreign("datagram", err)
		}
		pc.WriteTo(buf[:n], from) // a socket that the peer has closed refuses; that is no fault of ours
	}
}
