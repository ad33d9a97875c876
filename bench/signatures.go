package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

var (
	schemes = map[string]tls.SignatureScheme{"P-256": tls.ECDSAWithP256AndSHA256, "RSA-2048": tls.PSSWithSHA256}
	algs    = map[string]signer.Algorithm{"P-256": {Kind: signer.ECDSA, Hash: crypto.SHA256}, "RSA-2048": {Kind: signer.PSS, Hash: crypto.SHA256}}
)

// The sessions, with one caller each, that the module alone is tried with, and the requests in flight at the key server.
var (
	sessions = []int{1, 2, 4, 8, 16}
	inFlight = []int{1, 8, 64}
)

// digest is what is signed where it does not matter what.
var digest = func() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}()

// signatures measures signing: by the module alone, through the key server on loopback, and through the tunnel.
func (b *bench) signatures(ctx context.Context) (err error) {
	cases, closeTokens, err := b.rawCases(ctx)
	defer func() { err = errors.Join(err, closeTokens()) }()
	if err != nil {
		return err
	}
	for _, w := range []way{{"key server on loopback", nil}, {"key server through the tunnel", b.throughTunnel}} {
		client, err := b.client(w.dial)
		if err != nil {
			return err
		}
		defer client.Close()
		for _, key := range keyTypes {
			op, err := b.signOp(client, key)
			if err != nil {
				return err
			}
			for _, n := range inFlight {
				cases = append(cases, &measured{key: key, name: w.name, callers: n, op: op})
			}
		}
	}
	slices.SortStableFunc(cases, func(a, b *measured) int { return slices.Index(keyTypes, a.key) - slices.Index(keyTypes, b.key) })
	if err := b.measure(ctx, "signature", cases); err != nil {
		return err
	}
	least := map[string]float64{"RSA-2048": 0.85, "P-256": 0.6}
	for _, key := range keyTypes {
		direct := b.report.rate("signature", key, "key server on loopback", 64)
		b.report.compare(key+" signatures, 64 in flight: key server on loopback / module's best", direct, b.report.best("signature", key, "module alone"), least[key])
		b.report.compare(key+" signatures, 64 in flight: through the tunnel / on loopback", b.report.rate("signature", key, "key server through the tunnel", 64), direct, 0.8)
	}
	return nil
}

// rawCases opens the token once for each number of sessions; the module is then called by nobody else.
func (b *bench) rawCases(ctx context.Context) (cases []*measured, closeAll func() error, err error) {
	var open []*pkcs11.Token
	closeAll = func() error {
		var errs []error
		for _, t := range open {
			errs = append(errs, t.Close())
		}
		return errors.Join(errs...)
	}
	if err := b.lab.Token.Use(); err != nil {
		return nil, closeAll, err
	}
	uri, err := pkcs11.ParseURI(b.lab.Token.URI())
	if err != nil {
		return nil, closeAll, err
	}
	for _, n := range sessions {
		t, err := pkcs11.Open(ctx, pkcs11.Config{URI: uri, Module: b.lab.Token.Module, Sessions: n})
		if err != nil {
			return nil, closeAll, err
		}
		open = append(open, t)
		found, err := b.backendCases(ctx, "module alone", t, []int{n})
		if err != nil {
			return nil, closeAll, err
		}
		cases = append(cases, found...)
	}
	return cases, closeAll, nil
}

// signOp asks for the signature of a TLS 1.3 handshake, as an edge does, but does not verify it.
func (b *bench) signOp(c *keyless.Client, key string) (func(context.Context, int) error, error) {
	leaf, err := readLeaf(b.lab.Chain(hosts[key]))
	if err != nil {
		return nil, err
	}
	ski, err := keyless.SKIOf(leaf.PublicKey)
	if err != nil {
		return nil, err
	}
	msg := append(bytes.Repeat([]byte{' '}, 64), "TLS 1.3, server CertificateVerify\x00"...)
	msg = append(msg, make([]byte, 32)...)
	rand.Read(msg[len(msg)-32:])
	payload := keyless.AppendTLSSign(nil, schemes[key], msg)
	return func(ctx context.Context, _ int) error {
		op := keyless.Operation{Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: ski, SNI: hosts[key], Payload: payload}
		_, err := c.Do(ctx, &op)
		return err
	}, nil
}

func readLeaf(file string) (*x509.Certificate, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: no certificate", file)
	}
	return x509.ParseCertificate(block.Bytes)
}
