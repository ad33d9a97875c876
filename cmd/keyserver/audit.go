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

	changing sync.Mutex // held while one log takes the place of another, which may take as long as the disk does

	mu     sync.RWMutex // never held while the disk is waited for
	config AuditConfig
	log    *audit.Log    // nil: none
	moving chan struct{} // closed when the next log is there or is known not to be; nil unless one takes the place of another
	end    func() error
	server string     // whose log it is
	key    audit.Hash // id of the key in config.KeyFile
	fault  error      // why there is no log where one is configured, or not the one that is
}

func newAuditor(r *signer.Registry, inProgress func() int, logger *slog.Logger) *auditor {
	return &auditor{registry: r, inProgress: inProgress, logger: logger}
}

// use opens the log of a plan, if it is not the present one. Records wait meanwhile. If it cannot be opened, the present one goes on if it is in another
// directory and keeps records as strictly. Else there is none: in the mode required nothing is signed then.
func (a *auditor) use(p *plan) error {
	a.changing.Lock()
	defer a.changing.Unlock()
	next := p.cfg.Audit
	if a.config == next && (a.log != nil || a.fault == nil) {
		err := a.belongs(p)
		a.settle(a.log, a.config, err)
		return err
	}
	var log *audit.Log
	var err error
	if a.log != nil && next.mode() != "off" && next.Dir != a.config.Dir {
		log, err = a.open(p)
		if err != nil && (a.config.mode() == string(audit.Required) || a.config.mode() == next.mode()) {
			err = fmt.Errorf("%w; records go on into %s", err, a.config.Dir)
			a.settle(a.log, a.config, err)
			return err
		}
	}
	endErr := a.finish()
	if log == nil && err == nil && next.mode() != "off" {
		if log, err = a.open(p); err != nil {
			err = fmt.Errorf("%w; put that right and reload", err) // it is not tried again by itself
		}
	}
	if log != nil {
		a.server, a.key = p.source.Identity().String(), keyID(next)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- log.Run(ctx) }()
		a.end = func() error {
			cancel()
			return errors.Join(<-ended, log.Close())
		}
	}
	a.settle(log, next, err)
	return errors.Join(endErr, err)
}

// belongs returns an error if the present log is not the one that a server with this plan would begin: its next start would refuse the log.
func (a *auditor) belongs(p *plan) error {
	if a.log == nil {
		return nil
	}
	if id := p.source.Identity().String(); id != a.server {
		return fmt.Errorf("%s holds the log of server %q, as which it goes on; this server is %q now, and would refuse it at its next start: name another directory", a.config.Dir, a.server, id)
	}
	if id := keyID(a.config); id != a.key {
		return fmt.Errorf("%s holds another key than the one that signs the log in %s, which goes on; the next start would refuse it: put the old key back, or name another directory", a.config.KeyFile, a.config.Dir)
	}
	return nil
}

// keyID returns the id of the key in the file that signs checkpoints, zero if there is none that can be read.
func keyID(c AuditConfig) audit.Hash {
	if c.KeyFile == "" {
		return audit.Hash{}
	}
	key, err := audit.FileSigner(c.KeyFile)
	if err != nil {
		return audit.Hash{}
	}
	id, err := audit.KeyID(key.Public())
	if err != nil {
		return audit.Hash{}
	}
	return id
}

// settle has records go to log, or to none if it is nil.
func (a *auditor) settle(log *audit.Log, c AuditConfig, fault error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.log, a.config, a.fault = log, c, fault
	if a.moving != nil {
		close(a.moving)
		a.moving = nil
	}
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

// finish ends the present log, with its last records durable. Records wait until settle is called.
func (a *auditor) finish() error {
	a.mu.Lock()
	running := a.log != nil
	a.log = nil
	if a.moving == nil {
		a.moving = make(chan struct{})
	}
	a.mu.Unlock()
	if !running {
		return nil
	}
	if err := a.end(); err != nil {
		return fmt.Errorf("end the audit log: %w", err)
	}
	return nil
}

func (a *auditor) close() error {
	a.changing.Lock()
	defer a.changing.Unlock()
	err := a.finish()
	a.settle(nil, a.config, audit.ErrClosed)
	return err
}

// Ready implements signer.Auditor. While one log takes the place of another, Commit waits for the next.
func (a *auditor) Ready() error {
	a.mu.RLock()
	defer a.mu.RUnlock()
	switch {
	case a.log != nil:
		return a.log.Ready()
	case a.moving == nil && a.config.mode() == string(audit.Required):
		return a.missing()
	}
	return nil
}

// Commit implements signer.Auditor.
func (a *auditor) Commit(ctx context.Context, r *signer.Record) error {
	for ended := (*audit.Log)(nil); ; {
		a.mu.RLock()
		log, moving, required, missing := a.log, a.moving, a.config.mode() == string(audit.Required), a.missing()
		if log != nil && !required {
			defer a.mu.RUnlock() // a log that does not wait would lose the record unseen if it were ended meanwhile
			return log.Commit(ctx, r)
		}
		a.mu.RUnlock()
		switch {
		case log != nil:
			if err := log.Commit(ctx, r); !errors.Is(err, audit.ErrClosed) || log == ended {
				return err
			}
			ended = log // before it took the record: another takes its place
		case moving != nil:
			select {
			case <-moving:
			case <-ctx.Done():
				return fmt.Errorf("one audit log takes the place of another: %w", context.Cause(ctx))
			}
		case required:
			return missing
		default:
			return nil
		}
	}
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
	if a.log != nil && a.log.Fault() != nil {
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
