// Package etcd keeps the control plane's store in an etcd cluster, for installations of several edges. It is apart from
// package state so that nobody carries the client who does not use it.
package etcd
