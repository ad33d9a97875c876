//go:build netns

package integration

import (
	"encoding/json"
	"testing"
)

// A tunnelConfig is what the edge tells of a tunnel's ingress rules.
type tunnelConfig struct {
	Version    uint64
	Connectors []struct {
		Connector        string
		Applied, Refused uint64
		Error            string
	}
}

func (w *world) tunnelConfig(t *testing.T, edge int, tunnel string) (v tunnelConfig) {
	t.Helper()
	out, err := w.EdgeAt(t.Context(), edge, "tunnel", "config", "get", tunnel, "--output", "json")
	must(t, err)
	must(t, json.Unmarshal([]byte(out), &v))
	return v
}
