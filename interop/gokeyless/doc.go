// Package gokeyless holds the interoperability tests against github.com/cloudflare/gokeyless, in a module of its own so that
// nothing of Keyhaven depends on that code. Its public API is called and nothing else; nothing that is shipped links it.
//
// The tests need SoftHSM2, gcc and, once, the Go module proxy.
package gokeyless
