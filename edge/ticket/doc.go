// Package ticket makes and opens TLS session tickets with keys of the installation's own.
//
// The keys are random, kept in the store, renewed by age and shared by all edges on that store, so a returning visitor
// resumes after a restart and at another edge. A ticket carries a digest of what it was made for (zone, host name, key and
// key epoch) in SessionState.Extra, inside the encryption, and resumes nowhere else: elsewhere it is as good as none, and
// the visitor gets a full handshake. Early data (0-RTT) is never allowed.
//
// A ticket is: version u8 = 1 | key id 16 | nonce 12 | AES-256-GCM(SessionState.Bytes) with the first 17 bytes as
// additional data.
package ticket
