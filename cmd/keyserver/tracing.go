package main

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/internal/cli"
	"github.com/keyhaven/keyhaven/keyless"
)

const (
	// spanQueue is how many spans may wait for the collector; further ones are dropped.
	spanQueue = 2048
	// traceTimeout bounds one export, and the last one at the end.
	traceTimeout = 5 * time.Second
)

// A tracer is a handler that makes a span of each operation, below the one that the client carries with it. No span holds
// what is signed, decrypted or sealed.
type tracer struct {
	next     keyless.Handler
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// newTracer returns a tracer before next.
func newTracer(ctx context.Context, c TracingConfig, identity string, next keyless.Handler, logger *slog.Logger) (*tracer, error) {
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(c.OTLPEndpoint), otlptracehttp.WithTimeout(traceTimeout))
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	otel.SetErrorHandler(&exportErrors{logger: logger})
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(spanQueue), sdktrace.WithExportTimeout(traceTimeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "keyhaven-keyserver"), attribute.String("service.version", cli.Version()),
			attribute.String("service.instance.id", identity))),
	)
	return &tracer{next: next, provider: p, tracer: p.Tracer("github.com/keyhaven/keyhaven/cmd/keyserver")}, nil
}

// Handle implements keyless.Handler.
func (t *tracer) Handle(ctx context.Context, req *keyless.Request) ([]byte, error) {
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

// close sends what waits, for a short time.
func (t *tracer) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), traceTimeout)
	defer cancel()
	if err := t.provider.Shutdown(ctx); err != nil {
		return fmt.Errorf("tracing: the last spans are lost: %w", err)
	}
	return nil
}

// exportErrors logs that spans do not reach the collector, once a minute.
type exportErrors struct {
	logger *slog.Logger
	mu     sync.Mutex // guards said
	said   time.Time
}

// Handle implements otel.ErrorHandler.
func (e *exportErrors) Handle(err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if now := time.Now(); now.Sub(e.said) >= time.Minute {
		e.said = now
		e.logger.Warn("spans do not reach the collector", "err", err)
	}
}
