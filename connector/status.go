package connector

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// A SessionState is where one of the sessions stands.
type SessionState string

// The states.
const (
	StateConnecting SessionState = "connecting"
	StateConnected  SessionState = "connected"
	StateStopped    SessionState = "stopped"
)

// A SessionStatus describes one of the sessions that a connector keeps.
type SessionStatus struct {
	Edge    string         `json:"edge"`  // as configured, or as an edge told it
	Index   int            `json:"index"` // among all sessions of the connector
	Role    string         `json:"role"`  // RoleMain or RoleBulk
	State   SessionState   `json:"state"`
	Since   time.Time      `json:"since,omitzero"`    // when the state began
	Remote  netip.AddrPort `json:"remote,omitzero"`   // of the edge, while connected
	Peer    string         `json:"peer,omitempty"`    // the edge's identity, while connected
	Carrier string         `json:"carrier,omitempty"` // CarrierQUIC or CarrierTCP, while connected
	RTT     time.Duration  `json:"rtt,omitempty"`     // in nanoseconds, while connected
	Flows   int            `json:"flows"`
	Err     error          `json:"-"`                // why the last attempt failed or the last session ended, while not connected
	Error   string         `json:"error,omitempty"`  // Err as text
	Remedy  string         `json:"remedy,omitempty"` // what a person has to do
}

// A Status describes a connector.
type Status struct {
	Identity      string          `json:"identity"`
	Instance      string          `json:"instance"` // of this process
	Version       string          `json:"version"`
	Up            time.Time       `json:"up,omitzero"`    // since when there has been at least one session; zero: there is none
	Edges         []string        `json:"edges"`          // that are dialled
	ConfigVersion uint64          `json:"config_version"` // of the remote configuration in force; zero: none
	Flows         int             `json:"flows"`
	MaxFlows      int             `json:"max_flows"`
	VNets         []VNetFlows     `json:"vnets,omitempty"`  // with a limit of their own
	Device        *DeviceStatus   `json:"device,omitempty"` // nil: no agent has reported
	Sessions      []SessionStatus `json:"sessions"`         // main ones in the order of their indexes, then bulk ones
}

// Status describes the connector as it is now.
func (c *Connector) Status() Status {
	st := Status{Identity: c.cfg.Identity.Identity().String(), Instance: c.registration.Instance, Version: c.cfg.Version,
		VNets: c.flows.limited(), ConfigVersion: c.configVersion(), Device: c.device.status()}
	st.Flows, st.MaxFlows = c.flows.total()
	c.mu.Lock()
	defer c.mu.Unlock()
	st.Up = c.up
	var bulk []SessionStatus
	for _, e := range c.endpoints {
		st.Edges = append(st.Edges, e.name)
		for _, l := range e.lines {
			st.Sessions = append(st.Sessions, l.snapshot())
		}
		bulk = append(bulk, e.bulk.status()...)
	}
	st.Sessions = append(st.Sessions, bulk...)
	return st
}

// Summary is a line about the sessions for people.
func (c *Connector) Summary() string {
	up, all := 0, 0
	var why error
	st := c.Status()
	for _, s := range st.Sessions {
		if s.Role != RoleMain {
			continue
		}
		all++
		if s.State == StateConnected {
			up++
		} else if s.Err != nil {
			why = fmt.Errorf("%s: %w", s.Edge, s.Err)
		}
	}
	line := fmt.Sprintf("%d of %d sessions, %d flows", up, all, st.Flows)
	if up == 0 && why != nil {
		line = "no session: " + strings.ReplaceAll(why.Error(), "\n", "; ")
	}
	return line
}

// began is what times are measured from that no change of the clock may touch.
var began = time.Now()

// beatTimeout is how long the loop that arranges the sessions, and comes round every arrangeEvery, may stand still.
const beatTimeout = 20 * time.Second

// Alive returns an error if, while Run runs, a part of the connector does not go on: a lock is not given back before ctx ends, or
// the loop that arranges the sessions stands still. That no edge answers is no such fault.
func (c *Connector) Alive(ctx context.Context) error {
	answered := make(chan struct{})
	go func() { // left behind if a lock is not given back; the process is to be ended then
		defer close(answered)
		c.Status()
		c.flows.len()
	}()
	select {
	case <-answered:
	case <-ctx.Done():
		return errors.New("a lock is not given back")
	}
	if beat := time.Duration(c.beat.Load()); beat != 0 && time.Since(began)-beat > beatTimeout {
		return fmt.Errorf("the loop that arranges the sessions stands still for %v", time.Since(began)-beat)
	}
	return nil
}

// configVersion is the version of the remote configuration in force.
func (c *Connector) configVersion() uint64 {
	if c.cfg.Ingress == nil {
		return 0
	}
	return c.cfg.Ingress.Version()
}

// Degraded says, a line each, which of the sessions that the connector keeps are not up, and why.
func (c *Connector) Degraded() (list []string) {
	for _, s := range c.Status().Sessions {
		if s.Role != RoleMain || s.State == StateConnected {
			continue
		}
		line := fmt.Sprintf("session %d to %s is not up", s.Index, s.Edge)
		if s.Error != "" {
			line += ": " + s.Error
		}
		list = append(list, strings.ReplaceAll(line, "\n", "; "))
	}
	return list
}
