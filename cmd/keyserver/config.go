package main

import (
	"fmt"
	"net"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/signer"
)

// Config is the configuration file. Everything but listen, ops, limits and timeouts can change with SIGHUP.
type Config struct {
	Listen      string              `mapstructure:"listen"`
	Ops         ops.Config          `mapstructure:"ops"`
	TLS         TLSConfig           `mapstructure:"tls"`
	CADir       string              `mapstructure:"ca_dir"`
	Modules     []string            `mapstructure:"modules"`
	Tokens      []TokenConfig       `mapstructure:"tokens"`
	FileKeys    []FileKeyConfig     `mapstructure:"file_keys"`
	Clients     []signer.ClientRule `mapstructure:"clients"`
	SealKeyFile string              `mapstructure:"seal_key_file"`
	Limits      LimitsConfig        `mapstructure:"limits"`
	Timeouts    TimeoutsConfig      `mapstructure:"timeouts"`
}

// TLSConfig names the key server's own identity and the authority of its clients.
type TLSConfig struct {
	Cert       string `mapstructure:"cert"`
	Key        string `mapstructure:"key"`
	CA         string `mapstructure:"ca"`
	AllowTLS12 bool   `mapstructure:"allow_tls12"`
}

// TokenConfig names one PKCS#11 token.
type TokenConfig struct {
	URI              string   `mapstructure:"uri"`
	Module           string   `mapstructure:"module"`
	Sessions         int      `mapstructure:"sessions"`
	AllowExtractable bool     `mapstructure:"allow_extractable"`
	AllowFinalTry    bool     `mapstructure:"allow_final_try"`
	Decrypt          []string `mapstructure:"decrypt"` // SKIs and labels of keys with which clients may decrypt
}

// FileKeyConfig names one private key in a file.
type FileKeyConfig struct {
	Path    string `mapstructure:"path"`
	Decrypt bool   `mapstructure:"decrypt"`
}

// LimitsConfig bounds what clients can occupy.
type LimitsConfig struct {
	Connections          int `mapstructure:"connections"`
	ConnectionsPerClient int `mapstructure:"connections_per_client"`
	InFlight             int `mapstructure:"in_flight"` // operations of one connection
}

// TimeoutsConfig holds the deadlines of a connection's stages.
type TimeoutsConfig struct {
	Handshake time.Duration `mapstructure:"handshake"`
	Idle      time.Duration `mapstructure:"idle"`
	Header    time.Duration `mapstructure:"header"`
	Body      time.Duration `mapstructure:"body"`
	Write     time.Duration `mapstructure:"write"`
	Operation time.Duration `mapstructure:"operation"`
	Drain     time.Duration `mapstructure:"drain"`
}

// defaults returns the configuration of an empty file.
func defaults() Config {
	return Config{
		Listen: ":2407",
		Limits: LimitsConfig{Connections: 1024, ConnectionsPerClient: 64, InFlight: 1024},
		Timeouts: TimeoutsConfig{
			Handshake: 5 * time.Second, Idle: time.Minute, Header: 5 * time.Second, Body: 10 * time.Second,
			Write: 10 * time.Second, Operation: 10 * time.Second, Drain: 10 * time.Second,
		},
	}
}

// loadOptions say where the configuration comes from.
type loadOptions struct {
	path  string
	flags *pflag.FlagSet
}

func optionsOf(cmd *cobra.Command) loadOptions {
	return loadOptions{path: cmd.Flag("config").Value.String(), flags: cmd.Flags()}
}

// read decodes the configuration and checks what can be checked without opening anything that it names.
func read(o loadOptions) (Config, *conf.File, error) {
	cfg := defaults()
	c := conf.Options{Path: o.path, EnvPrefix: envPrefix, EnvOthers: []string{}}
	if o.flags != nil {
		c.Flags, c.FlagKeys = o.flags, map[string]string{"listen": "listen", "ops": "ops.listen"}
	}
	file, err := conf.Load(&cfg, c)
	if err != nil {
		return cfg, nil, err
	}
	return cfg, file, cfg.validate(file).Err()
}

func (c *Config) validate(file *conf.File) conf.Errors {
	var errs conf.Errors
	fault := func(key, format string, args ...any) { errs = append(errs, file.Errorf(key, format, args...)) }

	if _, _, err := net.SplitHostPort(c.Listen); err != nil {
		fault("listen", "%q is no address to listen on (%v); write host:port, such as 10.0.0.5:2407", c.Listen, err)
	}
	if err := c.Ops.Check(); err != nil {
		fault("ops.listen", "%v", err)
	}
	for key, path := range map[string]string{"tls.cert": c.TLS.Cert, "tls.key": c.TLS.Key, "tls.ca": c.TLS.CA} {
		if path == "" {
			fault(key, "is missing; name the file, as keyhaven-keyserver ca issue writes it")
		}
	}
	if len(c.Tokens)+len(c.FileKeys) == 0 {
		fault("tokens", "neither tokens nor file_keys name a key, so there would be nothing to sign with; add a token")
	}
	if len(c.Clients) == 0 {
		fault("clients", "is empty and admits nobody; add a rule for each client")
	}
	for i, m := range c.Modules {
		if !filepath.IsAbs(m) {
			fault(fmt.Sprintf("modules[%d]", i), "%q is not an absolute path", m)
		}
	}
	seen := map[string]int{}
	for i, k := range c.FileKeys {
		key := fmt.Sprintf("file_keys[%d].path", i)
		first, again := seen[filepath.Clean(k.Path)]
		switch {
		case k.Path == "":
			fault(key, "is missing; name the file of the private key")
		case again:
			fault(key, "is the file of file_keys[%d]; remove one", first)
		}
		seen[filepath.Clean(k.Path)] = i
	}
	for key, n := range map[string]int{
		"limits.connections": c.Limits.Connections, "limits.connections_per_client": c.Limits.ConnectionsPerClient, "limits.in_flight": c.Limits.InFlight,
	} {
		if n < 1 || n > 1<<20 {
			fault(key, "%d is out of range; write 1 to %d", n, 1<<20)
		}
	}
	t := c.Timeouts
	for key, d := range map[string]time.Duration{
		"timeouts.handshake": t.Handshake, "timeouts.idle": t.Idle, "timeouts.header": t.Header, "timeouts.body": t.Body,
		"timeouts.write": t.Write, "timeouts.operation": t.Operation, "timeouts.drain": t.Drain,
	} {
		if d < 10*time.Millisecond || d > time.Hour {
			fault(key, "%v is out of range; write 10ms to 1h", d)
		}
	}
	return errs
}
