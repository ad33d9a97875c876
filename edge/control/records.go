package control

import (
	"time"

	"github.com/keyhaven/keyhaven/vnet"
)

// A VNet is a virtual network: an address space of its own, in which a prefix or host name leads to one tunnel.
// Exactly one network is the default.
type VNet struct {
	ID      vnet.ID   `json:"id"` // random, or "default" for the first one; never reused
	Name    string    `json:"name"`
	Comment string    `json:"comment,omitempty"`
	Created time.Time `json:"created"`
	// MaxFlows bounds the open flows into the network, on each edge. Zero: no bound.
	MaxFlows int `json:"max_flows,omitempty"`
}

// A Tunnel is the way to one private site. Any number of connectors serve it.
type Tunnel struct {
	ID      string    `json:"id"` // random, never reused
	Name    string    `json:"name"`
	Comment string    `json:"comment,omitempty"`
	Created time.Time `json:"created"`
	// MaxFlows bounds the open flows through the tunnel, on each edge. Zero: no bound.
	MaxFlows int `json:"max_flows,omitempty"`
}

// A Connector is an enrolled identity, spiffe://<trust domain>/connector/<name>.
type Connector struct {
	ID      string    `json:"id"` // random; a name that is enrolled again gets a new one
	Name    string    `json:"name"`
	Tunnel  string    `json:"tunnel"` // id of the tunnel that it serves
	Created time.Time `json:"created"`
	// Revoked is zero while the connector may come in.
	Revoked time.Time `json:"revoked,omitzero"`
	// ValidFrom is the NotBefore of the certificate that the enrolment issued. Older certificates of the same name
	// belong to an earlier enrolment and are refused.
	ValidFrom time.Time `json:"valid_from"`
}

// A Route leads from a prefix or a host name, within one virtual network, to a tunnel.
type Route struct {
	VNet    vnet.ID   `json:"vnet"`
	Prefix  string    `json:"prefix,omitempty"` // canonical CIDR; empty with Host
	Host    string    `json:"host,omitempty"`   // canonical name, exact or "*."; empty with Prefix
	Tunnel  string    `json:"tunnel"`           // id
	Comment string    `json:"comment,omitempty"`
	Created time.Time `json:"created"`
}

// Target is the prefix or host name.
func (r Route) Target() string {
	if r.Host != "" {
		return r.Host
	}
	return r.Prefix
}

// seen is what stays known of a connector while it is away. It is kept apart from [Connector], since it changes
// without anybody's decision.
type seen struct {
	Last     time.Time `json:"last"`
	Origin   string    `json:"origin,omitempty"` // address that the last session came from
	Version  string    `json:"version,omitempty"`
	Hostname string    `json:"hostname,omitempty"`
}

// Views: what queries return. References between records are given by name, for people, beside the id.

// VNetView is a virtual network as shown.
type VNetView struct {
	VNet
	Default bool `json:"default"`
	Routes  int  `json:"routes"`
}

// RouteView is a route as shown.
type RouteView struct {
	Route
	VNetName   string `json:"vnet_name"`
	TunnelName string `json:"tunnel_name"`
}

// Tunnel states.
const (
	Healthy  = "healthy"  // every connector has all of its connections
	Degraded = "degraded" // some connection is missing or draining
	Down     = "down"     // no connection
	Inactive = "inactive" // no connector has ever been seen
)

// TunnelView is a tunnel as shown.
type TunnelView struct {
	Tunnel
	Status     string    `json:"status"`
	Since      time.Time `json:"since,omitzero"` // when the oldest live session began
	LastSeen   time.Time `json:"last_seen,omitzero"`
	Routes     int       `json:"routes"`
	Sessions   int       `json:"sessions"`
	Flows      int       `json:"flows"`
	Connectors int       `json:"connectors"` // not revoked
}

// TunnelDetail is a tunnel with all that hangs on it.
type TunnelDetail struct {
	TunnelView
	ConnectorList []ConnectorView `json:"connector_list"`
	RouteList     []RouteView     `json:"route_list"`
}

// VNetDetail is a virtual network with its routes.
type VNetDetail struct {
	VNetView
	RouteList []RouteView `json:"route_list"`
}

// ConnectorView is a connector as shown.
type ConnectorView struct {
	Connector
	TunnelName string        `json:"tunnel_name"`
	Status     string        `json:"status"` // healthy, degraded, down, inactive, revoked
	LastSeen   time.Time     `json:"last_seen,omitzero"`
	Origin     string        `json:"origin,omitempty"`
	Version    string        `json:"version,omitempty"`
	Hostname   string        `json:"hostname,omitempty"`
	Sessions   []SessionView `json:"sessions"` // on this edge
	// Elsewhere is what the other edges have of it.
	Elsewhere []ElsewhereView `json:"elsewhere,omitempty"`
	// Config is how it took the configurations of its tunnel, as far as this edge knows. Nil without a session here.
	Config *ConnectorConfig `json:"config,omitempty"`
}

// SessionView is one live connection of a connector.
type SessionView struct {
	Index    int       `json:"index"`
	Instance string    `json:"instance"`
	Remote   string    `json:"remote"`
	Since    time.Time `json:"since"`
	Flows    int       `json:"flows"`
	Draining bool      `json:"draining"`
	Version  string    `json:"version,omitempty"`
	Expires  time.Time `json:"expires"` // of the certificate
	Carrier  string    `json:"carrier"` // quic or tcp
	Role     string    `json:"role"`    // main or bulk
	RTT      float64   `json:"rtt"`     // seconds; 0: not measured
	Suspect  bool      `json:"suspect"` // it owes an answer and nothing was heard for a while
}

// ElsewhereView is what another edge has of a connector.
type ElsewhereView struct {
	Edge     string `json:"edge"`
	Sessions int    `json:"sessions"` // main sessions that take flows
	Complete bool   `json:"complete"` // all that the connector announced for that edge
}

// RouteAnswer is the answer to "who has this host?".
type RouteAnswer struct {
	Query string `json:"query"`
	// Chosen is the route that a flow takes in the network asked for; nil if it has none. For a prefix it is the longest
	// one that covers all of it; parts of it may have routes of their own, which are among the Overlaps.
	Chosen *RouteView `json:"chosen"`
	// VNetName is the network asked for.
	VNetName string `json:"vnet_name"`
	// Everywhere holds, for each network that has the host, the route that a flow takes there.
	Everywhere []RouteView `json:"everywhere"`
	// Overlaps holds the other prefixes, over all networks, that share addresses with the chosen prefix or with the
	// prefix asked for.
	Overlaps []RouteView `json:"overlaps"`
}

// JoinGrant is a new join token. Token is the secret itself and is not kept anywhere.
type JoinGrant struct {
	Token   string    `json:"token"`
	ID      string    `json:"id"`
	Tunnel  string    `json:"tunnel"` // name
	Expires time.Time `json:"expires"`
}

// Summary is the state of the whole edge.
type Summary struct {
	TrustDomain string       `json:"trust_domain"`
	Started     time.Time    `json:"started"`
	VNets       int          `json:"vnets"`
	Routes      int          `json:"routes"`
	Connectors  int          `json:"connectors"`
	Sessions    int          `json:"sessions"`
	Flows       int          `json:"flows"`
	Tunnels     []TunnelView `json:"tunnels"`
}
