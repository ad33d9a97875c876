package control

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/state"
)

// A TunnelConfig is the ingress configuration that every edge hands to the connectors of a tunnel.
type TunnelConfig struct {
	Tunnel  string          `json:"tunnel"`  // id
	Version uint64          `json:"version"` // rises with each change; 0: there has never been one
	Body    json.RawMessage `json:"body"`    // see ingressconf.Canonical; {} leaves the connectors to their own files
	Updated time.Time       `json:"updated,omitzero"`
}

// TunnelConfigView is a tunnel's configuration as shown.
type TunnelConfigView struct {
	TunnelConfig
	TunnelName string                `json:"tunnel_name"`
	Connectors []ConnectorConfigView `json:"connectors"` // those with a session at this edge
}

// ConnectorConfigView says how a connector took the configurations of its tunnel.
type ConnectorConfigView struct {
	Connector string `json:"connector"` // name
	ConnectorConfig
}

// ConnectorConfig is what an edge knows of a connector's configuration.
type ConnectorConfig struct {
	Applied uint64 `json:"applied"`           // version that this edge knows to be in force; 0: none
	Refused uint64 `json:"refused,omitempty"` // version that the connector refused last; 0: none since Applied
	Error   string `json:"error,omitempty"`   // why it did
}

// emptyConfig is the body that takes a configuration back.
var emptyConfig = json.RawMessage("{}")

// TunnelConfig returns the configuration of the tunnel ref, a name or id.
func (c *Control) TunnelConfig(ref string) (TunnelConfigView, error) {
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	t, err := m.tunnelLocked(ref)
	if err != nil {
		return TunnelConfigView{}, err
	}
	v := TunnelConfigView{TunnelConfig: m.configLocked(t.ID), TunnelName: t.Name, Connectors: []ConnectorConfigView{}}
	for _, k := range c.connectorViewsLocked(m.connectorsOfTunnel[t.ID]) {
		if k.Config != nil {
			v.Connectors = append(v.Connectors, ConnectorConfigView{k.Name, *k.Config})
		}
	}
	return v, nil
}

func (m *model) configLocked(tunnelID string) TunnelConfig {
	if cfg, ok := m.configs[tunnelID]; ok {
		return cfg
	}
	return TunnelConfig{Tunnel: tunnelID, Body: emptyConfig}
}

// SetTunnelConfig makes body, YAML or JSON as [ingressconf.ParseRemote] takes it, the configuration of the tunnel ref and
// raises its version by one. An empty body takes the configuration back. A body that means nothing new changes nothing. If
// ifVersion is not nil, it must be the current version, or the error is [ErrStale]. A faulty body is [ErrInvalid]; nothing
// of it is taken.
func (c *Control) SetTunnelConfig(ctx context.Context, ref string, body []byte, ifVersion *uint64) (TunnelConfigView, error) {
	if err := need("a tunnel", ref); err != nil {
		return TunnelConfigView{}, err
	}
	doc := emptyConfig
	if len(bytes.TrimSpace(body)) > 0 {
		var err error
		if doc, err = ingressconf.Canonical(body); err != nil {
			return TunnelConfigView{}, refusal(CodeInvalid, "", "the configuration is not taken:\n%v", err)
		}
	}
	err := c.change(ctx, func(m *model) ([]state.Op, error) {
		t, err := m.tunnelLocked(ref)
		if err != nil {
			return nil, err
		}
		old := m.configLocked(t.ID)
		if ifVersion != nil && *ifVersion != old.Version {
			return nil, refusal(CodeStale, "read it again and repeat the change on what is there now",
				"the configuration of tunnel %q has version %d, not %d", t.Name, old.Version, *ifVersion)
		}
		if bytes.Equal(old.Body, doc) {
			return nil, nil
		}
		next := TunnelConfig{Tunnel: t.ID, Version: old.Version + 1, Body: doc, Updated: c.now()}
		return []state.Op{put(prefixConfig+t.ID, next)}, nil
	})
	if err != nil {
		return TunnelConfigView{}, err
	}
	v, err := c.TunnelConfig(ref)
	if err == nil {
		c.log.Info("tunnel configuration set", "tunnel", v.TunnelName, "version", v.Version)
	}
	return v, err
}

// configures reports whether a record is one that connectors are told.
func configures(d delta) bool { return strings.HasPrefix(d.key, prefixConfig) }
