package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/internal/conf"
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
		if err := checkOnline(ctx, p, logger, out); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "%s: good: %d tokens, %d file keys, %d client rules, identity %s until %s\n", o.path,
		len(p.tokens), len(p.homes), len(p.cfg.Clients), p.source.Identity(), p.source.NotAfter().UTC().Format("2006-01-02 15:04 MST"))
	return nil
}

func checkOnline(ctx context.Context, p *plan, logger *slog.Logger, out io.Writer) (err error) {
	keys := newKeyring(logger)
	defer func() { err = errors.Join(err, keys.close()) }()
	if err := keys.start(ctx, p); err != nil {
		return err
	}
	var errs conf.Errors
	for i, s := range keys.present() {
		if s.err != nil {
			errs = append(errs, p.file.Errorf(fmt.Sprintf("tokens[%d].uri", i), "%v", s.err))
		}
	}
	if err := errs.Err(); err != nil {
		return err // what is missing then follows from it
	}
	for _, e := range keys.registry.Entries() {
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
	for i, c := range p.cfg.Clients {
		for j, name := range c.Keys {
			if name != "*" {
				found(fmt.Sprintf("clients[%d].keys[%d]", i, j), name)
			}
		}
	}
	return cli.ConfigError(errs.Err())
}
