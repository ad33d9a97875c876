package keyless

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"strings"

	"go.opentelemetry.io/otel/trace"
)

// Bounds of what is read and written of a trace.
const (
	maxTrace      = 1 << 10 // bytes of item 0x15 that are looked at; most of it would be baggage
	maxContext    = 4 << 10 // bytes of item 0x16 that are looked at
	maxRequestID  = 128     // bytes of a request id that are kept
	maxTraceState = 256     // bytes of a tracestate that are sent

	// jaegerSize is the length of a trace context without baggage:
	//
	//	trace id high u64 | trace id low u64 | span id u64 | parent id u64 | flags u8 | baggage items u32
	jaegerSize = 37
)

// traceContext is item 0x16 as far as it is about traces. See https://www.w3.org/TR/trace-context/.
type traceContext struct {
	RequestID   string `json:"request_id,omitempty"`
	TraceParent string `json:"traceparent,omitempty"`
	TraceState  string `json:"tracestate,omitempty"`
}

type requestIDKey struct{}

// WithRequestID returns a context with which a [Client] tells servers what the request is called, for their records. Only the first 128
// bytes count, and only printable ASCII.
func WithRequestID(ctx context.Context, id string) context.Context {
	return context.WithValue(ctx, requestIDKey{}, printable(id))
}

// traced returns op, or a copy of it that carries the span context and the request id of ctx. What the caller has set itself stays,
// and an operation that would not fit its packet goes without.
func traced(ctx context.Context, op *Operation) *Operation {
	id, _ := ctx.Value(requestIDKey{}).(string)
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() && id == "" {
		return op
	}
	with := *op
	tc := traceContext{RequestID: id}
	if sc.IsValid() {
		if len(op.TraceContext) == 0 {
			with.TraceContext = appendJaeger(make([]byte, 0, jaegerSize), sc)
		}
		tc.TraceParent = traceParent(sc)
		if state := sc.TraceState().String(); len(state) <= maxTraceState {
			tc.TraceState = state
		}
	}
	if len(op.Context) == 0 {
		with.Context, _ = json.Marshal(tc) // three texts always can be
	}
	if size := with.size(); size+padBlock > MaxBody {
		return op
	}
	return &with
}

// appendJaeger writes the span context in the binary form of Jaeger's clients, which existing servers read.
func appendJaeger(dst []byte, sc trace.SpanContext) []byte {
	id, span := sc.TraceID(), sc.SpanID()
	dst = append(dst, id[:]...)
	dst = append(dst, span[:]...)
	dst = append(dst, make([]byte, 8)...) // no parent: the receiver's parent is the span
	dst = append(dst, byte(sc.TraceFlags()&trace.FlagsSampled))
	return binary.BigEndian.AppendUint32(dst, 0)
}

// traceParent is the text form of a span context, version 00.
func traceParent(sc trace.SpanContext) string {
	id, span := sc.TraceID(), sc.SpanID()
	b := make([]byte, 0, 55)
	b = append(b, "00-"...)
	b = hex.AppendEncode(b, id[:])
	b = append(b, '-')
	b = hex.AppendEncode(b, span[:])
	b = append(b, '-')
	return string(hex.AppendEncode(b, []byte{byte(sc.TraceFlags() & trace.FlagsSampled)}))
}

// Trace returns the span context that the client sent with the operation, as a remote one, and what the client calls the request. Items
// that are too large or not as they should be count as not sent: the span context is then not valid, the id "". The id has at most 128
// bytes of printable ASCII.
func (o *Operation) Trace() (trace.SpanContext, string) {
	var (
		tc trace.SpanContext
		id string
	)
	if n := len(o.Context); n > 0 && n <= maxContext {
		var c traceContext
		if json.Unmarshal(o.Context, &c) == nil {
			tc, id = parseTraceParent(c.TraceParent, c.TraceState), printable(c.RequestID)
		}
	}
	if !tc.IsValid() {
		tc = parseJaeger(o.TraceContext)
	}
	return tc, id
}

// parseJaeger reads what appendJaeger writes. Baggage is not looked at.
func parseJaeger(b []byte) trace.SpanContext {
	if len(b) < jaegerSize || len(b) > maxTrace {
		return trace.SpanContext{}
	}
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID(b[:16]), SpanID: trace.SpanID(b[16:24]),
		TraceFlags: trace.TraceFlags(b[32]) & trace.FlagsSampled, Remote: true,
	})
}

// parseTraceParent reads a traceparent and a tracestate. Later versions than 00 may have more behind another dash.
func parseTraceParent(parent, state string) trace.SpanContext {
	if len(parent) < 55 || len(parent) > maxTrace || parent[2] != '-' || parent[35] != '-' || parent[52] != '-' {
		return trace.SpanContext{}
	}
	version, ok := lowerHex(parent[:2])
	switch {
	case !ok || version[0] == 0xff, version[0] == 0 && len(parent) != 55, len(parent) > 55 && parent[55] != '-':
		return trace.SpanContext{}
	}
	id, err1 := trace.TraceIDFromHex(parent[3:35]) // takes lower case only, and no zeros
	span, err2 := trace.SpanIDFromHex(parent[36:52])
	flags, ok := lowerHex(parent[53:55])
	if err1 != nil || err2 != nil || !ok {
		return trace.SpanContext{}
	}
	ts, _ := trace.ParseTraceState(state) // a bad one is dropped, the parent stays
	return trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: id, SpanID: span, TraceFlags: trace.TraceFlags(flags[0]) & trace.FlagsSampled, TraceState: ts, Remote: true,
	})
}

// lowerHex reads two hex digits.
func lowerHex(s string) (b [1]byte, ok bool) {
	for i := range len(s) {
		if 'A' <= s[i] && s[i] <= 'F' {
			return b, false
		}
	}
	_, err := hex.Decode(b[:], []byte(s))
	return b, err == nil
}

// printable returns the first maxRequestID bytes of s without what is not printable ASCII.
func printable(s string) string {
	if len(s) > maxRequestID {
		s = strings.Clone(s[:maxRequestID]) // without what is behind it
	}
	for i := range len(s) {
		if s[i] < 0x20 || s[i] > 0x7e {
			b := make([]byte, 0, len(s))
			for i := range len(s) {
				if 0x20 <= s[i] && s[i] <= 0x7e {
					b = append(b, s[i])
				}
			}
			return string(b)
		}
	}
	return s
}
