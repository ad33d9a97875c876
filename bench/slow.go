package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

// What a network HSM is like: how long an operation takes, and how many it works on at once.
const (
	hsmDelay = 3 * time.Millisecond
	hsmServe = 16
)

// slow compares over a token that answers as a network HSM does.
func (b *bench) slow(ctx context.Context) (err error) {
	t, end, err := b.networkHSM()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, end()) }()
	return b.compareServers(ctx, comparison{group: "network HSM", token: t, ours: hsmSettings, overDefault: 8, overBest: 1})
}

// hsmSettings fit our token to such an HSM: two workers with half as many sessions again as it works on at once, so that
// it always has the next operation at hand, and no long queue of them.
var hsmSettings = obj{"workers": 2, "sessions": hsmServe * 3 / 4}

// networkHSM puts the delaying module before the token.
func (b *bench) networkHSM() (t token, end func() error, err error) {
	b.runs++
	dir := filepath.Join(b.dir, fmt.Sprintf("network-hsm-%d", b.runs))
	module, err := faultmodule.Build(dir)
	if err != nil {
		return token{}, nil, err
	}
	control, err := faultmodule.New(dir, b.lab.Token.Module)
	if err != nil {
		return token{}, nil, err
	}
	if err := control.Set(faultmodule.Faults{Delay: hsmDelay, Serve: hsmServe}); err != nil {
		return token{}, nil, errors.Join(err, control.Close())
	}
	return token{module: module, env: control.Env()}, control.Close, nil
}
