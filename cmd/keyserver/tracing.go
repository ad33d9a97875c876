package main

import (
	"context"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/keyless"
)

// A traced handler makes a span of each operation, below the one that the client carries with it. No span holds what is
// signed, decrypted or sealed.
type traced struct {
	next   keyless.Handler
	tracer trace.Tracer
}

// Handle implements keyless.Handler.
func (t traced) Handle(ctx context.Context, req *keyless.Request) ([]byte, error) {
	parent, requestID := req.Trace()
	if parent.IsValid() {
		ctx = trace.ContextWithRemoteSpanContext(ctx, parent)
	}
	ctx, span := t.tracer.Start(ctx, "keyless "+req.Opcode.String(), trace.WithSpanKind(trace.SpanKindServer))
	defer span.End()
	if span.IsRecording() {
		span.SetAttributes(attribute.String("keyhaven.peer", req.Peer.ID), attribute.String("keyhaven.sni", req.SNI))
		if !req.SKI.IsZero() {
			span.SetAttributes(attribute.String("keyhaven.key_ski", req.SKI.String()))
		}
		if requestID != "" {
			span.SetAttributes(attribute.String("keyhaven.request_id", requestID))
		}
	}
	out, err := t.next.Handle(ctx, req)
	if err != nil {
		span.SetStatus(codes.Error, err.Error()) // a code of the protocol, which the client gets as well
	}
	return out, err
}
