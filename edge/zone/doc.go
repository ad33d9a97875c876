// Package zone maps the host name that a visitor asks for to a certificate, a key behind a key server, and origins.
package zone
