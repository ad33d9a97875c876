package worker

import (
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// Defaults of Config's fields.
const (
	DefaultWorkers       = 2
	DefaultSessions      = 8 // for each worker: with two, what a network HSM needs to be busy
	DefaultDeadline      = 5 * time.Second
	DefaultStartDeadline = 30 * time.Second
	DefaultKeepAlive     = 30 * time.Second
	DefaultRestartMin    = 250 * time.Millisecond
	DefaultRestartMax    = 30 * time.Second
	DefaultMaxMemory     = 1 << 30 // bytes, and sessionMemory for each session
	DefaultMaxFiles      = 1024
)

// sessionMemory is what the default limit of memory leaves for each session: a thread's stack, of which the whole counts, and what the
// C library's allocator keeps for it.
const sessionMemory = 16 << 20

// maxWorkers bounds Config.Workers.
const maxWorkers = 64

// Values of Config.OnLoss.
const (
	Move = "move" // what a lost worker held is done again by another; if there is none, it fails as signer.ErrUnavailable
	Fail = "fail" // what a lost worker held fails as ErrLost, which no other home takes over
)

// Config says which token the workers serve and how they run. Open does not modify it.
type Config struct {
	// Token names the token, as pkcs11.Open takes it. The PIN is read in this process, once for Open and once for each Retry.
	// Sessions holds for each worker; if zero, DefaultSessions.
	Token pkcs11.Config
	// Workers is the number of processes. If zero, DefaultWorkers.
	Workers int
	// Deadline is how long the module may hold one operation, counted from when a worker took it up. A worker that is past
	// it is killed and replaced. If zero, DefaultDeadline.
	Deadline time.Duration
	// StartDeadline is how long a worker may take from its start to its login. If zero, DefaultStartDeadline.
	StartDeadline time.Duration
	// KeepAlive is how often a worker without work asks the token whether the login stands, and renews it if not. If zero,
	// DefaultKeepAlive; if negative, never.
	KeepAlive time.Duration
	// Restart bounds the pause before a worker is started again that did not start, or did not live for Restart.Max. Zero values
	// are DefaultRestartMin and DefaultRestartMax.
	Restart Restart
	// OnLoss is what becomes of the operations that a lost worker held: Move or Fail. If empty, Move.
	OnLoss string
	// Sandbox is what confines the workers.
	Sandbox Sandbox
	// Command is what runs a worker: a program that calls Main. If empty, this program's own executable with the one argument
	// "worker".
	Command []string
	// Logger receives what operators need to know. If nil, nothing is logged.
	Logger *slog.Logger
}

// Restart bounds the pauses between starts of a worker.
type Restart struct{ Min, Max time.Duration }

// Modes of a Sandbox.
const (
	SandboxOff    = "off"
	SandboxBasic  = "basic"
	SandboxStrict = "strict"
)

// Sandbox confines workers by what Linux offers to processes without privileges. The zero value is SandboxBasic with its defaults.
type Sandbox struct {
	// Mode is SandboxOff; SandboxBasic: no new privileges, limits of memory and descriptors, no core dumps, no access by other
	// processes of the user; or SandboxStrict: besides, Landlock leaves only the files named here and those of the system's
	// libraries, and seccomp takes away system calls that no module needs. If empty, SandboxBasic.
	Mode string
	// ReadPaths and WritePaths are files and directories that the module reads, or reads and writes. Strict only.
	// What is not there is left out.
	ReadPaths, WritePaths []string
	// Network leaves the module the Internet's sockets. Unix sockets that have a path are open to it either way. Strict only.
	Network bool
	// MaxMemory is how much a worker may allocate, in bytes. If zero, DefaultMaxMemory and 16 MiB for each session; if negative, no limit.
	// The stacks of threads count, 8 MiB each as a rule, and each session is a thread.
	MaxMemory int64
	// MaxFiles is how many descriptors a worker may have. If zero, DefaultMaxFiles.
	MaxFiles int
}

// withDefaults returns the configuration with its zero values filled in, or what is wrong with it.
func (c Config) withDefaults() (Config, error) {
	switch {
	case c.Workers < 0 || c.Workers > maxWorkers:
		return c, fmt.Errorf("%d workers: give 1 to %d, or 0 for %d", c.Workers, maxWorkers, DefaultWorkers)
	case c.Deadline < 0 || c.StartDeadline < 0 || c.Restart.Min < 0 || c.Restart.Max < 0:
		return c, errors.New("a negative duration for deadline, start deadline or restart: give a positive one, or 0 for the default")
	case c.OnLoss != "" && c.OnLoss != Move && c.OnLoss != Fail:
		return c, fmt.Errorf("on loss %q: give %q or %q", c.OnLoss, Move, Fail)
	}
	if err := c.Sandbox.check(); err != nil {
		return c, err
	}
	fill(&c.Workers, DefaultWorkers)
	fill(&c.Deadline, DefaultDeadline)
	fill(&c.StartDeadline, DefaultStartDeadline)
	fill(&c.KeepAlive, DefaultKeepAlive)
	fill(&c.Restart.Min, DefaultRestartMin)
	fill(&c.Restart.Max, max(DefaultRestartMax, c.Restart.Min))
	fill(&c.OnLoss, Move)
	fill(&c.Sandbox.Mode, SandboxBasic)
	fill(&c.Token.Sessions, DefaultSessions)
	fill(&c.Sandbox.MaxMemory, DefaultMaxMemory+sessionMemory*int64(c.Token.Sessions))
	fill(&c.Sandbox.MaxFiles, DefaultMaxFiles)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c, nil
}

func fill[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

func (s *Sandbox) check() error {
	switch s.Mode {
	case "", SandboxOff, SandboxBasic, SandboxStrict:
	default:
		return fmt.Errorf("sandbox mode %q: give %q, %q or %q", s.Mode, SandboxOff, SandboxBasic, SandboxStrict)
	}
	if s.MaxFiles < 0 || s.MaxFiles > 0 && s.MaxFiles < 32 {
		return fmt.Errorf("sandbox: %d descriptors: give at least 32, or 0 for %d", s.MaxFiles, DefaultMaxFiles)
	}
	if s.MaxMemory > 0 && s.MaxMemory < 64<<20 {
		return fmt.Errorf("sandbox: %d bytes of memory: give at least 64 MiB, or 0 for the default", s.MaxMemory)
	}
	for _, list := range [][]string{s.ReadPaths, s.WritePaths} {
		for _, path := range list {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("sandbox: path %q is not absolute", path)
			}
		}
	}
	return nil
}

// Check finds what Open would refuse before it starts a worker, apart from Token, which has a Check of its own.
func (c *Config) Check() error {
	if _, err := c.withDefaults(); err != nil {
		return fmt.Errorf("pkcs11: worker: %w", err)
	}
	return nil
}
