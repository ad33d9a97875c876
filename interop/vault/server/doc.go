// Package server is the real Transit secrets engine behind a small HTTP front of our own, for tests, demo and bench.
//
// The engine is HashiCorp's, as released with Vault 1.14.1; it makes and uses the keys. The front plays what the rest of a Vault server
// does as far as a client of the engine meets it: tokens with lifetimes, AppRole and Kubernetes logins, response wrapping of secret ids,
// namespaces, and the faults of a [Fault]. It is no secure server: it keeps all in memory and trusts whoever configures it.
package server
