// Package dns is the edge's name server for virtual networks: names that a network has host routes for are asked at the
// site to which the route leads, through its tunnel. It knows nothing by itself but what it has cached.
package dns
