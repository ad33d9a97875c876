package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/credential"
	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/transit"
)

// minHedge is the shortest time after which a second home is asked.
const minHedge = 2 * time.Millisecond

// loadPlaces turns tokens, mounts of Transit and key files into specs.
func (p *plan) loadPlaces(logger *slog.Logger) (errs conf.Errors) {
	for i := range p.cfg.Tokens {
		errs = append(errs, p.addToken(i)...)
	}
	for i := range p.cfg.Transit {
		errs = append(errs, p.addTransit(i)...)
	}
	errs = append(errs, p.addFileKeys(logger)...)
	p.nameApart()
	for _, s := range p.places {
		s.lane.Name = s.name
	}
	return errs
}

// nameApart gives places of one name their longer ones.
func (p *plan) nameApart() {
	count := map[string]int{}
	for _, s := range p.places {
		count[s.name]++
	}
	for _, s := range p.places {
		if count[s.name] > 1 {
			s.name = s.longName
		}
	}
}

// laneConfig is what the lanes of all places have in common.
func (p *plan) laneConfig(queue int) signer.LaneConfig {
	h := p.cfg.Homes
	c := signer.LaneConfig{
		Queue:   queue,
		Breaker: signer.BreakerConfig{Failures: h.BreakerFailures, MinOpen: h.BreakerMinOpen, MaxOpen: h.BreakerMaxOpen},
		Hedge:   signer.HedgeConfig{Percentile: h.HedgePercentile, Budget: h.HedgeBudget, Min: minHedge},
	}
	if h.HedgeBudget == 0 {
		c.Hedge.Percentile = 0
	}
	return c
}

// where says file, line and key, as errors do.
func (p *plan) where(key string) string {
	return strings.TrimSuffix(p.file.Errorf(key, "").Error(), ": ")
}

// addToken adds the spec of a token.
func (p *plan) addToken(i int) (errs conf.Errors) {
	c := p.cfg.Tokens[i]
	key := func(name string) string { return fmt.Sprintf("tokens[%d].%s", i, name) }
	tc, err := c.token(p.cfg.Modules)
	if err != nil {
		return conf.Errors{p.file.Errorf(key("uri"), "%v", err)}
	}
	if slices.ContainsFunc(p.cfg.Tokens[:i], func(o TokenConfig) bool { return o.URI == c.URI }) {
		errs = append(errs, p.file.Errorf(key("uri"), "is given twice; remove one"))
	}
	uri := tc.URI
	for _, err := range tc.Check() {
		name := "uri"
		if fe, ok := errors.AsType[*pkcs11.FieldError](err); ok {
			switch {
			case fe.Field == "Sessions":
				name = "sessions"
			case fe.Field == "Module" && uri.ModulePath+uri.ModuleName == "":
				name = "module"
			}
		}
		errs = append(errs, p.file.Errorf(key(name), "%v", err))
	}
	wc := c.worker(tc)
	p.places = append(p.places, &spec{
		kind: kindToken, name: tokenName(uri), longName: uri.String(), at: p.where(key("uri")), module: uri.ModulePath + c.Module,
		config: c.opening(p.cfg.Modules),
		open: func(ctx context.Context, logger *slog.Logger) (signer.Backend, error) {
			wc := wc
			wc.Logger, wc.Token.Logger = logger, logger
			return opened(worker.Open(ctx, wc))
		},
		weight:   c.Weight,
		priority: c.Priority,
		decrypt:  func(info signer.KeyInfo) bool { return namesKey(c.Decrypt, info) },
		lane:     p.laneConfig(c.Queue),
	})
	return errs
}

// opened makes a nil backend of one that did not open.
func opened[B signer.Backend](b B, err error) (signer.Backend, error) {
	if err != nil {
		return nil, err
	}
	return b, nil
}

// tokenName is what operators call a token: its label, serial or slot.
func tokenName(u pkcs11.URI) string {
	switch {
	case u.Token != "":
		return u.Token
	case u.Serial != "":
		return u.Serial
	}
	return "slot-" + u.SlotID
}

// token reads the token's name, module and PIN.
func (c *TokenConfig) token(modules []string) (pkcs11.Config, error) {
	switch {
	case c.URI == "":
		return pkcs11.Config{}, errors.New("is missing; write a PKCS#11 URI, such as pkcs11:token=site?pin-source=/etc/keyhaven/pin")
	case strings.Contains(c.URI, "pin-value"):
		return pkcs11.Config{}, errors.New("has a pin-value; a PIN has no place in a configuration: write it to a file of mode 600 and name that with pin-source")
	}
	text, name, err := takeCredential(c.URI)
	if err != nil {
		return pkcs11.Config{}, err
	}
	uri, err := pkcs11.ParseURI(text)
	if err != nil {
		return pkcs11.Config{}, err
	}
	tc := tokenConfig(uri, c.Module, modules)
	tc.Sessions, tc.AllowExtractable, tc.AllowFinalTry = c.Sessions, c.AllowExtractable, c.AllowFinalTry
	if name != "" {
		if _, err := credential.Path(name); err != nil {
			return tc, err
		}
		tc.PIN = func() (pkcs11.PIN, error) { return readCredential(name) }
	}
	return tc, nil
}

// worker says how the token's workers run. The configuration was validated.
func (c *TokenConfig) worker(tc pkcs11.Config) worker.Config {
	memory, _ := parseSize(c.Sandbox.MaxMemory)
	return worker.Config{
		Token: tc, Workers: c.Workers, Deadline: c.Deadline, KeepAlive: c.KeepAlive, OnLoss: c.OnWorkerLoss,
		Sandbox: worker.Sandbox{Mode: c.Sandbox.Mode, ReadPaths: c.Sandbox.ReadPaths, WritePaths: c.Sandbox.WritePaths,
			Network: c.Sandbox.Network, MaxMemory: memory},
	}
}

// opening is what of the configuration takes another opening when it changes.
func (c TokenConfig) opening(modules []string) any {
	c.Weight, c.Priority, c.Queue, c.Decrypt = 0, 0, 0, nil
	return struct {
		TokenConfig
		modules []string
	}{c, modules}
}

// tokenConfig names token and module. Whoever writes a module's path into the configuration, or on the command line, allows that
// module; a list of modules narrows that down.
func tokenConfig(uri pkcs11.URI, module string, modules []string) pkcs11.Config {
	c := pkcs11.Config{URI: uri, Module: module, AllowedModules: modules}
	if len(modules) == 0 && module == "" {
		c.Module = uri.ModulePath
	}
	return c
}

// transitKeys are the configuration's names of the fields of a transit.Config.
var transitKeys = map[string]string{
	"Address": "address", "Mount": "mount", "Namespace": "namespace", "Keys": "keys", "Batch": "batch", "InFlight": "in_flight", "Timeout": "timeout",
	"Auth.Method": "auth.method", "Auth.Mount": "auth.mount", "Auth.TokenFile": "auth.token_file", "Auth.RoleIDFile": "auth.role_id_file",
	"Auth.SecretIDFile": "auth.secret_id_file", "Auth.SecretIDWrapped": "auth.secret_id_wrapped", "Auth.Role": "auth.role", "Auth.JWTFile": "auth.jwt_file",
	"TLS.CA": "tls.ca", "TLS.Cert": "tls.cert", "TLS.Key": "tls.key", "TLS.ServerName": "tls.server_name",
}

// addTransit adds the spec of a mount of Transit.
func (p *plan) addTransit(i int) (errs conf.Errors) {
	c := p.cfg.Transit[i]
	key := func(name string) string { return fmt.Sprintf("transit[%d].%s", i, name) }
	tc := transit.Config{
		Address: c.Address, Mount: c.Mount, Namespace: c.Namespace, Batch: c.Batch, InFlight: c.InFlight, Timeout: c.Timeout,
		Auth: transit.AuthConfig{Method: c.Auth.Method, Mount: c.Auth.Mount, TokenFile: c.Auth.TokenFile, RoleIDFile: c.Auth.RoleIDFile,
			SecretIDFile: c.Auth.SecretIDFile, SecretIDWrapped: c.Auth.SecretIDWrapped, Role: c.Auth.Role, JWTFile: c.Auth.JWTFile},
		TLS: transit.TLSConfig{CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key, ServerName: c.TLS.ServerName},
	}
	for _, k := range c.Keys {
		tc.Keys = append(tc.Keys, transit.KeyConfig{Name: k.Name, Version: k.Version})
	}
	for _, err := range tc.Check() {
		name := "address"
		if fe, ok := errors.AsType[*transit.FieldError](err); ok && transitKeys[fe.Field] != "" {
			name = transitKeys[fe.Field]
		}
		errs = append(errs, p.file.Errorf(key(name), "%v", err))
	}
	if len(errs) > 0 {
		return errs // the name below is made of the address
	}
	opening := c
	opening.Weight, opening.Priority, opening.Queue = 0, 0, 0
	name := tc.Name()
	tc.Refusals = new(transit.Refusals)
	p.places = append(p.places, &spec{
		kind: kindTransit, name: name, longName: fmt.Sprintf("%s (transit[%d])", name, i), at: p.where(key("address")),
		config: opening,
		open: func(ctx context.Context, logger *slog.Logger) (signer.Backend, error) {
			tc := tc
			tc.Logger = logger
			return opened(transit.Open(ctx, tc))
		},
		forget:   tc.Refusals.Forget,
		weight:   c.Weight,
		priority: c.Priority,
		decrypt:  func(signer.KeyInfo) bool { return false },
		lane:     p.laneConfig(c.Queue),
	})
	return errs
}

// addFileKeys adds one spec for all key files.
func (p *plan) addFileKeys(logger *slog.Logger) (errs conf.Errors) {
	all := new(fileKeys)
	decrypt := map[keyless.SKI]bool{}
	for i, c := range p.cfg.FileKeys {
		if c.Path == "" {
			continue
		}
		files, err := signer.LoadFileKeys(logger, c.Path)
		if err != nil {
			errs = append(errs, p.file.Errorf(fmt.Sprintf("file_keys[%d].path", i), "%v", remedy(err)))
			continue
		}
		keys, err := files.Keys(context.Background())
		if err != nil {
			errs = append(errs, p.file.Errorf(fmt.Sprintf("file_keys[%d].path", i), "%v", err))
		}
		for _, k := range keys {
			decrypt[k.Info().SKI] = decrypt[k.Info().SKI] || c.Decrypt
		}
		all.keys = append(all.keys, keys...)
	}
	if len(all.keys) > 0 {
		p.places = append(p.places, &spec{
			kind: kindFiles, name: kindFiles, longName: kindFiles, at: p.where("file_keys"),
			open:    func(context.Context, *slog.Logger) (signer.Backend, error) { return all, nil },
			decrypt: func(info signer.KeyInfo) bool { return decrypt[info.SKI] },
			lane:    p.laneConfig(0),
		})
	}
	return errs
}

// beside returns the path of a file in the directory for what outlives the process, or "".
func (c *Config) beside(name string) string {
	if c.StateDir == "" {
		return ""
	}
	return filepath.Join(c.StateDir, name)
}
