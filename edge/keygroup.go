package edge

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"reflect"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/keyhaven/keyhaven/edge/balance"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A keyGroup is the client of one key server group, shared by the zones that refer to it, over reloads too as long as
// its configuration stays.
type keyGroup struct {
	cfg    KeyServer
	client *keyless.Client
	source *mtls.Source // the edge's identity towards the group

	following sync.Mutex                               // held while the servers are made those of the pool
	places    atomic.Pointer[map[string]spec.Endpoint] // by the address that the client knows; of a group with a pool

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
		Servers:    cfg.Servers,
		MayBeEmpty: cfg.Pool != "",
		Dial:       func(ctx context.Context, addr string) (net.Conn, error) { return g.dial(ctx, s.deps.Dialer, addr) },
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

// poolName is the pool whose endpoints are the group's servers, "" if there is none.
func (k *KeyServer) poolName() string {
	if k.Pool == "" && k.Monitor != nil {
		return "key_server/" + k.Name
	}
	return k.Pool
}

// ownPool is the pool that a group with a monitor makes of its servers.
func (k *KeyServer) ownPool() spec.PoolConfig {
	p := spec.PoolConfig{Name: k.poolName(), Monitor: k.Monitor}
	for _, addr := range k.Servers {
		if host, port, err := splitAddr(addr); err == nil {
			p.Endpoints = append(p.Endpoints, spec.Endpoint{VNet: k.VNet, Host: host, Port: port})
		}
	}
	return p
}

// follow makes the servers be the endpoints of the group's pool, those that are down last.
func (g *keyGroup) follow(b *balance.Balancer) {
	name := g.cfg.poolName()
	if name == "" {
		return
	}
	g.following.Lock()
	defer g.following.Unlock()
	var all, last []string
	places := map[string]spec.Endpoint{}
	for _, p := range b.Places(name) {
		addr := p.Addr()
		if g.cfg.Pool != "" { // an address may stand there once for each virtual network and connector
			addr = p.VNet + "|" + p.Connector + "|" + addr
		}
		all, places[addr] = append(all, addr), p.Endpoint
		if p.Last {
			last = append(last, addr)
		}
	}
	g.places.Store(&places)
	g.client.SetServers(all, last)
}

// dial reaches a server by the address that the client knows.
func (g *keyGroup) dial(ctx context.Context, d Dialer, addr string) (net.Conn, error) {
	q := control.Query{VNet: g.cfg.VNet, Class: tunnel.ClassInteractive}
	if places := g.places.Load(); places != nil {
		if e, ok := (*places)[addr]; ok {
			q.VNet, q.Host, q.Port, q.Connector = e.VNet, e.Host, e.Port, e.Connector
			return d.Dial(ctx, q)
		}
	}
	var err error
	if q.Host, q.Port, err = splitAddr(addr); err != nil {
		return nil, err
	}
	return d.Dial(ctx, q)
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
