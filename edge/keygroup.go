package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"reflect"
	"strconv"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

// A keyGroup is the client of one key server group, shared by the zones that refer to it, over reloads too as long as
// its configuration stays.
type keyGroup struct {
	cfg    KeyServer
	client *keyless.Client
	source *mtls.Source // the edge's identity towards the group

	own    bool // source was opened for this group, and its files are reread at a reload
	cancel context.CancelFunc
	done   chan struct{} // closed when the renewal has ended
}

func (s *Server) openGroup(cfg KeyServer) (*keyGroup, error) {
	g := &keyGroup{cfg: cfg, source: s.deps.KeyIdentity}
	if cfg.Identity != "" {
		source, err := mtls.OpenDir(cfg.Identity, s.log)
		if err != nil {
			return nil, err
		}
		g.source, g.own = source, true
	}
	if g.source == nil {
		return nil, errors.New("the edge has no client certificate for key servers; set identity to the directory of one")
	}
	var expect []mtls.Identity
	for _, e := range cfg.Expect {
		id, err := mtls.ParseIdentity(e)
		if err != nil {
			return nil, err
		}
		expect = append(expect, id)
	}
	conns, timeout := cfg.Connections, cfg.Timeout
	if conns == 0 {
		conns = defaultKeyConns
	}
	if timeout == 0 {
		timeout = defaultSignTimeout
	}
	client, err := keyless.NewClient(keyless.ClientConfig{
		Servers: cfg.Servers,
		Dial: func(ctx context.Context, addr string) (net.Conn, error) {
			host, port, err := splitAddr(addr)
			if err != nil {
				return nil, err
			}
			return s.deps.Dialer.DialContext(ctx, cfg.VNet, host, port, netip.AddrPort{})
		},
		TLS: func(string) *tls.Config {
			return g.source.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptIdentities(expect...)})
		},
		ConnsPerServer: conns,
		Timeout:        timeout,
		Logger:         s.log.With("key_server", cfg.Name),
	})
	if err != nil {
		return nil, err
	}
	g.client = client
	return g, nil
}

// keepRenewed renews the group's own identity through the group. The identity of [Deps] is renewed by the first group
// that uses it; see Server.start.
func (g *keyGroup) keepRenewed(ctx context.Context) {
	ctx, g.cancel = context.WithCancel(ctx)
	g.done = make(chan struct{})
	go func() {
		defer close(g.done)
		_ = g.source.KeepRenewed(ctx, g.renew) // it logs its failures, and ends with the context
	}()
}

// renew asks the group for a new certificate of the edge.
func (g *keyGroup) renew(ctx context.Context, csrDER []byte) ([][]byte, error) {
	reply, err := g.client.Do(ctx, &keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncRenew, Payload: csrDER})
	if err != nil {
		return nil, err
	}
	certs, err := x509.ParseCertificates(reply)
	if err != nil {
		return nil, fmt.Errorf("the key server's answer to a renewal: %w", err)
	}
	chain := make([][]byte, len(certs))
	for i, c := range certs {
		chain[i] = bytes.Clone(c.Raw)
	}
	return chain, nil
}

// close ends the group. Signatures in flight fail.
func (g *keyGroup) close() error {
	if g.cancel != nil {
		g.cancel()
		<-g.done
	}
	return g.client.Close()
}

// openGroups returns the groups for cfgs, those of now where nothing changed, and apart from that those that are fresh.
func openGroups(now map[string]*keyGroup, cfgs []KeyServer, open func(KeyServer) (*keyGroup, error)) (next map[string]*keyGroup, fresh []*keyGroup, err error) {
	next = make(map[string]*keyGroup, len(cfgs))
	for i, cfg := range cfgs {
		if old := now[cfg.Name]; old != nil && reflect.DeepEqual(old.cfg, cfg) {
			next[cfg.Name] = old
			continue
		}
		g, err := open(cfg)
		if err != nil {
			for _, f := range fresh {
				err = errors.Join(err, f.close())
			}
			return nil, nil, fmt.Errorf("key_servers[%d]: %w", i, err)
		}
		next[cfg.Name] = g
		fresh = append(fresh, g)
	}
	return next, fresh, nil
}

func splitAddr(addr string) (host string, port uint16, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, err
	}
	n, err := strconv.ParseUint(p, 10, 16)
	return host, uint16(n), err
}
