// Package tunnel is the session between a connector and an edge. The connector dials, so nothing has to be opened
// towards the private side; once it is registered, the edge opens flows through the session, each to one destination
// behind the connector. SPEC.md in this directory is the wire format.
//
// Edge side: [Listen], [Listener.Serve], [Session.Open]. Connector side: [Dial], [ClientSession.Run], [Incoming].
// Enrolment: [Join] and ListenConfig.Join.
//
// Edges among each other: [DialPeer], ListenConfig.Peer and HandlePeer.
//
// A session runs over a carrier, QUIC or TLS over TCP; nothing above the carrier depends on which.
package tunnel

// Names and numbers that both sides share.
const (
	// ALPN is the application protocol of a tunnel session; its number is the major version of SPEC.md.
	ALPN = "keyhaven-tunnel/1"
	// JoinALPN is the application protocol of enrolment with a join token.
	JoinALPN = "keyhaven-join/1"
	// PeerALPN is the application protocol between edges.
	PeerALPN = "keyhaven-peer/1"
	// DefaultPort is the port that edges listen on.
	DefaultPort = 7844
)
