//go:build netns

package integration

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	proxyproto "github.com/pires/go-proxyproto"
)

func addrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// ports are who may use a public TCP port, and that either side may end first.
func (f *flowSites) ports(t *testing.T) {
	echoTCP(t, f.sites[0], "10.20.0.20:7000", "")
	const addr = "203.0.113.1:7000"
	t.Run("empty list", func(t *testing.T) {
		f.port(t, "nobody", "--listen", "203.0.113.1:7010", "--to", "10.20.0.20:7000")
		f.noWay(t, "203.0.113.2", "203.0.113.1:7010")
	})
	t.Run("list", func(t *testing.T) {
		f.port(t, "some", "--listen", addr, "--to", "10.20.0.20:7000", "--allow", "203.0.113.2/32")
		c := f.opens(t, addr, 1)[0]
		f.noWay(t, visitorOther, addr)
		// The list changes under connections that are open: who may no more is cut, or goes on to the end, but none comes in.
		f.admin(t, "port", "set", "some", "--allow", visitorOther+"/32")
		f.noWay(t, "203.0.113.2", addr)
		t.Logf("connection of a visitor who was taken off the list: %v", talk(c, "still"))
		f.admin(t, "port", "set", "some", "--allow", "203.0.113.2/32")
		f.opens(t, addr, 1)
	})
	t.Run("half-close", func(t *testing.T) {
		// The service answers when it has read to the end, so that nothing would come if the end were not passed on.
		var ln net.Listener
		must(t, f.sites[0].Do(func() (err error) {
			ln, err = net.Listen("tcp", "10.20.0.20:7020")
			return err
		}))
		serveTCP(t, ln, func(c net.Conn) {
			all, err := io.ReadAll(c)
			if err == nil {
				fmt.Fprintf(c, "%d bytes to the end", len(all))
			}
		})
		f.port(t, "half", "--listen", "203.0.113.1:7020", "--to", "10.20.0.20:7020", "--allow", "203.0.113.0/24")
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := f.visitor.Command(ctx, "nc", "-N", "203.0.113.1", "7020")
		cmd.Stdin = bytes.NewReader(make([]byte, 3_000_000))
		out, err := cmd.CombinedOutput()
		if err != nil || string(out) != "3000000 bytes to the end" {
			t.Errorf("got %q, %v", out, err)
		}
	})
	t.Run("nobody behind it", func(t *testing.T) {
		f.port(t, "empty", "--listen", "203.0.113.1:7030", "--to", "10.20.0.20:7030", "--allow", "203.0.113.0/24")
		f.noWay(t, "203.0.113.2", "203.0.113.1:7030")
	})
}

// noWay checks that a visitor at the address gets nothing but a reset, at once or soon.
func (f *flowSites) noWay(t *testing.T, from, addr string) {
	t.Helper()
	eventually(t, "visitor "+from+" is refused", func(ctx context.Context) error {
		var c net.Conn
		err := f.visitor.Do(func() (err error) {
			d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
			c, err = d.DialContext(ctx, "tcp", addr)
			return err
		})
		if err == nil {
			err = talk(c, "let me in")
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			return fmt.Errorf("got %v, want a reset", err)
		}
		return nil
	})
}

// proxyProtocol has both versions read by another implementation: the service sees the visitor's address and port.
func (f *flowSites) proxyProtocol(t *testing.T) {
	for i, version := range []string{"v1", "v2"} {
		t.Run("TCP "+version, func(t *testing.T) {
			to, addr := fmt.Sprint("10.20.0.20:750", i), fmt.Sprint("203.0.113.1:750", i)
			var ln net.Listener
			must(t, f.sites[0].Do(func() (err error) {
				ln, err = net.Listen("tcp", to)
				return err
			}))
			serveTCP(t, ln, func(c net.Conn) {
				r := bufio.NewReader(c)
				h, err := proxyproto.Read(r)
				if err != nil {
					fmt.Fprintln(c, "no header:", err)
					return
				}
				line, _ := r.ReadString('\n')
				fmt.Fprintf(c, "v%d %s %s %s", h.Version, h.SourceAddr, h.DestinationAddr, line)
			})
			f.port(t, "proxy-"+version, "--listen", addr, "--to", to, "--allow", "203.0.113.0/24", "--proxy-protocol", version)
			var c net.Conn
			eventually(t, "the port", func(ctx context.Context) (err error) {
				c, err = f.visitor.Dial(ctx, addr)
				return err
			})
			defer c.Close()
			c.SetDeadline(time.Now().Add(20 * time.Second))
			// The visitor says one thing of itself, and the edge another.
			_, err := io.WriteString(c, "PROXY TCP4 192.0.2.66 192.0.2.66 1 2\r\n")
			must(t, err)
			got, err := io.ReadAll(c)
			want := fmt.Sprintf("%s %s %s PROXY TCP4 192.0.2.66", version, c.LocalAddr(), addr)
			if err != nil || !strings.HasPrefix(string(got), want) {
				t.Errorf("got %q, %v; want %q", got, err, want)
			}
		})
	}
	t.Run("UDP v2", func(t *testing.T) {
		pc := listenUDP(t, f.sites[0], "10.20.0.20:7502")
		done := make(chan struct{})
		go func() {
			defer close(done)
			buf := make([]byte, 64<<10)
			for {
				n, from, err := pc.ReadFrom(buf)
				if err != nil {
					return
				}
				r := bufio.NewReader(bytes.NewReader(buf[:n]))
				h, err := proxyproto.Read(r)
				if err != nil {
					fmt.Println(err)
					continue
				}
				rest, _ := io.ReadAll(r)
				pc.WriteTo(fmt.Appendf(nil, "%s %s %s", h.SourceAddr, h.DestinationAddr, rest), from)
			}
		}()
		t.Cleanup(func() { pc.Close(); <-done })
		const addr = "203.0.113.1:7502"
		f.port(t, "proxy-udp", "--protocol", "udp", "--listen", addr, "--to", "10.20.0.20:7502", "--allow", "203.0.113.0/24", "--proxy-protocol", "v2")
		c, err := f.dialUDP(addr)
		must(t, err)
		defer c.Close()
		want := fmt.Sprintf("%s %s hello", c.LocalAddr(), addr)
		eventually(t, "each packet has its header", func(context.Context) error {
			for range 2 {
				must2(t)(c.Write([]byte("hello")))
				c.SetReadDeadline(time.Now().Add(time.Second))
				buf := make([]byte, 1000)
				n, err := c.Read(buf)
				if err != nil || string(buf[:n]) != want {
					return fmt.Errorf("got %q, %v; want %q", buf[:n], err, want)
				}
			}
			return nil
		})
	})
}

// portInUse maps a public port that another program has: the fault is told, all else goes on, and the port comes as soon
// as it is free.
func (f *flowSites) portInUse(t *testing.T) {
	echoTCP(t, f.sites[0], "10.20.0.20:7040", "")
	var other net.Listener
	must(t, f.edge.Do(func() (err error) {
		other, err = net.Listen("tcp", "203.0.113.1:7040")
		return err
	}))
	defer other.Close()
	f.port(t, "free", "--listen", "203.0.113.1:7041", "--to", "10.20.0.20:7040", "--allow", "203.0.113.0/24")
	f.opens(t, "203.0.113.1:7041", 1)
	f.port(t, "taken", "--listen", "203.0.113.1:7040", "--to", "10.20.0.20:7040", "--allow", "203.0.113.0/24")
	eventually(t, "the fault is told", func(context.Context) error {
		out := f.admin(t, "status")
		if !strings.Contains(out, "taken") || !strings.Contains(out, "in use") {
			return fmt.Errorf("got\n%s", out)
		}
		return nil
	})
	if m := f.metric(t, "keyhaven_edge_faults"); !strings.Contains(m, " 1") {
		t.Errorf("metrics: got %q", m)
	}
	f.opens(t, "203.0.113.1:7041", 1)
	check(t, f.fetches(t.Context()))
	must(t, other.Close())
	eventually(t, "the port is served", func(ctx context.Context) error {
		c, err := f.open(ctx, "203.0.113.1:7040")
		if err == nil {
			c.Close()
		}
		return err
	})
	eventually(t, "the fault is gone", func(context.Context) error {
		if out := f.admin(t, "status"); strings.Contains(out, "in use") {
			return fmt.Errorf("got\n%s", out)
		}
		return nil
	})
}
