// Package mtls gives Keyhaven's programs their identities: a small certificate authority, certificates that name
// exactly one SPIFFE-style identity, TLS configurations that verify the peer's identity in place of a host name, join
// tokens that enrol a connector once, and certificates that renew themselves.
//
// Configurations made here read certificate, key and roots anew for each handshake, so a reload or renewal counts from
// the next handshake on and needs no restart. They offer no session resumption: every connection verifies the peer's
// certificate against the roots, the time and the caller's rule of that moment.
package mtls
