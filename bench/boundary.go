package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
)

// The sessions with which the module is tried inside this process, for the best that it does without a boundary.
var insideSessions = []int{2, 4, 8}

// boundary measures what worker processes cost against the module inside the calling process.
func (b *bench) boundary(ctx context.Context) (err error) {
	if err := b.lab.Token.Use(); err != nil {
		return err
	}
	uri, err := pkcs11.ParseURI(b.lab.Token.URI())
	if err != nil {
		return err
	}
	var closers []func() error
	defer func() {
		for _, c := range closers {
			err = errors.Join(err, c())
		}
	}()
	var cases []*measured
	add := func(name string, home signer.Backend) error {
		closers = append(closers, home.Close)
		found, err := b.backendCases(ctx, name, home, []int{1, 64})
		cases = append(cases, found...)
		return err
	}
	for _, n := range insideSessions {
		t, err := pkcs11.Open(ctx, pkcs11.Config{URI: uri, Module: b.lab.Token.Module, Sessions: n})
		if err != nil {
			return err
		}
		if err := add(fmt.Sprintf("inside the process, %d sessions", n), t); err != nil {
			return err
		}
	}
	pool, err := worker.Open(ctx, worker.Config{Token: pkcs11.Config{URI: uri, Module: b.lab.Token.Module}, Command: []string{filepath.Join(b.bin, "keyhaven-keyserver"), "worker"}})
	if err != nil {
		return err
	}
	if err := add("worker processes", pool); err != nil {
		return err
	}
	if err := b.measure(ctx, "boundary", cases); err != nil {
		return err
	}
	for _, key := range keyTypes {
		inside := 0.0
		for _, n := range insideSessions {
			inside = max(inside, b.report.rate("boundary", key, fmt.Sprintf("inside the process, %d sessions", n), 64))
		}
		b.report.compare(fmt.Sprintf("%s, 64 at a time: worker processes / best inside the process", key), b.report.rate("boundary", key, "worker processes", 64), inside, 0.85)
	}
	return nil
}

// backendCases are the signatures of a backend, with no server before it.
func (b *bench) backendCases(ctx context.Context, name string, home signer.Backend, callers []int) (cases []*measured, err error) {
	keys, err := home.Keys(ctx)
	if err != nil {
		return nil, err
	}
	for _, key := range keyTypes {
		i := slices.IndexFunc(keys, func(k signer.Key) bool { return k.Info().Label == hosts[key] })
		if i < 0 {
			return nil, fmt.Errorf("the token has no key %s", hosts[key])
		}
		k, alg := keys[i], algs[key]
		for _, n := range callers {
			cases = append(cases, &measured{key: key, name: name, callers: n, pids: self, op: func(ctx context.Context, _ int) error {
				_, err := k.Sign(ctx, alg, digest)
				return err
			}})
		}
	}
	return cases, nil
}
