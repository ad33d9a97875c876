package main

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/etcd"
)

// Where the state is unless the configuration says otherwise: the file, and what keys in a cluster begin with.
const (
	defaultState  = "/var/lib/keyhaven/edge/state.db"
	defaultPrefix = "/keyhaven/"
)

// stateConfig says where routes, connectors and ticket keys are kept: in a file, for one edge, or in etcd, for several.
type stateConfig struct {
	File string     `mapstructure:"file"`
	Etcd etcdConfig `mapstructure:"etcd"`
}

type etcdConfig struct {
	Endpoints    []string      `mapstructure:"endpoints"`     // client URLs of the members
	Prefix       string        `mapstructure:"prefix"`        // of the installation's keys
	CA           string        `mapstructure:"ca"`            // file, PEM
	Cert         string        `mapstructure:"cert"`          // file, PEM
	Key          string        `mapstructure:"key"`           // file, PEM
	Username     string        `mapstructure:"username"`      // of a cluster with users
	PasswordFile string        `mapstructure:"password_file"` // mode 0600
	Cache        string        `mapstructure:"cache"`         // file to start from while the cluster is away; empty: none
	Timeout      time.Duration `mapstructure:"timeout"`       // of a request, after which the cluster counts as away
}

// shared reports whether other edges may use the same state.
func (s *stateConfig) shared() bool {
	e := s.Etcd
	e.Prefix = "" // has a default
	return len(e.Endpoints) > 0 || e.CA != "" || e.Cert != "" || e.Key != "" || e.Username != "" || e.PasswordFile != "" || e.Cache != ""
}

func (s *stateConfig) validate(errorf func(key, format string, args ...any)) {
	if !s.shared() {
		if s.File == "" {
			errorf("state.file", "is empty; name the file that keeps routes and connectors, or an etcd cluster under state.etcd")
		}
		return
	}
	if s.File != "" && s.File != defaultState {
		errorf("state.file", "is set beside state.etcd; keep the state in one of them")
	}
	if t := s.Etcd.Timeout; t < 100*time.Millisecond || t > time.Minute {
		errorf("state.etcd.timeout", "must lie between 100ms and 1m, have %s", t)
	}
	for _, err := range s.etcd().Check() {
		errorf("state.etcd", "%v", err)
	}
}

func (s *stateConfig) etcd() etcd.Config {
	e := s.Etcd
	return etcd.Config{Endpoints: e.Endpoints, Prefix: e.Prefix, CA: e.CA, Cert: e.Cert, Key: e.Key, Username: e.Username, PasswordFile: e.PasswordFile,
		Timeout: e.Timeout, Cache: e.Cache, Volatile: control.Volatile()}
}

func (s *stateConfig) open(log *slog.Logger) (state.Store, error) {
	if !s.shared() {
		store, err := state.OpenBolt(s.File)
		if err != nil {
			return nil, fmt.Errorf("open the state: %w", err)
		}
		return store, nil
	}
	cfg := s.etcd()
	cfg.Logger = log
	store, err := etcd.Open(cfg)
	if err != nil {
		return nil, fmt.Errorf("open the state: %w", err)
	}
	return store, nil
}
