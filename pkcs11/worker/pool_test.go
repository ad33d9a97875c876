package worker

import (
	"testing"
)

func TestPoolSigns(t *testing.T) {
	st := makeToken(t, "p256", "rsa2048", "ed25519")
	for _, mode := range []string{SandboxOff, SandboxBasic, SandboxStrict} {
		t.Run(mode, func(t *testing.T) {
			p := openPool(t, st, func(c *Config) {
				c.Sandbox.Mode = mode
				c.Sandbox.ReadPaths, c.Sandbox.WritePaths = []string{st.Conf}, []string{st.Dir + "/tokens"}
			})
			if p.Name() != st.Label {
				t.Errorf("Name() = %q, want %q", p.Name(), st.Label)
			}
			keys := keysOf(t, p)
			if len(keys) != 3 {
				t.Fatalf("got %d keys, want 3", len(keys))
			}
			for _, k := range keys {
				mustSign(t, k)
			}
			eventually(t, "all workers", func() bool { return p.Workers() == DefaultWorkers })
			if err := p.Check(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}
