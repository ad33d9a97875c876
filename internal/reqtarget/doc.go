// Package reqtarget keeps the path and query of an HTTP request byte for byte, so that a proxy forwards what it has
// decided on.
package reqtarget
