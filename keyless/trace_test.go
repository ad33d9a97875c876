package keyless

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"net/netip"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/trace"
)

const (
	traceHex = "0af7651916cd43dd8448eb211c80319c"
	spanHex  = "b7ad6b7169203331"
)

// spanContext is a sampled span context with the tracestate.
func spanContext(state string) trace.SpanContext {
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: must(trace.TraceIDFromHex(traceHex)), SpanID: must(trace.SpanIDFromHex(spanHex)),
		TraceFlags: trace.FlagsSampled, TraceState: must(trace.ParseTraceState(state)),
	})
}

func inSpan(ctx context.Context, state string) context.Context {
	return trace.ContextWithSpanContext(ctx, spanContext(state))
}

// TestTraceOnTheWire holds the bytes that existing servers read: trace id, span id, no parent, sampled, no baggage.
func TestTraceOnTheWire(t *testing.T) {
	op := traced(inSpan(t.Context(), "vendor=1"), &Operation{Opcode: OpPing})
	want := traceHex + spanHex + "0000000000000000" + "01" + "00000000"
	if got := hex.EncodeToString(op.TraceContext); got != want {
		t.Errorf("item 0x15: got %s, want %s", got, want)
	}
	if got, want := string(op.Context), `{"traceparent":"00-`+traceHex+"-"+spanHex+`-01","tracestate":"vendor=1"}`; got != want {
		t.Errorf("item 0x16: got %s, want %s", got, want)
	}
}

// TestTraceReachesServer sends what is in the context, and nothing without anything there: old servers close on tags that they do not know.
func TestTraceReachesServer(t *testing.T) {
	got := make(chan Operation, 1)
	addr, _ := startServer(t, &Server{Handler: handlerFunc(func(_ context.Context, req *Request) ([]byte, error) {
		op := req.Operation
		op.TraceContext, op.Context = bytes.Clone(op.TraceContext), bytes.Clone(op.Context)
		got <- op
		return nil, nil
	})})
	c := startClient(t, ClientConfig{Servers: []string{addr}})
	own := Operation{Opcode: OpSeal, TraceContext: []byte("mine"), Context: []byte(`{"request_id":"mine"}`)}
	tests := []struct {
		name   string
		ctx    context.Context
		op     Operation
		valid  bool
		id     string
		states int
		bare   bool
	}{
		{"nothing", t.Context(), Operation{Opcode: OpSeal}, false, "", 0, true},
		{"span that is not valid", trace.ContextWithSpanContext(t.Context(), trace.SpanContext{}), Operation{Opcode: OpSeal}, false, "", 0, true},
		{"span", inSpan(t.Context(), ""), Operation{Opcode: OpSeal}, true, "", 0, false},
		{"span with state", inSpan(t.Context(), "a=1,b=2"), Operation{Opcode: OpSeal}, true, "", 2, false},
		{"span with more state than is sent", inSpan(t.Context(), "a="+strings.Repeat("x", maxTraceState)), Operation{Opcode: OpSeal}, true, "", 0, false},
		{"request id", WithRequestID(t.Context(), "r-1"), Operation{Opcode: OpSeal}, false, "r-1", 0, false},
		{"both", WithRequestID(inSpan(t.Context(), ""), "r\n-2"), Operation{Opcode: OpSeal}, true, "r-2", 0, false},
		{"own items stay", WithRequestID(inSpan(t.Context(), ""), "other"), own, false, "mine", 0, false},
		{"no room", inSpan(t.Context(), ""), Operation{Opcode: OpSeal, Payload: make([]byte, MaxBody-3*itemHeader-1)}, false, "", 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before := tt.op
			if _, err := c.Do(tt.ctx, &tt.op); err != nil {
				t.Fatal(err)
			}
			op := <-got
			sc, id := op.Trace()
			if sc.IsValid() != tt.valid || id != tt.id || sc.TraceState().Len() != tt.states {
				t.Errorf("got span context %v with %d states, request id %q", sc, sc.TraceState().Len(), id)
			}
			if tt.valid && (sc.TraceID().String() != traceHex || sc.SpanID().String() != spanHex || !sc.IsSampled() || !sc.IsRemote()) {
				t.Errorf("got %+v", sc)
			}
			if bare := op.TraceContext == nil && op.Context == nil; bare != tt.bare {
				t.Errorf("items: got %q and %q", op.TraceContext, op.Context)
			}
			if !bytes.Equal(before.TraceContext, tt.op.TraceContext) || !bytes.Equal(before.Context, tt.op.Context) {
				t.Error("the caller's operation was changed")
			}
		})
	}
}

func TestTraceGarbage(t *testing.T) {
	good := appendJaeger(nil, spanContext(""))
	parent := "00-" + traceHex + "-" + spanHex + "-01"
	object := func(parent string) []byte { return []byte(`{"traceparent":"` + parent + `"}`) }
	tests := []struct {
		name       string
		span, text []byte
		valid      bool
	}{
		{"nothing", nil, nil, false},
		{"binary", good, nil, true},
		{"binary with baggage that is cut off", append(bytes.Clone(good[:36]), 9, 0, 0), nil, true},
		{"binary, one byte short", good[:36], nil, false},
		{"binary, trace id of zeros", append(make([]byte, 16), good[16:]...), nil, false},
		{"binary, span id of zeros", append(append(bytes.Clone(good[:16]), make([]byte, 8)...), good[24:]...), nil, false},
		{"binary, too much", append(bytes.Clone(good), make([]byte, maxTrace)...), nil, false},
		{"text", nil, object(parent), true},
		{"text is broken, binary is good", good, []byte(`{"traceparent":`), true},
		{"text, not an object", nil, []byte(`["` + parent + `"]`), false},
		{"text, not a text", nil, []byte(`{"traceparent":1}`), false},
		{"text, upper case", nil, object(strings.ToUpper(parent)), false},
		{"text, version ff", nil, object("ff" + parent[2:]), false},
		{"text, later version with more", nil, object("01" + parent[2:] + "-x"), true},
		{"text, version 00 with more", nil, object(parent + "-x"), false},
		{"text, later version, no dash", nil, object("01" + parent[2:] + "x"), false},
		{"text, flags are no hex", nil, object(parent[:53] + "0g"), false},
		{"text, upper case flags", nil, object(parent[:53] + "0A"), false},
		{"text, zeros", nil, object("00-" + strings.Repeat("0", 32) + "-" + spanHex + "-01"), false},
		{"text, too long", nil, append(object(parent), bytes.Repeat([]byte{' '}, maxContext)...), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			op := Operation{TraceContext: tt.span, Context: tt.text}
			if sc, _ := op.Trace(); sc.IsValid() != tt.valid {
				t.Errorf("got %+v", sc)
			}
		})
	}
	long := Operation{Context: must(json.Marshal(traceContext{RequestID: strings.Repeat("é\x1b[31m", 100)}))}
	if _, id := long.Trace(); id != strings.Repeat("[31m", 18) { // of the first 128 bytes
		t.Errorf("got request id %q", id)
	}
}

// TestTracePadding holds that a signature request with a trace stays a small packet.
func TestTracePadding(t *testing.T) {
	op := Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign, SKI: SKI{1}, SNI: "www.example.com",
		ClientIP: netip.MustParseAddr("192.0.2.1"), ServerIP: netip.MustParseAddr("192.0.2.2"), Payload: make([]byte, 148)}
	size := func(op *Operation) int {
		p := Packet{Major: major, Operation: *op, Compact: compact(op)}
		return len(must(p.Append(nil)))
	}
	if plain, with := size(&op), size(traced(inSpan(t.Context(), ""), &op)); plain != 256 || with != 384 {
		t.Errorf("got packets of %d and, with a trace, %d bytes; want 256 and 384", plain, with)
	}
	if n := testing.AllocsPerRun(100, func() { traced(context.Background(), &op) }); n != 0 {
		t.Errorf("got %v allocations without a trace, want none", n)
	}
	if n := testing.AllocsPerRun(100, func() { op.Trace() }); n != 0 {
		t.Errorf("got %v allocations for reading no trace, want none", n)
	}
}

// FuzzTrace is a client that sends what it likes as a trace, which goes into records.
func FuzzTrace(f *testing.F) {
	f.Add(appendJaeger(nil, spanContext("")), []byte(`{"request_id":"x","traceparent":"00-`+traceHex+"-"+spanHex+`-01","tracestate":"a=1"}`))
	f.Add([]byte{1}, []byte(`{"request_id":"\u001b[0m"}`))
	f.Fuzz(func(t *testing.T, span, text []byte) {
		op := Operation{TraceContext: span, Context: text}
		sc, id := op.Trace()
		if len(id) > maxRequestID || strings.ContainsFunc(id, func(r rune) bool { return r < 0x20 || r > 0x7e }) {
			t.Errorf("got request id %q", id)
		}
		if !sc.IsValid() {
			return
		}
		again := parseJaeger(appendJaeger(nil, sc))
		text2 := parseTraceParent(traceParent(sc), sc.TraceState().String())
		if !again.Equal(sc.WithTraceState(trace.TraceState{})) || text2.TraceID() != sc.TraceID() || text2.SpanID() != sc.SpanID() || text2.TraceFlags() != sc.TraceFlags() {
			t.Errorf("got %+v, and read again %+v and %+v", sc, again, text2)
		}
	})
}
