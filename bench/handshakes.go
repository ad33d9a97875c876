package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/edge/ticket"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/keyless"
)

// visitors is how many handshake at a time.
const visitors = 8

// handshakes measures TLS 1.3 handshakes, full and resumed, with the edge's own TLS configuration and tickets: once with
// the zone's key behind the tunnel, once with a key of the same type in this process.
func (b *bench) handshakes(ctx context.Context) (err error) {
	tickets, err := ticket.Open(ctx, b.store, ticket.Options{Rotate: time.Hour, Generations: 2})
	if err != nil {
		return err
	}
	client, err := b.client(b.throughTunnel)
	if err != nil {
		return err
	}
	defer client.Close()
	var cases []*measured
	for _, key := range keyTypes {
		for _, where := range []string{"remote key", "local key"} {
			z, sign, err := b.zone(key, where, client)
			if err != nil {
				return err
			}
			cfg := z.TLSConfig(z.Certificates[0], sign, "http/1.1")
			tickets.Bind(cfg, ticket.BindingsOf(z)[0])
			addr, stop, err := serveTLS(cfg)
			if err != nil {
				return err
			}
			defer stop()
			roots := x509.NewCertPool()
			roots.AddCert(b.lab.Issuer.Certificate())
			full := &tls.Config{RootCAs: roots, ServerName: z.Hosts[0], MinVersion: tls.VersionTLS13}
			cases = append(cases, &measured{key: key, name: "full, " + where, callers: visitors, op: func(ctx context.Context, _ int) error {
				return visit(ctx, addr, full, false)
			}})
			caches := make([]*tls.Config, visitors)
			for i := range caches {
				caches[i] = full.Clone()
				caches[i].ClientSessionCache = tls.NewLRUClientSessionCache(4)
				if err := visit(ctx, addr, caches[i], false); err != nil {
					return err
				}
			}
			cases = append(cases, &measured{key: key, name: "resumed, " + where, callers: visitors, op: func(ctx context.Context, i int) error {
				return visit(ctx, addr, caches[i], true)
			}})
		}
	}
	if err := b.measure(ctx, "handshake", cases); err != nil {
		return err
	}
	for _, key := range keyTypes {
		b.report.compare(key+" handshakes, resumed: remote key / local key",
			b.report.rate("handshake", key, "resumed, remote key", visitors), b.report.rate("handshake", key, "resumed, local key", visitors), 0.9)
		b.report.compare(key+" handshakes, full: remote key / local key",
			b.report.rate("handshake", key, "full, remote key", visitors), b.report.rate("handshake", key, "full, local key", visitors), 0)
	}
	return nil
}

// zone compiles a zone as the edge does and returns how its key signs.
func (b *bench) zone(key, where string, client *keyless.Client) (*zone.Zone, zone.SignerFunc, error) {
	host, chain := hosts[key], b.lab.Chain(hosts[key])
	var local crypto.Signer
	if where == "local key" {
		host = "local-" + host
		chain = b.lab.Chain(host)
		var err error
		if local, err = b.localKey(key, host, chain); err != nil {
			return nil, nil, err
		}
	}
	var errs []error
	zones, _ := zone.Compile("zones", []zone.Config{{Name: host, Hosts: []string{host}, Certificate: chain, KeyServer: "hsm",
		Origins: []zone.Origin{{URL: "http://127.0.0.1:1"}}}}, func(string) bool { return true }, func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf(key+": "+format, args...))
	})
	if err := errors.Join(errs...); err != nil {
		return nil, nil, err
	}
	z := zones[0]
	if local != nil {
		return z, func(*tls.ClientHelloInfo, string) crypto.Signer { return local }, nil
	}
	remote, err := client.Key(z.Certificates[0].Leaf.PublicKey, keyless.KeyOptions{})
	if err != nil {
		return nil, nil, err
	}
	return z, func(hello *tls.ClientHelloInfo, sni string) crypto.Signer {
		return remote.For(hello.Context(), sni, netip.Addr{}, netip.Addr{})
	}, nil
}

func (b *bench) localKey(key, host, chain string) (crypto.Signer, error) {
	var local crypto.Signer
	var err error
	if key == "P-256" {
		local, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		local, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		return nil, err
	}
	der, err := b.lab.Issuer.Issue(local.Public(), []string{host})
	if err != nil {
		return nil, err
	}
	out := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: b.lab.Issuer.Certificate().Raw})...)
	return local, os.WriteFile(chain, out, 0o600)
}

// serveTLS accepts, handshakes and says one byte, after which the visitor has the ticket.
func serveTLS(cfg *tls.Config) (addr string, stop func(), err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(10 * time.Second))
				t := tls.Server(c, cfg)
				if t.Handshake() == nil {
					t.Write([]byte{1})
				}
			})
		}
	})
	return ln.Addr().String(), func() { ln.Close(); wg.Wait() }, nil
}

func visit(ctx context.Context, addr string, cfg *tls.Config, resumed bool) error {
	c, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		return err
	}
	if got := c.(*tls.Conn).ConnectionState().DidResume; got != resumed {
		return fmt.Errorf("resumed: %v, want %v", got, resumed)
	}
	return nil
}
