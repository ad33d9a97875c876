// Package connector is the run time of the program beside the origins. It keeps sessions to the edges alive, and for
// each flow that an edge opens it decides by its own allow-list whether the destination may be reached, dials it, and
// carries the bytes. The edge is not trusted with that decision: whatever it asks for, nothing outside the list is
// dialled.
package connector
