package main

import (
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestOperationLines: with an audit, what succeeds is logged for whoever asks for level debug; what is refused always is.
func TestOperationLines(t *testing.T) {
	for _, tt := range []struct {
		name, mode string
		flags      []string
		damaged    bool
		want       string // levels of the line of an operation that succeeds
	}{
		{name: "without an audit", mode: "off", want: "[INFO]"},
		{name: "with an audit", mode: "best-effort", want: "[]"},
		{name: "with an audit and all details", mode: "best-effort", flags: []string{"--log-level", "debug"}, want: "[DEBUG]"},
		{name: "with an audit that is out of order", mode: "best-effort", damaged: true, want: "[INFO]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, cfg, key := auditSite(t, tt.mode)
			if tt.damaged {
				s.write("audit", 0o600, "a file where the directory should be")
			}
			p := s.start(cfg, tt.flags...)
			c := p.client("one")
			if _, err := do(t, c, signOp(key)); err != nil {
				t.Fatal(err)
			}
			if _, err := do(t, c, signOp(keyless.SKI{1})); err == nil {
				t.Error("a key that is not there signed")
			}
			p.stop()
			if got := p.levels("ok"); got != tt.want {
				t.Errorf("the operation that succeeded is logged on levels %s, want %s", got, tt.want)
			}
			if got := p.levels("refused"); got != "[WARN]" {
				t.Errorf("the operation that was refused is logged on levels %s, want [WARN]", got)
			}
		})
	}
}

// levels returns the levels of the lines about operations with the result.
func (p *program) levels(result string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []string
	for _, l := range p.lines {
		if l["msg"] == "operation" && l["result"] == result {
			all = append(all, l["level"].(string))
		}
	}
	return "[" + strings.Join(all, " ") + "]"
}
