// Package faultmodule is a PKCS#11 module for tests and benchmarks that hands every call to a real module, such as SoftHSM2,
// and misbehaves on command, as tokens in production do.
//
// [Build] compiles it, [New] makes the page of memory through which it is controlled: a file that every process with the
// module in it maps, so that faults come and go while worker processes run and their calls are counted together. The module
// finds the file "control" in its own directory, so two modules in two directories are two tokens with faults of their own;
// the variable KH_FAULT_CONTROL names another file.
package faultmodule
