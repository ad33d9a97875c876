// Package worker serves a PKCS#11 token from processes of its own, so that a module that crashes, hangs or loses its device
// costs a process and not the server.
//
// [Open] starts workers, each the same program executed again, and yields a [Pool], a [signer.Backend]. [Main] is what
// such a process runs: it confines itself, loads the module, logs in and signs. Pool and worker talk over a socket pair; PROTOCOL.md says how.
// The PIN comes over a descriptor of its own, never as an argument or in the environment.
//
// # Recovery
//
// A worker that ends, that the module keeps past [Config.Deadline], whose device fails, or whose module has failed everything for half a
// minute is replaced, with a growing pause if that does not last. What it held goes to another worker. A process that no signal ends, as
// the kernel holds it in a device's driver, is left behind. Workers start one after another: modules that keep tokens in files
// disturb each other otherwise.
//
// # PIN
//
// Workers log in one at a time, each only with the pool's leave. Once the token has refused the PIN no worker logs in until
// [Pool.Retry]; so a wrong PIN costs one try, however many workers there are and however often they are replaced. Workers that are logged in
// go on.
package worker
