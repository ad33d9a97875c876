package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/keyless"
)

// TestTracing sends spans to a collector, below the client's, and none that the client does not want.
func TestTracing(t *testing.T) {
	var mu sync.Mutex // guards got
	var got bytes.Buffer
	collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		if _, err := io.Copy(&got, r.Body); err != nil {
			t.Error(err)
		}
	}))
	defer collector.Close()
	s := newSite(t)
	key := mustSKI(t, s.writeKey("filekey.pem"))
	p := s.start(s.write("ks.yaml", 0o600, s.config("tracing: {otlp_endpoint: "+collector.URL+"/v1/traces}\nclients:"+rule("one", "sign"))))
	c := p.client("one")
	if _, err := do(t, c, signOp(key)); err != nil { // connects
		t.Fatal(err)
	}
	canary := bytes.Repeat([]byte("payload!"), 4)
	sign := func(id trace.TraceID, flags trace.TraceFlags) {
		t.Helper()
		ctx := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: id, SpanID: trace.SpanID{7}, TraceFlags: flags}))
		if _, err := c.Do(ctx, &keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: key, Payload: canary, SNI: "traced.example"}); err != nil {
			t.Fatal(err)
		}
	}
	wanted, unwanted := trace.TraceID([]byte("wanted-trace-id!")), trace.TraceID([]byte("unwanted-traceid"))
	sign(wanted, trace.FlagsSampled)
	sign(unwanted, 0)
	if code := p.stop(); code != 0 { // which sends what waits
		t.Errorf("got exit code %d", code)
	}
	mu.Lock()
	defer mu.Unlock()
	text := got.String()
	for _, want := range []string{string(wanted[:]), "keyhaven-keyserver", "spiffe://keys.example/edge/one", "traced.example", key.String()} {
		if !strings.Contains(text, want) {
			t.Errorf("the spans lack %q", want)
		}
	}
	for _, bad := range []string{string(unwanted[:]), string(canary)} {
		if strings.Contains(text, bad) {
			t.Errorf("the spans hold %q", bad)
		}
	}
}

// TestTracingWithoutCollector serves although the spans go nowhere.
func TestTracingWithoutCollector(t *testing.T) {
	s := newSite(t)
	key := mustSKI(t, s.writeKey("filekey.pem"))
	p := s.start(s.write("ks.yaml", 0o600, s.config("tracing: {otlp_endpoint: http://127.0.0.1:1}\nclients:"+rule("one", "sign"))))
	c := p.client("one")
	for range 100 {
		if _, err := do(t, c, signOp(key)); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.stop()
	}()
	<-ended
	if p.count("stopped") != 1 {
		t.Error("the server did not end in order")
	}
}
