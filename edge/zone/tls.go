package zone

import (
	"crypto"
	"crypto/tls"
)

// suites12 holds the suites of TLS 1.2 that are offered: forward secret and authenticated.
var suites12 = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
}

// A SignerFunc returns the certificate's key bound to one handshake. sni is canonical.
type SignerFunc func(hello *tls.ClientHelloInfo, sni string) crypto.Signer

// TLSConfig returns a configuration for the zone's visitors that speak one of protos and get the certificate c. Session
// tickets are the caller's to bind, before use.
func (z *Zone) TLSConfig(c *Certificate, signer SignerFunc, protos ...string) *tls.Config {
	suites := suites12
	if z.AllowRSADecrypt {
		suites = append(suites[:len(suites):len(suites)], tls.TLS_RSA_WITH_AES_128_GCM_SHA256)
	}
	return &tls.Config{
		MinVersion:    tls.VersionTLS12,
		CipherSuites:  suites,
		NextProtos:    protos,
		Renegotiation: tls.RenegotiateNever,
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			sni, err := Canonical(hello.ServerName)
			if err != nil {
				return nil, err
			}
			return &tls.Certificate{
				Certificate:                  c.Chain,
				Leaf:                         c.Leaf,
				PrivateKey:                   signer(hello, sni),
				SupportedSignatureAlgorithms: c.Schemes,
			}, nil
		},
	}
}

// Refusal returns a configuration that ends a handshake with the alert unrecognized_name (RFC 6066, section 3), whatever
// the visitor offers, a session ticket included.
func Refusal(protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS12,
		NextProtos:             protos,
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, nil },
	}
}

// Protocols returns the ALPN names of HTTP over TCP that the zone offers, best first.
func (z *Zone) Protocols() []string {
	var p []string
	if z.HTTP2 {
		p = append(p, "h2")
	}
	if z.HTTP1 {
		p = append(p, "http/1.1")
	}
	return p
}
