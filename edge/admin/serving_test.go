package admin

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

var testPool = spec.PoolConfig{Name: "web", Steering: spec.SteerHash, Minimum: 1,
	Endpoints: []spec.Endpoint{{Name: "a", VNet: "red", Host: "10.0.0.1", Port: 80}, {Host: "fd00::1", Port: 80, Weight: new(0.5)}},
	Monitor:   &spec.Monitor{Type: spec.MonitorHTTP, Path: "/healthz", Headers: map[string]string{"X-Probe": "1"}, Interval: spec.Duration(10 * time.Second)},
	Affinity:  &spec.Affinity{Type: spec.AffinityCookie, TTL: spec.Duration(time.Hour)}}

var testPort = spec.PortConfig{Name: "ssh", Protocol: "tcp", Listen: ":2222", VNet: "red", Host: "10.0.0.9", Port: 22, Allow: []string{"192.0.2.0/24"}}

func testTokens(t *testing.T, c *Client) {
	ctx := t.Context()
	list, err := c.Tokens(ctx, "plant")
	must(t, err)
	if len(list) != 1 || list[0].Status != control.TokenOpen || list[0].TunnelName != "plant" {
		t.Fatalf("tokens: %+v", list)
	}
	if _, err := c.Tokens(ctx, "nope"); !errors.Is(err, control.ErrNotFound) {
		t.Errorf("tokens of an unknown tunnel: %v", err)
	}
	_, err = c.RevokeToken(ctx, list[0].ID)
	must(t, err)
	if list, err := c.Tokens(ctx, ""); err != nil || len(list) != 0 {
		t.Errorf("after the revocation: %v, %v", list, err)
	}
	gone, err := c.Cleanup(ctx, control.CleanupSpec{Tunnel: "plant", Unseen: time.Hour, DryRun: true})
	must(t, err)
	if len(gone) != 0 {
		t.Errorf("cleanup of nothing: %v", gone)
	}
}

func testTunnelConfig(t *testing.T, c *Client) {
	ctx := t.Context()
	v, err := c.SetTunnelConfig(ctx, "plant", json.RawMessage(`{"ingress":[{"service":"http_status:404"}]}`), new(uint64(0)))
	must(t, err)
	got, err := c.TunnelConfig(ctx, "plant")
	must(t, err)
	if v.Version != 1 || got.Version != 1 {
		t.Errorf("versions %d, %d, want 1", v.Version, got.Version)
	}
	if _, err := c.SetTunnelConfig(ctx, "plant", nil, new(uint64(0))); err == nil {
		t.Error("a change from an old version was taken")
	}
}

// certificate is a chain in PEM for www.example.com.
func certificate(t *testing.T) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"www.example.com", "*.example.com"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(90 * 24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func testServing(t *testing.T, c *Client) {
	ctx := t.Context()
	p, err := c.CreatePool(ctx, testPool)
	must(t, err)
	next := p.Config
	next.Minimum = 2
	q, err := c.SetPool(ctx, next, p.Revision)
	must(t, err)
	if p.Revision == 0 || q.Revision <= p.Revision || q.Config.Minimum != 2 || !q.Created.Equal(p.Created) {
		t.Errorf("SetPool: %+v after %+v", q, p)
	}
	if _, err := c.SetPool(ctx, next, p.Revision); !errors.Is(err, control.ErrStale) {
		t.Errorf("a change of what is no longer there: %v", err)
	}
	q, err = c.SetEndpoint(ctx, "web", "[fd00::1]:80", control.EndpointChange{Weight: new(0.25), Drain: new(true)})
	must(t, err)
	if e := q.Config.Endpoints[1]; e.Share() != 0.25 || !e.Drain || e.Disabled {
		t.Errorf("SetEndpoint: %+v", e)
	}
	_, err = c.PoolHealth(ctx, "")
	must(t, err)
	_, err = c.CreatePort(ctx, testPort)
	must(t, err)
	port := testPort
	port.MaxConnections = 5
	_, err = c.SetPort(ctx, port, 0)
	must(t, err)
	testZones(t, c)
	one, err := c.Port(ctx, "ssh")
	must(t, err)
	pool, err := c.Pool(ctx, "web")
	must(t, err)
	pools, err := c.Pools(ctx)
	must(t, err)
	ports, err := c.Ports(ctx)
	must(t, err)
	if one.Config.MaxConnections != 5 || pool.Revision != q.Revision || len(pools) != 1 || len(ports) != 1 {
		t.Errorf("lists: %+v, %+v, %v, %v", one, pool, pools, ports)
	}
	edges, err := c.Edges(ctx)
	must(t, err)
	flows, err := c.Flows(ctx, "red", "plant", 5)
	must(t, err)
	if len(edges) != 1 || !edges[0].Here || flows.Total != 0 {
		t.Errorf("edges %+v, flows %+v", edges, flows)
	}
	if _, err := c.Flows(ctx, "nope", "", 0); !errors.Is(err, control.ErrNotFound) {
		t.Errorf("flows of an unknown network: %v", err)
	}
	must(t, c.DeletePort(ctx, "ssh"))
	must(t, c.DeletePool(ctx, "web"))
}

func testZones(t *testing.T, c *Client) {
	ctx := t.Context()
	z := zone.Config{Name: "www", Hosts: []string{"www.example.com"}, CertificatePEM: certificate(t), KeyServer: "hsm",
		Origins: []zone.Origin{{Pool: "web"}, {Path: "/red", URL: "http://10.0.0.1", VNet: "red"}}}
	created, err := c.CreateZone(ctx, z)
	must(t, err)
	z.KeyEpoch = 1
	_, err = c.SetZone(ctx, z, created.Revision)
	must(t, err)
	if err := c.DeletePool(ctx, "web"); !errors.Is(err, control.ErrInUse) {
		t.Errorf("deletion of a pool in use: %v", err)
	}
	if err := c.DeleteVNet(ctx, "red", true); !errors.Is(err, control.ErrInUse) {
		t.Errorf("deletion of a network in use: %v", err)
	}
	got, err := c.Zone(ctx, "www")
	must(t, err)
	list, err := c.Zones(ctx)
	must(t, err)
	status, err := c.Status(ctx)
	must(t, err)
	if got.Config.KeyEpoch != 1 || len(list) != 1 || status.Zones != 1 || status.Ports != 1 {
		t.Errorf("zones: %+v, %v, %+v", got, list, status)
	}
	must(t, c.DeleteZone(ctx, "www"))
}
