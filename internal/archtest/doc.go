// Package archtest holds the tests of the rules in docs/ARCHITECTURE.md: who may import whom, what the public programs
// must never contain, how packages are commented.
package archtest
