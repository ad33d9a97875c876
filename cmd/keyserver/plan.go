package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// A plan is a configuration with everything loaded that it names, but for tokens: those take a PIN's try to open.
type plan struct {
	cfg    Config
	file   *conf.File
	policy *signer.Policy
	tokens []pkcs11.Config
	homes  []signer.Home // of file keys
	source *mtls.Source
	sealer *signer.Sealer // nil: off

	authority *mtls.Authority // nil without ca_dir
	revoked   *revocations    // nil without ca_dir
}

// load reads the configuration and what it names. The error lists every fault.
func load(o loadOptions, logger *slog.Logger) (*plan, error) {
	cfg, file, err := read(o)
	if err != nil && file == nil {
		return nil, err
	}
	p := &plan{cfg: cfg, file: file}
	var errs conf.Errors
	if err != nil {
		errs = append(errs, err.(conf.Errors)...)
	}
	errs = append(errs, p.loadPolicy()...)
	for i := range cfg.Tokens {
		errs = append(errs, p.addToken(i, logger)...)
	}
	errs = append(errs, p.loadFileKeys(logger)...)
	errs = append(errs, p.loadIdentity(logger)...)
	errs = append(errs, p.checkClients()...)
	errs = append(errs, p.loadAuthority()...)
	errs = append(errs, p.loadSealer()...)
	errs = append(errs, p.leaveOutRevoked()...)
	if err := errs.Err(); err != nil {
		slices.SortStableFunc(errs, byLine)
		return nil, errs
	}
	return p, nil
}

// byLine puts faults in the order of the file.
func byLine(a, b error) int {
	line := func(err error) int {
		if e, ok := errors.AsType[*conf.Error](err); ok {
			return e.Line
		}
		return 0
	}
	return cmp.Or(line(a)-line(b), strings.Compare(a.Error(), b.Error()))
}

func (p *plan) loadPolicy() (errs conf.Errors) {
	policy, err := signer.NewPolicy(p.cfg.Clients, signer.Options{})
	p.policy = policy
	if err == nil {
		return nil
	}
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		re, ok := errors.AsType[*signer.RuleError](e)
		if !ok {
			errs = append(errs, p.file.Errorf("clients", "%v", e))
			continue
		}
		errs = append(errs, p.file.Errorf(fmt.Sprintf("clients[%d].%s", re.Rule, re.Key), "%s", re.Problem))
	}
	return errs
}

// addToken turns the configuration of a token into that of its backend.
func (p *plan) addToken(i int, logger *slog.Logger) (errs conf.Errors) {
	c := p.cfg.Tokens[i]
	key := func(name string) string { return fmt.Sprintf("tokens[%d].%s", i, name) }
	uri, err := c.parse()
	if err != nil {
		return conf.Errors{p.file.Errorf(key("uri"), "%v", err)}
	}
	if p.tokenTwice(i) {
		errs = append(errs, p.file.Errorf(key("uri"), "is given twice; remove one"))
	}
	tc := tokenConfig(uri, c.Module, p.cfg.Modules)
	c.apply(&tc)
	tc.Logger = logger
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
	p.tokens = append(p.tokens, tc)
	return errs
}

// parse reads the token's URI.
func (c *TokenConfig) parse() (pkcs11.URI, error) {
	switch {
	case c.URI == "":
		return pkcs11.URI{}, errors.New("is missing; write a PKCS#11 URI, such as pkcs11:token=site?pin-source=/etc/keyhaven/pin")
	case strings.Contains(c.URI, "pin-value"):
		return pkcs11.URI{}, errors.New("has a pin-value; a PIN has no place in a configuration: write it to a file of mode 600 and name that with pin-source")
	}
	return pkcs11.ParseURI(c.URI)
}

// apply passes on what the configuration says about the token beside its name.
func (c *TokenConfig) apply(tc *pkcs11.Config) {
	tc.Sessions, tc.AllowExtractable, tc.AllowFinalTry = c.Sessions, c.AllowExtractable, c.AllowFinalTry
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

func (p *plan) tokenTwice(i int) bool {
	for _, other := range p.cfg.Tokens[:i] {
		if other.URI == p.cfg.Tokens[i].URI {
			return true
		}
	}
	return false
}

func (p *plan) loadFileKeys(logger *slog.Logger) (errs conf.Errors) {
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
			p.homes = append(p.homes, signer.Home{Key: k, Decrypt: c.Decrypt})
		}
	}
	return errs
}

// loadIdentity opens the server's certificate, key and roots.
func (p *plan) loadIdentity(logger *slog.Logger) conf.Errors {
	t := p.cfg.TLS
	if t.Cert == "" || t.Key == "" || t.CA == "" {
		return nil // said already
	}
	source, err := mtls.OpenSource(mtls.SourceConfig{CertFile: t.Cert, KeyFile: t.Key, RootsFile: t.CA, Logger: logger})
	if err != nil {
		return conf.Errors{p.file.Errorf("tls", "%v; keyhaven-keyserver ca issue writes a set of files that fit each other", err)}
	}
	if id := source.Identity(); id.Kind != mtls.KindKeyServer {
		return conf.Errors{p.file.Errorf("tls.cert", "is for %s, which is no key server; have one issued by keyhaven-keyserver ca issue", id)}
	}
	p.source = source
	return nil
}

// checkClients finds rules for clients that could never connect.
func (p *plan) checkClients() (errs conf.Errors) {
	if p.source == nil {
		return nil
	}
	for i, c := range p.cfg.Clients {
		id, err := mtls.ParseIdentity(c.ID)
		key, domain := fmt.Sprintf("clients[%d].id", i), p.source.Identity().TrustDomain
		switch {
		case err != nil && strings.Contains(c.ID, "://"): // else the policy has said it
			errs = append(errs, p.file.Errorf(key, "%v", err))
		case err == nil && id.TrustDomain != domain:
			errs = append(errs, p.file.Errorf(key, "%s lies outside the server's trust domain %s, so it could never connect; correct the name", id, domain))
		}
	}
	return errs
}

func (p *plan) loadAuthority() conf.Errors {
	if p.cfg.CADir == "" {
		return nil
	}
	a, err := mtls.OpenAuthority(p.cfg.CADir)
	if err != nil {
		return conf.Errors{p.file.Errorf("ca_dir", "%v; keyhaven-keyserver ca init makes one", err)}
	}
	r, err := openRevocations(p.cfg.CADir)
	if err != nil {
		return conf.Errors{p.file.Errorf("ca_dir", "%v", err)}
	}
	if p.source != nil && p.source.Identity().TrustDomain != a.TrustDomain() {
		return conf.Errors{p.file.Errorf("ca_dir", "is the authority of %s, and tls.cert is of %s; name the authority that issued the certificate", a.TrustDomain(), p.source.Identity().TrustDomain)}
	}
	p.authority, p.revoked = a, r
	return nil
}

// leaveOutRevoked takes the rules of revoked clients out of the policy, so that a connection that was being made while its client was revoked gets nothing
// either.
func (p *plan) leaveOutRevoked() conf.Errors {
	if p.policy == nil || p.revoked == nil {
		return nil
	}
	rules := slices.DeleteFunc(slices.Clone(p.cfg.Clients), func(r signer.ClientRule) bool { return p.revoked.revokedID(r.ID) })
	policy, err := signer.NewPolicy(rules, signer.Options{})
	if err != nil {
		return conf.Errors{p.file.Errorf("clients", "%v", err)}
	}
	p.policy = policy
	return nil
}

func (p *plan) loadSealer() conf.Errors {
	path := p.cfg.SealKeyFile
	if path == "" {
		return nil
	}
	sealer, err := signer.LoadSealer(path)
	if err != nil {
		return conf.Errors{p.file.Errorf("seal_key_file", "%v", remedy(err))}
	}
	p.sealer = sealer
	return nil
}

// remedy adds what to do about a file that is not there.
func remedy(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: create it, or correct the path", err)
	}
	return err
}
