package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

func aPool(name string, endpoints ...spec.Endpoint) spec.PoolConfig {
	if len(endpoints) == 0 {
		endpoints = []spec.Endpoint{{Host: "10.0.0.1", Port: 80}}
	}
	return spec.PoolConfig{Name: name, Endpoints: endpoints}
}

func aPort(name, listen string) spec.PortConfig {
	return spec.PortConfig{Name: name, Protocol: "tcp", Listen: listen, Host: "10.0.0.1", Port: 22}
}

func chainFor(t *testing.T, hosts ...string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: hosts, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func aZone(t *testing.T, name, host string) zone.Config {
	return zone.Config{Name: name, Hosts: []string{host}, CertificatePEM: chainFor(t, host), KeyServer: "hsm", Origins: []zone.Origin{{URL: "http://10.0.0.1"}}}
}

func TestPoolsAndWhatTheyReferTo(t *testing.T) {
	c, ctx := only(t), t.Context()
	second := func(_ any, err error) error { return err }
	_, err := c.AddVNet(ctx, "red", "", false)
	must(t, err)
	_, err = c.AddTunnel(ctx, "plant", "")
	must(t, err)
	web, err := c.CreatePool(ctx, aPool("web", spec.Endpoint{VNet: "red", Host: "10.0.0.1", Port: 80}))
	must(t, err)
	_, err = c.CreatePool(ctx, spec.PoolConfig{Name: "all", Members: []string{"web"}})
	must(t, err)

	wantErr(t, second(c.CreatePool(ctx, aPool("web"))), ErrExists, "pool set")
	wantErr(t, second(c.CreatePool(ctx, aPool("x", spec.Endpoint{VNet: "blue", Host: "h", Port: 1}))), ErrInvalid, `endpoints[0].vnet: there is no virtual network "blue"`, "vnet list")
	wantErr(t, second(c.CreatePool(ctx, aPool("x", spec.Endpoint{Connector: "pi", Host: "h", Port: 1}))), ErrInvalid, `endpoints[0].connector: there is no connector "pi"`)
	wantErr(t, second(c.CreatePool(ctx, aPool("x", spec.Endpoint{Host: "h"}))), ErrInvalid, "endpoints[0].port")
	wantErr(t, second(c.CreatePool(ctx, spec.PoolConfig{Name: "x", Members: []string{"nope"}})), ErrInvalid, `there is no pool "nope"`)
	wantErr(t, second(c.SetPool(ctx, spec.PoolConfig{Name: "web", Members: []string{"all"}}, 0)), ErrInvalid, "leads back to itself")
	wantErr(t, second(c.SetPool(ctx, aPool("nope"), 0)), ErrNotFound)
	wantErr(t, c.DeletePool(ctx, "web", 0), ErrInUse, `pool "all"`)
	wantErr(t, c.DeleteVNet(ctx, "red", true), ErrInUse, `pool "web"`, "does not override")

	changed, err := c.SetPool(ctx, aPool("web"), web.Revision)
	must(t, err)
	same, err := c.SetPool(ctx, aPool("web"), changed.Revision)
	must(t, err)
	if changed.Revision <= web.Revision || same.Revision != changed.Revision || !changed.Created.Equal(web.Created) {
		t.Errorf("revisions %d, %d, %d, want a change to raise it and nothing else to", web.Revision, changed.Revision, same.Revision)
	}
	wantErr(t, second(c.SetPool(ctx, aPool("web"), web.Revision)), ErrStale, "read it again")
	wantErr(t, c.DeletePool(ctx, "web", web.Revision), ErrStale)
	must(t, c.DeleteVNet(ctx, "red", false))
	must(t, c.DeletePool(ctx, "all", 0))
	must(t, c.DeletePool(ctx, "web", changed.Revision))
	wantErr(t, c.DeletePool(ctx, "web", 0), ErrNotFound)
}

func TestPortsAndZones(t *testing.T) {
	c, ctx := only(t), t.Context()
	c.SetLocal(Local{KeyServers: []string{"hsm"}})
	second := func(_ any, err error) error { return err }
	_, err := c.AddTunnel(ctx, "plant", "")
	must(t, err)
	_, err = c.CreatePort(ctx, aPort("ssh", ":2222"))
	must(t, err)
	for _, bad := range []struct {
		change func(*spec.PortConfig)
		says   string
	}{
		{func(p *spec.PortConfig) { p.Listen = "127.0.0.1:2222" }, `port "ssh" listens on :2222 already`},
		{func(p *spec.PortConfig) { p.Host, p.Port, p.Pool = "", 0, "nope" }, `there is no pool "nope"`},
		{func(p *spec.PortConfig) { p.Host, p.Port, p.Tunnel, p.Service = "", 0, "nope", "s" }, `there is no tunnel "nope"`},
		{func(p *spec.PortConfig) { p.VNet = "nope" }, `vnet: there is no virtual network "nope"`},
		{func(p *spec.PortConfig) { p.Allow = []string{"all"} }, "allow[0]"},
	} {
		p := aPort("x", ":2223")
		bad.change(&p)
		wantErr(t, second(c.CreatePort(ctx, p)), ErrInvalid, bad.says)
	}
	udp := aPort("dns", ":2222") // the port of another protocol is free
	udp.Protocol = "udp"
	_, err = c.CreatePort(ctx, udp)
	must(t, err)
	cam := spec.PortConfig{Name: "cam", Protocol: "tcp", Listen: ":2224", Tunnel: "plant", Service: "cam.example"}
	_, err = c.CreatePort(ctx, cam)
	must(t, err)
	wantErr(t, c.DeleteTunnel(ctx, "plant", true), ErrInUse, `port "cam"`)

	_, err = c.CreateZone(ctx, aZone(t, "www", "www.example"))
	must(t, err)
	for _, bad := range []struct {
		change func(*zone.Config)
		says   string
	}{
		{func(z *zone.Config) { z.Hosts = []string{"WWW.example"}; z.CertificatePEM = chainFor(t, "www.example") }, `belongs to zone "www" already`},
		{func(z *zone.Config) { z.KeyServer = "other" }, "key_server"},
		{func(z *zone.Config) { z.Certificate, z.CertificatePEM = "/etc/passwd", "" }, "names a file"},
		{func(z *zone.Config) { z.Origins[0].TLS.CA = "/etc/passwd" }, "names a file"},
		{func(z *zone.Config) { z.CertificatePEM = "" }, "certificate"},
		{func(z *zone.Config) { z.CertificatePEM = chainFor(t, "y.example") }, `: certificate_pem: does not cover host x.example`},
		{func(z *zone.Config) {
			z.CertificatePEM += "-----BEGIN PRIVATE KEY-----\nYQ==\n-----END PRIVATE KEY-----\n"
		}, "holds a private key"},
		{func(z *zone.Config) { z.Origins = []zone.Origin{{Pool: "nope"}} }, `origins[0].pool: there is no pool "nope"`},
		{func(z *zone.Config) { z.Origins = []zone.Origin{{Tunnel: "nope"}} }, `origins[0].tunnel: there is no tunnel "nope"`},
		{func(z *zone.Config) { z.Name = "Bad Name" }, "is not a name"},
	} {
		z := aZone(t, "x", "x.example")
		bad.change(&z)
		wantErr(t, second(c.CreateZone(ctx, z)), ErrInvalid, bad.says)
	}
	if got := len(c.Zones()) + len(c.Ports()); got != 4 {
		t.Errorf("%d zones and ports, want 4", got)
	}
}

// Many small changes at a time, by two edges, all come to pass: none overwrites another.
func TestEndpointsChangeAtOnce(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	one, two := b.control(s), b.control(s)
	t.Cleanup(func() { must(t, errors.Join(one.Close(), two.Close(), s.Close())) })
	var endpoints []spec.Endpoint
	for i := range 8 {
		endpoints = append(endpoints, spec.Endpoint{Name: fmt.Sprint("e", i), Host: "10.0.0.1", Port: uint16(80 + i)})
	}
	_, err := one.CreatePool(t.Context(), aPool("web", endpoints...))
	must(t, err)
	var wg sync.WaitGroup
	for i := range endpoints {
		wg.Go(func() {
			c := []*Control{one, two}[i%2]
			if _, err := c.SetEndpoint(t.Context(), "web", fmt.Sprint("e", i), EndpointChange{Weight: new(0.5)}); err != nil {
				t.Errorf("endpoint %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	for _, c := range []*Control{one, two} {
		eventually(t, "both edges have it all", func() bool {
			p, err := c.Pool("web")
			must(t, err)
			for i := range p.Config.Endpoints {
				if p.Config.Endpoints[i].Share() != 0.5 {
					return false
				}
			}
			return true
		})
	}
	_, err = one.SetEndpoint(t.Context(), "web", "e0", EndpointChange{Weight: new(2.0)})
	wantErr(t, err, ErrInvalid, "weight")
	_, err = one.SetEndpoint(t.Context(), "web", "nope", EndpointChange{Drain: new(true)})
	wantErr(t, err, ErrNotFound, "pool info web")
}

// What is published reaches every edge, whole, one call at a time, and nothing is missed.
func TestPublished(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	one, two := b.control(s), b.control(s)
	t.Cleanup(func() { must(t, errors.Join(one.Close(), two.Close(), s.Close())) })
	_, err := one.CreatePool(t.Context(), aPool("a"))
	must(t, err)
	eventually(t, "the other edge knows the pool", func() bool { return len(two.Pools()) == 1 })
	var last atomic.Pointer[Published]
	var calls, inside atomic.Int32
	two.OnPublished(func(p Published) {
		if inside.Add(1) != 1 {
			t.Error("two calls at a time")
		}
		calls.Add(1)
		time.Sleep(time.Millisecond) // changes come while it runs
		last.Store(&p)
		inside.Add(-1)
	})
	if calls.Load() != 1 || len(last.Load().Pools) != 1 {
		t.Fatalf("%d calls before OnPublished returned, want one with what is there", calls.Load())
	}
	for i := range 20 {
		_, err := one.CreatePort(t.Context(), aPort(fmt.Sprintf("p%02d", i), fmt.Sprintf(":%d", 3000+i)))
		must(t, err)
	}
	must(t, one.DeletePool(t.Context(), "a", 0))
	eventually(t, "the last change is published", func() bool {
		p := last.Load()
		return len(p.Ports) == 20 && len(p.Pools) == 0
	})
	for i, p := range last.Load().Ports {
		if want := fmt.Sprintf("p%02d", i); p.Name != want {
			t.Errorf("port %d is %s, want %s", i, p.Name, want)
		}
	}
	before := calls.Load()
	_, err = one.AddTunnel(t.Context(), "plant", "")
	must(t, err)
	eventually(t, "the other edge knows the tunnel", func() bool { return len(two.Tunnels()) == 1 })
	if calls.Load() != before {
		t.Error("a tunnel is published")
	}
}

// A record that cannot be read is left out, and the rest is served.
func TestBrokenRecordIsLeftOut(t *testing.T) {
	c, ctx := only(t), t.Context()
	_, err := c.CreatePort(ctx, aPort("good", ":1"))
	must(t, err)
	must(t, c.change(ctx, func(*model) ([]state.Op, error) {
		return []state.Op{state.Put(prefixPort+"bad", []byte("{"))}, nil
	}))
	if p := c.published(); len(p.Ports) != 1 || p.Ports[0].Name != "good" {
		t.Errorf("published %+v", p.Ports)
	}
}

func TestTokensAndCleanup(t *testing.T) {
	c, ctx := only(t), t.Context()
	for _, name := range []string{"plant", "office"} {
		_, err := c.AddTunnel(ctx, name, "")
		must(t, err)
	}
	open, err := c.CreateToken(ctx, "plant", 0)
	must(t, err)
	gone, err := c.CreateToken(ctx, "plant", 0)
	must(t, err)
	ago := func(d time.Duration) time.Time { return c.now().Add(-d) }
	plant, err := c.Tunnel("plant")
	must(t, err)
	must(t, c.change(ctx, func(m *model) ([]state.Op, error) {
		old := m.tokens[gone.ID]
		old.Expires = ago(time.Minute)
		used := m.tokens[open.ID]
		used.ID, used.UsedAt, used.UsedBy = "used", ago(time.Hour), "pi"
		ops := []state.Op{put(prefixToken+gone.ID, old), put(prefixToken+"used", used)}
		for name, k := range map[string]Connector{
			"young": {Revoked: ago(time.Second), Created: ago(1000 * time.Hour)}, "revoked": {Revoked: ago(time.Hour), Created: ago(1000 * time.Hour)},
			"never": {Created: ago(1000 * time.Hour)}, "new": {Created: ago(time.Hour)}, "pinned": {Created: ago(1000 * time.Hour)},
			"unseen": {Created: ago(2000 * time.Hour)}, "elsewhere": {Created: ago(1000 * time.Hour), Tunnel: "tn_other"},
		} {
			k.ID, k.Name = "cn_"+name, name
			if k.Tunnel == "" {
				k.Tunnel = plant.ID
			}
			ops = append(ops, put(prefixConn+name, k))
		}
		return append(ops, put(prefixSeen+"unseen", seen{Last: ago(900 * time.Hour)})), nil
	}))
	_, err = c.CreatePool(ctx, aPool("web", spec.Endpoint{Host: "h", Port: 1, Connector: "cn_pinned"}))
	must(t, err)

	list, err := c.Tokens("plant")
	must(t, err)
	var statuses []string
	for _, tok := range list {
		statuses = append(statuses, tok.Status)
	}
	if got := strings.Join(statuses, " "); !strings.Contains(got, TokenExpired) || !strings.Contains(got, TokenUsed) || !strings.Contains(got, TokenOpen) || len(list) != 3 {
		t.Errorf("tokens: %s", got)
	}
	_, err = c.RevokeToken(ctx, "used")
	wantErr(t, err, ErrTokenUsed, "connector revoke pi")

	want := "connector never never_seen, connector revoked revoked, connector unseen unseen, token " + gone.ID + " expired, token used used"
	if gone.ID > "used" {
		want = "connector never never_seen, connector revoked revoked, connector unseen unseen, token used used, token " + gone.ID + " expired"
	}
	say := func(list []Cleaned) string {
		var parts []string
		for _, f := range list {
			parts = append(parts, f.Kind+" "+f.Name+" "+f.Reason)
		}
		return strings.Join(parts, ", ")
	}
	for _, dry := range []bool{true, true, false} {
		found, err := c.Cleanup(ctx, CleanupSpec{Tunnel: "plant", DryRun: dry})
		must(t, err)
		if got := say(found); got != want {
			t.Errorf("dry run %v: %s\nwant %s", dry, got, want)
		}
	}
	found, err := c.Cleanup(ctx, CleanupSpec{})
	must(t, err)
	if got := say(found); got != "connector elsewhere never_seen" {
		t.Errorf("the rest: %s", got)
	}
	_, err = c.Cleanup(ctx, CleanupSpec{Unseen: time.Minute})
	wantErr(t, err, ErrInvalid, "too short")
	_, err = c.RevokeToken(ctx, open.ID)
	must(t, err)
	left, err := c.Connectors("")
	must(t, err)
	if len(left) != 3 {
		t.Errorf("left: %v, want young, new and pinned", left)
	}
}
