// Package admin is the edge's administration interface: HTTP with JSON on a Unix socket, its server and its client.
//
// The socket has mode 0600, and each connection's peer must be root or the user that the edge runs as, whatever the
// file's mode says. No browser reaches a Unix socket; requests that look as if one had sent them are refused all the
// same. Bodies are decoded strictly and bounded in size, and every step has a deadline.
package admin
