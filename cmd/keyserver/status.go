package main

import (
	"context"
	"time"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/pkcs11/worker"
	"github.com/keyhaven/keyhaven/signer"
	"github.com/keyhaven/keyhaven/signer/audit"
)

// A status is how the server is, for commands.
type status struct {
	Version  string        `json:"version"`
	Identity string        `json:"identity"`
	Started  time.Time     `json:"started"`
	Ready    bool          `json:"ready"`
	Reasons  []string      `json:"reasons,omitempty"`  // why it is not ready
	Degraded []string      `json:"degraded,omitempty"` // what does not work while it is
	Homes    []homeStatus  `json:"homes"`
	Keys     []keyStatus   `json:"keys"`
	Policy   policyStatus  `json:"policy"`
	Audit    *auditStatus  `json:"audit,omitempty"` // nil: off
	Reload   *reloadReport `json:"reload,omitempty"`
}

// A homeStatus is how a place of keys is.
type homeStatus struct {
	Name     string           `json:"name"`
	Kind     string           `json:"kind"`  // token, transit or files
	State    string           `json:"state"` // open, away (it is tried again), stopped (until an operator acts) or refused (the PIN, or a login; what is logged in goes on)
	Config   string           `json:"config"`
	Error    string           `json:"error,omitempty"`
	Faults   []string         `json:"faults,omitempty"` // of single keys
	Keys     int              `json:"keys"`
	Weight   int              `json:"weight"`
	Priority int              `json:"priority"`
	Lane     *laneStatus      `json:"lane,omitempty"`
	Workers  []workerStatus   `json:"workers,omitempty"`
	Restarts int64            `json:"restarts"`
	Kills    map[string]int64 `json:"kills,omitempty"`
	Expires  time.Time        `json:"expires,omitzero"` // of a login
}

// A laneStatus is how the way into a place is.
type laneStatus struct {
	Capacity  int           `json:"capacity"`
	Limit     int           `json:"limit"` // below the capacity while the place throttles
	InFlight  int           `json:"in_flight"`
	Waiting   int           `json:"waiting"`
	Breaker   string        `json:"breaker"`
	Done      uint64        `json:"done"`
	Failed    uint64        `json:"failed"`
	Throttled uint64        `json:"throttled"`
	Failovers uint64        `json:"failovers"`
	Hedges    uint64        `json:"hedges"`
	Refused   uint64        `json:"refused"`
	P50       time.Duration `json:"p50_ns"`
	P99       time.Duration `json:"p99_ns"`
}

func laneStatusOf(s signer.LaneStats) *laneStatus {
	return &laneStatus{s.Capacity, s.Limit, s.InFlight, s.Waiting, s.Breaker, s.Done, s.Failed, s.Throttled, s.Failovers, s.Hedges,
		s.Refused.Overloaded + s.Refused.Deadline + s.Refused.Open, s.Latency.P50, s.Latency.P99}
}

// A workerStatus is how a worker process is.
type workerStatus struct {
	PID       int    `json:"pid"`
	State     string `json:"state"`
	InFlight  int    `json:"in_flight"`
	Restarts  int64  `json:"restarts"`
	LastError string `json:"last_error,omitempty"`
}

// A keyStatus is a key with what its last probes said.
type keyStatus struct {
	SKI    string        `json:"ski"`
	Type   string        `json:"type"`
	Labels []string      `json:"labels"`
	Homes  []probeStatus `json:"homes"`
}

// A probeStatus is what the last probe of a key in a home said.
type probeStatus struct {
	Home  string        `json:"home"`
	OK    bool          `json:"ok"`
	Error string        `json:"error,omitempty"`
	At    time.Time     `json:"at,omitzero"` // zero: not yet
	Took  time.Duration `json:"took_ns"`
}

type policyStatus struct {
	Rules   int `json:"rules"`
	Clients int `json:"clients"`
}

// An auditStatus is how the audit is.
type auditStatus struct {
	Mode           string    `json:"mode"`
	Dir            string    `json:"dir"`
	Error          string    `json:"error,omitempty"`            // why records cannot be kept
	CheckpointErr  string    `json:"checkpoint_error,omitempty"` // why the last checkpoint failed
	File           string    `json:"file"`
	Records        uint64    `json:"records"`
	Lost           uint64    `json:"lost"`
	Waiting        int       `json:"waiting"`
	Last           uint64    `json:"last"`    // number of the last durable line
	Covered        uint64    `json:"covered"` // number of the last line under a checkpoint
	LastCheckpoint time.Time `json:"last_checkpoint,omitzero"`
}

func (a *auditStatus) take(s *audit.Stats) {
	a.File, a.Records, a.Lost, a.Waiting = s.File, s.Records, s.Lost, s.Waiting
	a.Last, a.Covered, a.LastCheckpoint, a.CheckpointErr = s.Seq, s.Covered, s.LastCheckpoint, s.CheckpointErr
}

func (s *server) status(ctx context.Context) status {
	l := s.current.Load()
	st := status{Version: cli.Version(), Identity: l.source.Identity().String(), Started: s.started, Reload: s.last.Load(),
		Policy: policyStatus{len(l.cfg.Clients), len(clientIDs(l.plan))}}
	err := s.ready(ctx)
	if st.Ready, st.Reasons = err == nil, lines(err); st.Ready {
		st.Degraded = s.degraded()
	}
	for _, p := range s.keys.present() {
		st.Homes = append(st.Homes, s.homeStatus(p))
	}
	results, _, _ := s.probes.all()
	for _, e := range s.keys.registry.Entries() {
		k := keyStatus{SKI: e.SKI.String(), Type: e.Type, Labels: e.Labels}
		for _, t := range targetsOf(e) {
			r, ok := results[t.probeID]
			h := probeStatus{Home: t.home, OK: ok && r.Err == nil, At: r.At, Took: r.Took}
			if r.Err != nil {
				h.Error = r.Err.Error()
			}
			k.Homes = append(k.Homes, h)
		}
		st.Keys = append(st.Keys, k)
	}
	if c := l.cfg.Audit; c.mode() != "off" {
		st.Audit = &auditStatus{Mode: c.mode(), Dir: c.Dir}
		if stats := s.auditor.stats(); stats != nil {
			st.Audit.take(stats)
		}
		if err := s.auditor.trouble(); err != nil {
			st.Audit.Error = err.Error()
		}
	}
	return st
}

func (s *server) homeStatus(p *place) homeStatus {
	h := homeStatus{Name: p.name, Kind: p.kind, State: p.state(), Config: p.at, Keys: len(p.homes), Weight: max(p.weight, 1), Priority: p.priority}
	if p.err != nil {
		h.Error = p.err.Error()
	}
	for _, err := range p.faults {
		h.Faults = append(h.Faults, err.Error())
	}
	if l := s.keys.laneOf(p); l != nil {
		h.Lane = laneStatusOf(l.Stats())
	}
	switch b := p.backend.(type) {
	case *worker.Pool:
		stats := b.Stats()
		h.Restarts, h.Kills = stats.Restarts, stats.Kills
		for _, w := range stats.Workers {
			h.Workers = append(h.Workers, workerStatus(w))
		}
	case interface{ Expires() time.Time }:
		h.Expires = b.Expires()
	}
	return h
}
