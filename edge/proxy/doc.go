// Package proxy forwards visitors' requests to origins behind the tunnel.
//
// It trusts nothing that a visitor says about itself: every header by which proxies name the visitor is removed, in every
// spelling, and set anew from the connection. It forwards the request target byte for byte, and chooses the origin by the
// same bytes. Bodies and trailers stream both ways, unbuffered; a response that breaks off is cut, never ended cleanly.
package proxy
