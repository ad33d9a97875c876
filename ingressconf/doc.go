// Package ingressconf is what a connector publishes by itself: ordered rules that lead from host and path to a service at
// the site. It reads and checks them, and finds the rule for a request. The connector serves by them, and the edge checks
// with the same code what it hands out; nothing here opens a connection or a file.
package ingressconf
