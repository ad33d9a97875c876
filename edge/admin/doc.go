// Package admin is the edge's administration interface: HTTP with JSON, its server and its client.
//
// There are two doors. The Unix socket has mode 0600, and each connection's peer must be root or the user that the edge
// runs as, whatever the file's mode says. HTTPS asks for the certificate of an operator, whose name must stand on the
// edge's list at each request. No browser reaches either; requests that look as if one had sent them are refused all
// the same. Bodies are decoded strictly and bounded in size, and every step has a deadline. What is served is described by
// openapi.yaml, which a test holds against the handlers.
package admin
