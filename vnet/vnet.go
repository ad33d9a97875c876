// Package vnet says which tunnel leads to which private address. It knows virtual networks, routes by prefix and by
// host name, and the questions people ask about them. It owns no socket and keeps no state of its own: a [Table] is an
// immutable value, and a change gives a new one that shares nearly all of the old one's memory.
package vnet

// ID is the stable identifier of a virtual network. Two virtual networks may hold the same prefix; nothing about a
// route means anything without its ID. The zero value is no network and matches no route. The name that people give
// a network may change; its ID does not.
type ID string
