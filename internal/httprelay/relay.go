package httprelay

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net/http"
	"sync"
)

// BufferSize is that of the buffers by which bodies are copied.
const BufferSize = 32 << 10

// Buffers holds the copy buffers of response bodies. It is an [httputil.BufferPool].
var Buffers = bufferPool{sync.Pool{New: func() any { return new([BufferSize]byte) }}}

type bufferPool struct{ p sync.Pool }

// Get returns a buffer of BufferSize.
func (b *bufferPool) Get() []byte { return b.p.Get().(*[BufferSize]byte)[:] }

// Put takes back what Get returned.
func (b *bufferPool) Put(s []byte) { b.p.Put((*[BufferSize]byte)(s)) }

// IsTLS reports whether err comes from securing the connection to an origin.
func IsTLS(err error) bool {
	var (
		verify  *tls.CertificateVerificationError
		record  tls.RecordHeaderError
		alert   tls.AlertError
		host    x509.HostnameError
		unknown x509.UnknownAuthorityError
		invalid x509.CertificateInvalidError
	)
	return errors.As(err, &verify) || errors.As(err, &record) || errors.As(err, &alert) ||
		errors.As(err, &host) || errors.As(err, &unknown) || errors.As(err, &invalid)
}

// PassTrailers makes out carry the trailers that in, the request as it came, ends with: those that in has announced, but for
// those that drop, if not nil, reports true of.
func PassTrailers(out, in *http.Request, drop func(name string) bool) {
	if out.Body == nil || len(in.Trailer) == 0 {
		return
	}
	out.Trailer = make(http.Header, len(in.Trailer))
	for k := range in.Trailer {
		if drop == nil || !drop(k) {
			out.Trailer[k] = nil // announces it
		}
	}
	out.Body = &trailerBody{out.Body, in, out.Trailer}
}

type trailerBody struct {
	io.ReadCloser
	from *http.Request
	to   http.Header // with the announced names
}

// Read implements [io.Reader].
func (b *trailerBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err == io.EOF {
		for k := range b.to {
			if vv, ok := b.from.Trailer[k]; ok {
				b.to[k] = vv
			}
		}
	}
	return n, err
}
