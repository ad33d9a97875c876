// Package ingress serves what a connector publishes by its own rules: requests that an edge passes on are routed by host
// and path to origins at the site, and flows of bytes by host. The rules come from the connector's file, or from the edge
// with a version that only rises; they change at once and as a whole, and what is in flight ends as it began. Rules from
// the edge reach no more than the connector's allow-list permits.
package ingress
