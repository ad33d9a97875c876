package main

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// TestOperationLines: while there is an audit, what succeeds is logged for whoever asks for level debug; what does not succeed always is.
func TestOperationLines(t *testing.T) {
	for _, tt := range []struct {
		name    string
		level   slog.Level
		audited bool
		want    string
	}{
		{"without an audit", slog.LevelInfo, false, "INFO ok, WARN refused, WARN failed"},
		{"with an audit", slog.LevelInfo, true, "WARN refused, WARN failed"},
		{"with an audit and all details", slog.LevelDebug, true, "DEBUG ok, WARN refused, WARN failed"},
		{"warnings alone", slog.LevelWarn, false, "WARN refused, WARN failed"},
	} {
		var out bytes.Buffer
		plain := slog.HandlerOptions{Level: tt.level, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.LevelKey || a.Key == "result" {
				return a
			}
			return slog.Attr{}
		}}
		l := newOperationLog(slog.New(slog.NewTextHandler(&out, &plain)), func() bool { return tt.audited })
		for _, r := range []signer.Result{signer.ResultOK, signer.ResultRefused, signer.ResultFailed} {
			l.Record(signer.Record{Op: "sign", Result: r})
		}
		ended, end := context.WithCancel(t.Context())
		end()
		l.queue.Run(ended)
		got := strings.NewReplacer("level=", "", "result=", "", "\n", ", ").Replace(strings.TrimSpace(out.String()))
		if got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.name, got, tt.want)
		}
	}
}

// TestAuditedOperations has a server log what the audit log of it does not say.
func TestAuditedOperations(t *testing.T) {
	s, cfg, key := auditSite(t, "best-effort")
	p := s.start(cfg)
	c := p.client("one")
	if _, err := do(t, c, signOp(key)); err != nil {
		t.Fatal(err)
	}
	if _, err := do(t, c, signOp(keyless.SKI{1})); err == nil {
		t.Error("a key that is not there signed")
	}
	if line := p.wait("operation"); line["result"] != "refused" {
		t.Errorf("got %v, want the line of the refused operation first", line)
	}
	p.stop()
	if n := p.count("operation"); n != 1 {
		t.Errorf("got %d lines of operations, want that of the refused one", n)
	}
}
