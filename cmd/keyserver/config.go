package main

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/keyhaven/keyhaven/internal/conf"
	"github.com/keyhaven/keyhaven/internal/ops"
	"github.com/keyhaven/keyhaven/internal/tracing"
	"github.com/keyhaven/keyhaven/signer"
)

// Config is the configuration file. Everything but listen, ops, limits, timeouts, control, state_dir and tracing can change
// with a reload.
type Config struct {
	Listen      string              `mapstructure:"listen"`
	Ops         ops.Config          `mapstructure:"ops"`
	Control     string              `mapstructure:"control"`   // path of the Unix socket for commands; empty: none
	StateDir    string              `mapstructure:"state_dir"` // empty: daily budgets begin anew with the process
	TLS         TLSConfig           `mapstructure:"tls"`
	CADir       string              `mapstructure:"ca_dir"`
	Modules     []string            `mapstructure:"modules"`
	Tokens      []TokenConfig       `mapstructure:"tokens"`
	Transit     []TransitConfig     `mapstructure:"transit"`
	FileKeys    []FileKeyConfig     `mapstructure:"file_keys"`
	Homes       HomesConfig         `mapstructure:"homes"`
	Clients     []signer.ClientRule `mapstructure:"clients"`
	Legacy      LegacyConfig        `mapstructure:"legacy"`
	SealKeyFile string              `mapstructure:"seal_key_file"`
	Audit       AuditConfig         `mapstructure:"audit"`
	Probe       ProbeConfig         `mapstructure:"probe"`
	Tracing     tracing.Config      `mapstructure:"tracing"`
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

// TokenConfig names one PKCS#11 token and says how it is used.
type TokenConfig struct {
	URI              string        `mapstructure:"uri"`
	Module           string        `mapstructure:"module"`
	Sessions         int           `mapstructure:"sessions"` // of one worker
	Workers          int           `mapstructure:"workers"`
	Deadline         time.Duration `mapstructure:"deadline"`
	KeepAlive        time.Duration `mapstructure:"keep_alive"`
	OnWorkerLoss     string        `mapstructure:"on_worker_loss"`
	Sandbox          SandboxConfig `mapstructure:"sandbox"`
	AllowExtractable bool          `mapstructure:"allow_extractable"`
	AllowFinalTry    bool          `mapstructure:"allow_final_try"`

	Weight   int      `mapstructure:"weight"`
	Priority int      `mapstructure:"priority"`
	Queue    int      `mapstructure:"queue"`
	Decrypt  []string `mapstructure:"decrypt"` // SKIs and labels of keys with which clients may decrypt
}

// SandboxConfig says what the worker processes of a token may do.
type SandboxConfig struct {
	Mode       string   `mapstructure:"mode"`
	ReadPaths  []string `mapstructure:"read_paths"`
	WritePaths []string `mapstructure:"write_paths"`
	Network    bool     `mapstructure:"network"`
	MaxMemory  string   `mapstructure:"max_memory"`
}

// TransitConfig names a mount of the Transit engine of Vault or OpenBao.
type TransitConfig struct {
	Address   string             `mapstructure:"address"`
	Mount     string             `mapstructure:"mount"`
	Namespace string             `mapstructure:"namespace"`
	Keys      []TransitKeyConfig `mapstructure:"keys"`
	Auth      TransitAuthConfig  `mapstructure:"auth"`
	TLS       TransitTLSConfig   `mapstructure:"tls"`
	Batch     int                `mapstructure:"batch"`
	InFlight  int                `mapstructure:"in_flight"`
	Timeout   time.Duration      `mapstructure:"timeout"`

	Weight   int `mapstructure:"weight"`
	Priority int `mapstructure:"priority"`
	Queue    int `mapstructure:"queue"`
}

// TransitKeyConfig names a key of the engine.
type TransitKeyConfig struct {
	Name    string `mapstructure:"name"`
	Version int    `mapstructure:"version"` // 0: the latest
}

// TransitAuthConfig says how to log in. Secrets are in files.
type TransitAuthConfig struct {
	Method          string `mapstructure:"method"`
	TokenFile       string `mapstructure:"token_file"`
	RoleIDFile      string `mapstructure:"role_id_file"`
	SecretIDFile    string `mapstructure:"secret_id_file"`
	SecretIDWrapped bool   `mapstructure:"secret_id_wrapped"`
	Role            string `mapstructure:"role"`
	JWTFile         string `mapstructure:"jwt_file"`
	Mount           string `mapstructure:"mount"`
}

// TransitTLSConfig says how to know the server, and by what it knows the key server.
type TransitTLSConfig struct {
	CA         string `mapstructure:"ca"`
	Cert       string `mapstructure:"cert"`
	Key        string `mapstructure:"key"`
	ServerName string `mapstructure:"server_name"`
}

// FileKeyConfig names one private key in a file.
type FileKeyConfig struct {
	Path    string `mapstructure:"path"`
	Decrypt bool   `mapstructure:"decrypt"`
}

// HomesConfig says how operations are spread over the homes of a key.
type HomesConfig struct {
	HedgePercentile float64       `mapstructure:"hedge_percentile"` // of the observed latency; 0: no second attempt beside the first
	HedgeBudget     float64       `mapstructure:"hedge_budget"`     // share of the operations
	BreakerFailures int           `mapstructure:"breaker_failures"` // in a row
	BreakerMinOpen  time.Duration `mapstructure:"breaker_min_open"`
	BreakerMaxOpen  time.Duration `mapstructure:"breaker_max_open"`
}

// LegacyConfig holds the server's own switches for what old clients need, besides the rules.
type LegacyConfig struct {
	SHA1    bool `mapstructure:"sha1"`
	MD5SHA1 bool `mapstructure:"md5sha1"`
	Decrypt bool `mapstructure:"decrypt"`
}

// AuditConfig says where the record of private-key operations is kept.
type AuditConfig struct {
	Mode        string        `mapstructure:"mode"` // empty: best-effort with a directory, else off
	Dir         string        `mapstructure:"dir"`
	KeyFile     string        `mapstructure:"key_file"`
	Key         string        `mapstructure:"key"` // SKI or label
	Checkpoint  time.Duration `mapstructure:"checkpoint"`
	RotateSize  string        `mapstructure:"rotate_size"`
	RotateEvery time.Duration `mapstructure:"rotate_every"`
	Syslog      string        `mapstructure:"syslog"`
	JSONL       string        `mapstructure:"jsonl"`
}

// ProbeConfig says how often each key signs in each of its homes for /readyz.
type ProbeConfig struct {
	Interval time.Duration `mapstructure:"interval"`
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
		Listen:  ":2407",
		Homes:   HomesConfig{HedgePercentile: 0.95, HedgeBudget: 0.05, BreakerFailures: 5, BreakerMinOpen: time.Second, BreakerMaxOpen: 30 * time.Second},
		Audit:   AuditConfig{Checkpoint: time.Minute, RotateSize: "64MiB", RotateEvery: 24 * time.Hour},
		Probe:   ProbeConfig{Interval: time.Minute},
		Tracing: tracing.Defaults(),
		Limits:  LimitsConfig{Connections: 1024, ConnectionsPerClient: 64, InFlight: 1024},
		Timeouts: TimeoutsConfig{
			Handshake: 5 * time.Second, Idle: time.Minute, Header: 5 * time.Second, Body: 10 * time.Second,
			Write: 10 * time.Second, Operation: 10 * time.Second, Drain: 10 * time.Second,
		},
	}
}

// loadOptions say where the configuration comes from.
type loadOptions struct {
	path   string
	flags  *pflag.FlagSet
	quotas *signer.Quotas // what clients have used so far; nil: nothing
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
