// Package proxyproto writes and accepts the PROXY protocol, versions 1 and 2, by which one proxy tells the next, or a
// service, the address of the visitor.
package proxyproto
