package main

import (
	"fmt"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/signer/audit"
)

// maxUnixPath is the longest path that a Unix socket can have, see unix(7).
const maxUnixPath = 107

// A validator collects faults of a configuration.
type validator struct {
	cfg  *Config
	file *conf.File
	errs conf.Errors
}

// validate checks what needs no look at anything that the configuration names.
func (c *Config) validate(file *conf.File) conf.Errors {
	v := validator{cfg: c, file: file}
	v.service()
	v.modules()
	for i := range c.Tokens {
		v.token(i)
	}
	for i := range c.Transit {
		v.transit(i)
	}
	v.fileKeys()
	v.homes()
	v.audit()
	v.tracing()
	return v.errs
}

func (v *validator) fault(key, format string, args ...any) {
	v.errs = append(v.errs, v.file.Errorf(key, format, args...))
}

// absolute holds paths to be absolute, as the server's working directory is nobody's choice.
func (v *validator) absolute(key, path string) {
	if path != "" && !filepath.IsAbs(path) {
		v.fault(key, "%q is not an absolute path", path)
	}
}

// word holds a value to be one of a few, or empty.
func (v *validator) word(key, value string, words ...string) {
	if value != "" && !slices.Contains(words, value) {
		v.fault(key, "%q is unknown; write %s", value, strings.Join(words, " or "))
	}
}

// integer holds a value to a range.
func (v *validator) integer(key string, n, low, high int) {
	if n < low || n > high {
		v.fault(key, "%d is out of range; write %d to %d", n, low, high)
	}
}

// span holds a duration to a range.
func (v *validator) span(key string, d, low, high time.Duration) {
	if d < low || d > high {
		v.fault(key, "%v is out of range; write %v to %v", d, low, high)
	}
}

// share holds a value to 0…1.
func (v *validator) share(key string, x float64) {
	if !(x >= 0 && x <= 1) {
		v.fault(key, "%v is out of range; write 0 to 1", x)
	}
}

func (v *validator) service() {
	c := v.cfg
	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		v.fault("listen", "%q is no address to listen on (%v); write host:port, such as 10.0.0.5:2407", c.Listen, err)
	}
	if err := c.Ops.Check(); err != nil {
		v.fault("ops.listen", "%v", err)
	}
	v.absolute("control", c.Control)
	if len(c.Control) > maxUnixPath {
		v.fault("control", "is longer than the %d bytes that a socket's path can have", maxUnixPath)
	}
	v.absolute("state_dir", c.StateDir)
	files := map[string]string{"tls.cert": c.TLS.Cert, "tls.key": c.TLS.Key, "tls.ca": c.TLS.CA}
	for _, key := range slices.Sorted(maps.Keys(files)) {
		if files[key] == "" {
			v.fault(key, "is missing; name the file, as keyhaven-keyserver ca issue writes it")
		}
	}
	if len(c.Tokens)+len(c.Transit)+len(c.FileKeys) == 0 {
		v.fault("tokens", "neither tokens nor transit nor file_keys name a key, so there would be nothing to sign with; add a token")
	}
	if len(c.Clients) == 0 {
		v.fault("clients", "is empty and admits nobody; add a rule for each client")
	}
	v.integer("limits.connections", c.Limits.Connections, 1, 1<<20)
	v.integer("limits.connections_per_client", c.Limits.ConnectionsPerClient, 1, 1<<20)
	v.integer("limits.in_flight", c.Limits.InFlight, 1, 1<<20)
	t := c.Timeouts
	for key, d := range map[string]time.Duration{
		"timeouts.handshake": t.Handshake, "timeouts.idle": t.Idle, "timeouts.header": t.Header, "timeouts.body": t.Body,
		"timeouts.write": t.Write, "timeouts.operation": t.Operation, "timeouts.drain": t.Drain,
	} {
		if d < 10*time.Millisecond || d > time.Hour {
			v.fault(key, "%v is out of range; write 10ms to 1h", d)
		}
	}
	v.span("probe.interval", c.Probe.Interval, time.Second, 24*time.Hour)
}

func (v *validator) modules() {
	for i, m := range v.cfg.Modules {
		v.absolute(fmt.Sprintf("modules[%d]", i), m)
	}
}

func (v *validator) token(i int) {
	t := v.cfg.Tokens[i]
	key := func(name string) string { return fmt.Sprintf("tokens[%d].%s", i, name) }
	v.integer(key("workers"), t.Workers, 0, 64)
	if t.Deadline != 0 {
		v.span(key("deadline"), t.Deadline, 10*time.Millisecond, 10*time.Minute)
	}
	if t.KeepAlive > 0 {
		v.span(key("keep_alive"), t.KeepAlive, 100*time.Millisecond, 24*time.Hour)
	}
	v.word(key("on_worker_loss"), t.OnWorkerLoss, "move", "fail")
	v.word(key("sandbox.mode"), t.Sandbox.Mode, "off", "basic", "strict")
	for j, p := range t.Sandbox.ReadPaths {
		v.absolute(fmt.Sprintf("tokens[%d].sandbox.read_paths[%d]", i, j), p)
	}
	for j, p := range t.Sandbox.WritePaths {
		v.absolute(fmt.Sprintf("tokens[%d].sandbox.write_paths[%d]", i, j), p)
	}
	if t.Sandbox.Mode != "strict" && t.Sandbox.confines() {
		v.fault(key("sandbox"), "read_paths, write_paths and network say what a strict sandbox leaves open; add mode: strict, or take them out")
	}
	v.size(key("sandbox.max_memory"), t.Sandbox.MaxMemory, 64<<20)
	v.shares(key, t.Weight, t.Priority, t.Queue)
	for j, name := range t.Decrypt {
		if name == "" || name == "*" {
			v.fault(fmt.Sprintf("tokens[%d].decrypt[%d]", i, j), "%q names no key; write the SKI or label of each key that may decrypt", name)
		}
	}
}

// confines reports whether anything is set that a strict sandbox alone heeds.
func (s SandboxConfig) confines() bool {
	return len(s.ReadPaths)+len(s.WritePaths) > 0 || s.Network
}

// shares checks what all homes have.
func (v *validator) shares(key func(string) string, weight, priority, queue int) {
	v.integer(key("weight"), weight, 0, 1000)
	v.integer(key("priority"), priority, 0, 1000)
	v.integer(key("queue"), queue, 0, 1<<20)
}

func (v *validator) transit(i int) {
	t := v.cfg.Transit[i]
	key := func(name string) string { return fmt.Sprintf("transit[%d].%s", i, name) }
	v.shares(key, t.Weight, t.Priority, t.Queue)
}

func (v *validator) fileKeys() {
	seen := map[string]int{}
	for i, k := range v.cfg.FileKeys {
		key := fmt.Sprintf("file_keys[%d].path", i)
		first, again := seen[filepath.Clean(k.Path)]
		switch {
		case k.Path == "":
			v.fault(key, "is missing; name the file of the private key")
		case again:
			v.fault(key, "is the file of file_keys[%d]; remove one", first)
		}
		seen[filepath.Clean(k.Path)] = i
	}
}

func (v *validator) homes() {
	h := v.cfg.Homes
	if !(h.HedgePercentile >= 0 && h.HedgePercentile < 1) {
		v.fault("homes.hedge_percentile", "%v is out of range; write 0 (off) to 0.999", h.HedgePercentile)
	}
	v.share("homes.hedge_budget", h.HedgeBudget)
	v.integer("homes.breaker_failures", h.BreakerFailures, 1, 1000)
	v.span("homes.breaker_min_open", h.BreakerMinOpen, 10*time.Millisecond, time.Hour)
	v.span("homes.breaker_max_open", h.BreakerMaxOpen, h.BreakerMinOpen, time.Hour)
}

// mode returns the audit's mode with its default.
func (a AuditConfig) mode() string {
	switch {
	case a.Mode != "":
		return a.Mode
	case a.Dir != "":
		return "best-effort"
	}
	return "off"
}

func (v *validator) audit() {
	a := v.cfg.Audit
	v.word("audit.mode", a.Mode, "off", "best-effort", "required")
	v.absolute("audit.dir", a.Dir)
	v.absolute("audit.key_file", a.KeyFile)
	if a.mode() != "off" && a.Dir == "" {
		v.fault("audit.dir", "is missing; name the directory for the records")
	}
	if a.mode() != "off" && a.KeyFile == "" && a.Key == "" {
		v.fault("audit.key_file", "is missing, and so is audit.key: checkpoints need a key; keyhaven-keyserver audit keygen makes one")
	}
	if a.KeyFile != "" && a.Key != "" {
		v.fault("audit.key", "and key_file both name a key for checkpoints; keep one")
	}
	v.span("audit.checkpoint", a.Checkpoint, time.Second, 24*time.Hour)
	v.span("audit.rotate_every", a.RotateEvery, time.Minute, 10*365*24*time.Hour)
	v.size("audit.rotate_size", a.RotateSize, 64<<10)
	if a.Syslog != "" {
		if _, err := audit.Syslog(audit.SyslogConfig{Address: a.Syslog}); err != nil {
			v.fault("audit.syslog", "%v", err)
		}
	}
	if a.JSONL != "-" {
		v.absolute("audit.jsonl", a.JSONL)
	}
}

func (v *validator) tracing() {
	v.share("tracing.sample_ratio", v.cfg.Tracing.SampleRatio)
	if err := v.cfg.Tracing.Check(); err != nil {
		v.fault("tracing.otlp_endpoint", "%v", err)
	}
}

func (v *validator) size(key, text string, low int64) {
	n, err := parseSize(text)
	switch {
	case err != nil:
		v.fault(key, "%v", err)
	case text != "" && n < low:
		v.fault(key, "%q is too small; write %d bytes or more", text, low)
	}
}

// parseSize reads a number of bytes with a unit. The empty text is 0.
func parseSize(text string) (int64, error) {
	if text == "" {
		return 0, nil
	}
	units := []struct {
		name  string
		shift uint
	}{{"KiB", 10}, {"MiB", 20}, {"GiB", 30}}
	for _, u := range units {
		digits, ok := strings.CutSuffix(text, u.name)
		if !ok {
			continue
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n < 1 || n > 1<<20 {
			break
		}
		return n << u.shift, nil
	}
	return 0, fmt.Errorf("%q is no size; write a whole number and KiB, MiB or GiB, such as 64MiB", text)
}
