// Package tracing sends spans of the programs to an OpenTelemetry collector.
package tracing

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/keyhaven/keyhaven/internal/cli"
)

const (
	// queue is how many spans may wait for the collector; further ones are dropped.
	queue = 2048
	// timeout bounds one export, and the last one at the end.
	timeout = 5 * time.Second
)

// Config says where spans go. Without an endpoint there are none.
type Config struct {
	// OTLPEndpoint is the URL of a collector that takes OTLP over HTTP.
	OTLPEndpoint string `mapstructure:"otlp_endpoint"`
	// SampleRatio is the share of traces that are sent, from 0 to 1, where nobody before has decided.
	SampleRatio float64 `mapstructure:"sample_ratio"`
}

// Defaults returns the configuration of an empty file.
func Defaults() Config { return Config{SampleRatio: 1} }

// Check returns what is wrong with the endpoint; nil if nothing is, or there is none.
func (c Config) Check() error {
	if c.OTLPEndpoint == "" {
		return nil
	}
	u, err := url.Parse(c.OTLPEndpoint)
	if err != nil || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Scheme != "https" && u.Scheme != "http" {
		return errors.New("is no URL of a collector; write one such as http://127.0.0.1:4318/v1/traces")
	}
	return nil
}

// A Provider makes tracers and sends their spans. Make one with [Open].
type Provider struct{ provider *sdktrace.TracerProvider }

// Open returns a provider for a program, of which instance is the identity. It connects to nothing yet, and returns nil without an
// endpoint. A collector that is away loses spans and holds nothing up. The caller must call Close.
func Open(ctx context.Context, c Config, service, instance string, logger *slog.Logger) (*Provider, error) {
	if c.OTLPEndpoint == "" {
		return nil, nil
	}
	exporter, err := otlptracehttp.New(ctx, otlptracehttp.WithEndpointURL(c.OTLPEndpoint), otlptracehttp.WithTimeout(timeout))
	if err != nil {
		return nil, fmt.Errorf("tracing: %w", err)
	}
	otel.SetErrorHandler(&exportErrors{logger: logger})
	return &Provider{sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(queue), sdktrace.WithExportTimeout(timeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(c.SampleRatio))),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", service), attribute.String("service.version", cli.Version()),
			attribute.String("service.instance.id", instance))),
	)}, nil
}

// Tracer returns the tracer of a part of the program; nil if p is.
func (p *Provider) Tracer(name string) trace.Tracer {
	if p == nil {
		return nil
	}
	return p.provider.Tracer("github.com/keyhaven/keyhaven/" + name)
}

// Close sends what waits, for a short time. It does nothing if p is nil.
func (p *Provider) Close(ctx context.Context) error {
	if p == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), timeout)
	defer cancel()
	if err := p.provider.Shutdown(ctx); err != nil {
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
