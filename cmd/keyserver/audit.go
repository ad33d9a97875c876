package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/signer/audit"
)

// An auditor keeps records in the log that the present configuration names. It is a signer.Auditor that outlives reloads.
type auditor struct {
	registry   *signer.Registry
	inProgress func() int
	logger     *slog.Logger

	mu     sync.RWMutex // held for reading by operations, for writing while one log takes the place of another
	config AuditConfig
	log    *audit.Log // nil: none
	end    func() error
	fault  error // why there is no log where one is configured
}

func newAuditor(r *signer.Registry, inProgress func() int, logger *slog.Logger) *auditor {
	return &auditor{registry: r, inProgress: inProgress, logger: logger}
}

// use opens the log of a plan, if it is not the present one. Operations wait meanwhile. On an error there is no log: in the mode required
// nothing is signed then.
func (a *auditor) use(p *plan) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.config == p.cfg.Audit && a.fault == nil {
		return nil
	}
	err := a.endLocked()
	a.config, a.fault = p.cfg.Audit, nil
	if a.config.mode() == "off" {
		return err
	}
	log, openErr := a.open(p)
	if openErr != nil {
		a.fault = openErr
		return errors.Join(err, openErr)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- log.Run(ctx) }()
	a.log, a.end = log, func() error {
		cancel()
		return errors.Join(<-ended, log.Close())
	}
	return err
}

// open makes the log that the configuration describes.
func (a *auditor) open(p *plan) (*audit.Log, error) {
	c := p.cfg.Audit
	size, _ := parseSize(c.RotateSize) // was checked
	outputs, err := c.outputs()
	if err != nil {
		return nil, err
	}
	key, err := a.signer(c)
	if err != nil {
		return nil, err
	}
	return audit.Open(context.Background(), audit.Config{
		Dir: c.Dir, Mode: audit.Mode(c.mode()), Server: p.source.Identity().String(), Signer: key, Checkpoint: c.Checkpoint,
		RotateSize: size, RotateEvery: c.RotateEvery, Outputs: outputs, InProgress: a.inProgress, Logger: a.logger,
	})
}

// signer returns what signs checkpoints: a key in a file, or one of the keys that are served.
func (a *auditor) signer(c AuditConfig) (audit.CheckpointSigner, error) {
	if c.KeyFile != "" {
		return audit.FileSigner(c.KeyFile)
	}
	return audit.KeySigner(func() *signer.Entry {
		if found := a.registry.ByName(c.Key); len(found) == 1 {
			return found[0]
		}
		return nil
	}), nil
}

func (a AuditConfig) outputs() (out []audit.Output, err error) {
	if a.JSONL != "" {
		out = append(out, audit.JSONLines(a.JSONL))
	}
	if a.Syslog != "" {
		o, err := audit.Syslog(audit.SyslogConfig{Address: a.Syslog})
		if err != nil {
			return nil, err
		}
		out = append(out, o)
	}
	return out, nil
}

// checkAudit finds what of the audit's files is not good, before they are used.
func (p *plan) checkAudit() conf.Errors {
	if path := p.cfg.Audit.KeyFile; path != "" && p.cfg.Audit.mode() != "off" {
		if _, err := audit.FileSigner(path); err != nil {
			return conf.Errors{p.file.Errorf("audit.key_file", "%v", remedy(err))}
		}
	}
	return nil
}

// endLocked ends the present log, with its last records durable.
func (a *auditor) endLocked() error {
	if a.log == nil {
		return nil
	}
	err := a.end()
	a.log, a.end = nil, nil
	if err != nil {
		return fmt.Errorf("end the audit log: %w", err)
	}
	return nil
}

func (a *auditor) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.endLocked()
}

// Ready implements signer.Auditor.
func (a *auditor) Ready() error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	switch {
	case a.log != nil:
		return a.log.Ready()
	case a.config.mode() == string(audit.Required):
		return a.missing()
	}
	return nil
}

// Commit implements signer.Auditor.
func (a *auditor) Commit(ctx context.Context, r *signer.Record) error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	switch {
	case a.log != nil:
		return a.log.Commit(ctx, r)
	case a.config.mode() == string(audit.Required):
		return a.missing()
	}
	return nil
}

func (a *auditor) missing() error {
	if a.fault != nil {
		return a.fault
	}
	return errors.New("the log is not open yet")
}

// trouble returns why records cannot be kept, in whatever mode.
func (a *auditor) trouble() error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.log != nil {
		return a.log.Fault()
	}
	return a.fault
}

// keeps reports whether records are kept now.
func (a *auditor) keeps() bool {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.log != nil && a.log.Fault() == nil
}

// stats returns how the log is doing, or nil without one.
func (a *auditor) stats() *audit.Stats {
	a.mu.RLock()
	defer a.mu.RUnlock()
	if a.log == nil {
		return nil
	}
	s := a.log.Stats()
	return &s
}
