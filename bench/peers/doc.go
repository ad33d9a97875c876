// Package peers pins the tunnels that the bench compares Keyhaven with, frp and chisel. They are built from the module
// proxy as programs of their own; nothing of them is linked into ours.
package peers
