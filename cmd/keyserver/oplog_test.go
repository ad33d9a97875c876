package main

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

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

// TestManyFailures: what one client has refused by the thousand does not drown the log, if the audit log keeps it.
func TestManyFailures(t *testing.T) {
	for _, tt := range []struct {
		audited bool
		want    int
	}{{true, failureLines + 1}, {false, 1001}} {
		synctest.Test(t, func(t *testing.T) {
			var out bytes.Buffer
			l := newOperationLog(slog.New(slog.NewTextHandler(&out, nil)), func() bool { return tt.audited })
			ended, end := context.WithCancel(t.Context())
			end()
			record := func(n int, peer string) {
				for range n {
					l.Record(signer.Record{Op: "sign", Peer: peer, Result: signer.ResultRefused, Cause: signer.CauseRate})
				}
				l.queue.Run(ended)
			}
			record(1000, "loud")
			record(1, "other")
			if got := strings.Count(out.String(), "\n"); got != tt.want {
				t.Errorf("audit %v: got %d lines, want %d", tt.audited, got, tt.want)
			}
			out.Reset()
			time.Sleep(refusalWindow)
			record(1, "loud")
			if told := strings.Contains(out.String(), "left_out=940 "); told != tt.audited {
				t.Errorf("audit %v: got %s", tt.audited, out.String())
			}
		})
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
