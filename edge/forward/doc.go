// Package forward serves public TCP and UDP ports that lead to private services.
//
// Ports are opened, changed and closed while the edge runs. A port that cannot be opened is at fault alone, and tried again.
// Who is not on a port's allow-list is not served, and an empty list admits nobody. When a port is taken away, or a list no
// longer admits a visitor, what is open of it is cut; a port that leads elsewhere keeps what is open.
package forward
