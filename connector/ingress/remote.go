package ingress

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/keyhaven/keyhaven/ingressconf"
)

// remoteConfig is what the edge configured last. It is kept in HandlerConfig.File as JSON.
type remoteConfig struct {
	Version uint64          `json:"version"`
	Body    json.RawMessage `json:"body"`
	config  *ingressconf.Config
}

// Configure puts rules from the edge in place, all or none. The version must be above the one in force; the same version
// with the same body is fine and changes nothing. A body without rules gives way to the connector's own file. An error,
// whose text is for the edge's operator, means that nothing has changed.
func (h *Handler) Configure(_ context.Context, version uint64, body []byte) error {
	err := h.configure(version, body)
	if err != nil {
		h.metrics.refused.Inc()
		h.log.Error("remote configuration refused, the old one stays", "version", version, "err", err)
	}
	return err
}

func (h *Handler) configure(version uint64, body []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch have := h.remote.Version; {
	case h.closed:
		return errors.New("this connector is stopping")
	case !h.cfg.Remote:
		return errors.New("this connector takes no remote configuration; its owner can set remote_config: true")
	case version < have || version == 0:
		return fmt.Errorf("version %d is stale: version %d is in force here", version, have)
	case version == have && !bytes.Equal(body, h.remote.Body):
		return fmt.Errorf("version %d is in force here with other content; raise the version", version)
	case version == have:
		return nil
	}
	c, err := ingressconf.ParseRemote(body)
	if err != nil {
		return err
	}
	if err := h.dialer.permits(c); err != nil {
		return err
	}
	old := h.remote
	h.remote = remoteConfig{Version: version, Body: bytes.Clone(body), config: c}
	if err := h.applyLocked(); err != nil {
		h.remote = old
		return err
	}
	if err := h.saveLocked(); err != nil {
		h.log.Warn("remote configuration is in force, but is not kept for a restart", "version", version, "err", err)
	}
	return nil
}

// applyLocked builds what must hold now and swaps it in.
func (h *Handler) applyLocked() error {
	source, c := SourceLocal, h.local
	if h.remote.config.Len() > 0 {
		source, c = SourceRemote, h.remote.config
	}
	if c.Len() == 0 {
		source = SourceNone
	}
	old := h.rules.Load()
	next, err := h.build(c, source, old)
	if err != nil {
		return err
	}
	h.rules.Store(next)
	if old != nil {
		old.retire(next)
	}
	h.metrics.version.Set(float64(h.remote.Version))
	h.log.Info("ingress rules in force", "source", source, "version", h.remote.Version, "rules", c.Len())
	if source == SourceRemote && h.local.Len() > 0 {
		h.log.Warn("the remote configuration stands in place of the ingress rules of this connector's file", "version", h.remote.Version)
	}
	return nil
}

// load reads what an earlier process kept. What cannot be read is left: the edge sends it again.
func (h *Handler) load() {
	if !h.cfg.Remote || h.cfg.File == "" {
		return
	}
	r, err := readKept(h.cfg.File)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		h.log.Warn("the kept remote configuration cannot be used; the edge will send it again", "file", h.cfg.File, "err", err)
	default:
		h.remote = r
	}
}

func readKept(path string) (r remoteConfig, err error) {
	f, err := os.Open(path)
	if err != nil {
		return r, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 2*ingressconf.MaxSize))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("it is no kept configuration: %w", err)
	}
	if r.Version == 0 {
		return r, errors.New("it has no version")
	}
	r.config, err = ingressconf.ParseRemote(r.Body)
	return r, err
}

// saveLocked replaces the kept configuration as a whole, so that a crash leaves the old one or the new one.
func (h *Handler) saveLocked() error {
	if h.cfg.File == "" {
		return nil
	}
	b, err := json.Marshal(h.remote)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(h.cfg.File), ".remote-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), h.cfg.File)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// Kept returns what a connector keeps in the file of [HandlerConfig]: the last configuration from the edge and its
// version. The error is fs.ErrNotExist if there is none.
func Kept(path string) (version uint64, c *ingressconf.Config, err error) {
	r, err := readKept(path)
	return r.Version, r.config, err
}
