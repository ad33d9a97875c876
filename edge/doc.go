// Package edge serves visitors: it terminates their TLS with certificates whose private keys stay behind a key server,
// and forwards their requests to origins that only a tunnel reaches.
//
// A [Server] listens for TLS over TCP (HTTP/1.1 and HTTP/2) and over QUIC (HTTP/3). The name in the ClientHello selects a
// zone, in one canonical form that is used for the certificate, the session ticket, the request to the key server and the
// check of the Host header alike. There is no default zone and no default certificate. The edge holds no private key of a
// site: signatures come from a key server, over mutual TLS inside the tunnel, and are checked before they are used.
package edge
