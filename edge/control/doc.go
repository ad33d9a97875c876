// Package control is what the edge knows and decides: virtual networks, tunnels, connectors, routes and join tokens,
// kept in a [state.Store]; which connector may come in; which live session a flow takes.
//
// Every change is one transaction that also moves a generation record, conditioned on the generation that the
// decision was made from. Changes of one store are so in one order, whoever makes them, and a check such as "nobody
// uses this network" still holds when it is written. The memory's picture of the store is fed by Watch alone, a whole
// transaction at a time; a change returns after the picture has it.
//
// Mutexes are taken in the order model; statuses, pusher, poller; peers; peerEdge, registry, flows. make lockorder tells of
// two that are not.
package control
