// Package reliability is the fault matrix: what becomes of requests when a token fails in the ways in which tokens fail.
//
// Each [Row] is one failure. [Bench.Run] makes tokens behind a module that misbehaves on command, starts the key server, has
// clients ask for signatures before, during and after the failure, and verifies each one. [Result.Check] holds what must be
// true of every failure, and what the row promises besides. docs/reliability.md has the results, written by cmd/matrix.
package reliability
