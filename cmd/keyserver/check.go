package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/pkcs11"
)

// check validates a configuration and, online, opens the tokens and looks for the keys that it names.
func check(ctx context.Context, o loadOptions, online bool, logger *slog.Logger, out io.Writer) error {
	p, err := load(o, logger)
	if err != nil {
		return cli.ConfigError(err)
	}
	if err := p.source.Check(); err != nil {
		return cli.ConfigError(p.file.Errorf("tls.cert", "%v", err))
	}
	if online {
		if err := checkOnline(ctx, p, out); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%s: good: %d tokens, %d Transit mounts, %d file keys, %d client rules, audit %s, identity %s until %s\n", o.path,
		len(p.cfg.Tokens), len(p.cfg.Transit), len(p.cfg.FileKeys), len(p.cfg.Clients), p.cfg.Audit.mode(), p.source.Identity(), p.source.NotAfter().UTC().Format("2006-01-02 15:04 MST"))
	return nil
}

func checkOnline(ctx context.Context, p *plan, out io.Writer) (err error) {
	keys := newKeyring(slog.New(slog.DiscardHandler)) // what it would log is returned
	defer func() { err = errors.Join(err, keys.close()) }()
	errs := conf.Errors(keys.replace(ctx, p.places))
	ours := slices.ContainsFunc(errs, configured)
	switch err := errs.Err(); { // what is missing then follows from it
	case ours:
		return cli.ConfigError(err)
	case err != nil:
		return err
	}
	var silent []error
	for _, e := range keys.registry.Entries() {
		for i, h := range e.Homes {
			if err := e.Probe(ctx, i); err != nil {
				silent = append(silent, fmt.Errorf("key %v in %s: %w", e, homeName(h), err))
			}
		}
		fmt.Fprintf(out, "key %v in %d homes\n", e, len(e.Homes))
	}
	found := func(key, name string) {
		switch n := len(keys.registry.ByName(name)); {
		case n == 0:
			errs = append(errs, p.file.Errorf(key, "no token or file has a key %q; correct the name, or generate the key", name))
		case n > 1:
			errs = append(errs, p.file.Errorf(key, "%d keys have the label %q; name one by its SKI", n, name))
		}
	}
	for i, t := range p.cfg.Tokens {
		for j, name := range t.Decrypt {
			found(fmt.Sprintf("tokens[%d].decrypt[%d]", i, j), name)
		}
	}
	if name := p.cfg.Audit.Key; name != "" {
		found("audit.key", name)
	}
	for i, c := range p.cfg.Clients {
		for j, name := range c.Keys {
			if name != "*" {
				found(fmt.Sprintf("clients[%d].keys[%d]", i, j), name)
			}
		}
	}
	if len(errs) > 0 {
		return cli.ConfigError(errs)
	}
	return errors.Join(silent...)
}

// configured reports whether a token does not open because of what the configuration, or the PIN's file, says of it.
// The other reasons are the token's: it is locked, away or broken.
func configured(err error) bool {
	return isAny(err, pkcs11.ErrPINIncorrect, pkcs11.ErrTokenNotFound, pkcs11.ErrAmbiguous, pkcs11.ErrModuleNotAllowed, pkcs11.ErrExtractable)
}
