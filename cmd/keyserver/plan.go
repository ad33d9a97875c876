package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/signer"
)

// A plan is a configuration with everything loaded that it names, but for the places of keys: a token takes a PIN's try to open.
type plan struct {
	cfg    Config
	file   *conf.File
	policy *signer.Policy
	places []*spec
	source *mtls.Source
	sealer *signer.Sealer // nil: off
	quotas *signer.Quotas // outlive the plan; nil: begin anew

	authority *mtls.Authority // nil without ca_dir
	revoked   *revocations    // nil without ca_dir
}

// load reads the configuration and what it names. The error lists every fault.
func load(o loadOptions, logger *slog.Logger) (*plan, error) {
	cfg, file, err := read(o)
	if err != nil && file == nil {
		return nil, err
	}
	p := &plan{cfg: cfg, file: file, quotas: o.quotas}
	var errs conf.Errors
	if err != nil {
		errs = append(errs, err.(conf.Errors)...)
	}
	errs = append(errs, p.loadPolicy()...)
	errs = append(errs, p.loadPlaces(logger)...)
	errs = append(errs, p.loadIdentity(logger)...)
	errs = append(errs, p.checkClients()...)
	errs = append(errs, p.loadAuthority()...)
	errs = append(errs, p.loadSealer()...)
	errs = append(errs, p.checkAudit()...)
	errs = append(errs, p.checkStateDir()...)
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

// policyOf compiles rules with what the configuration says besides.
func (p *plan) policyOf(rules []signer.ClientRule) (*signer.Policy, error) {
	l := p.cfg.Legacy
	return signer.NewPolicy(rules, signer.Options{Legacy: signer.Legacy{SHA1: l.SHA1, MD5SHA1: l.MD5SHA1, Decrypt: l.Decrypt}, Quotas: p.quotas})
}

func (p *plan) loadPolicy() (errs conf.Errors) {
	policy, err := p.policyOf(p.cfg.Clients)
	p.policy = policy
	if err == nil {
		return nil
	}
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		errs = append(errs, p.ruleError(e))
	}
	return errs
}

// ruleError adds file and line to an error about a rule.
func (p *plan) ruleError(err error) error {
	re, ok := errors.AsType[*signer.RuleError](err)
	if !ok {
		return p.file.Errorf("clients", "%v", err)
	}
	return p.file.Errorf(fmt.Sprintf("clients[%d].%s", re.Rule, re.Key), "%s", re.Problem)
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
	policy, err := p.policyOf(rules)
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

func (p *plan) checkStateDir() conf.Errors {
	if p.cfg.StateDir == "" {
		return nil
	}
	info, err := os.Stat(p.cfg.StateDir)
	switch {
	case err != nil:
		return conf.Errors{p.file.Errorf("state_dir", "%v", remedy(err))}
	case !info.IsDir():
		return conf.Errors{p.file.Errorf("state_dir", "%s is no directory; name one", p.cfg.StateDir)}
	}
	return nil
}

// remedy adds what to do about a file that is not there.
func remedy(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: create it, or correct the path", err)
	}
	return err
}
