package connector

// What Config.Carrier and SessionStatus.Carrier can be.
const (
	// CarrierAuto races QUIC and TCP, prefers QUIC, and goes back to it when it works again.
	CarrierAuto = "auto"
	// CarrierQUIC is QUIC alone, over UDP.
	CarrierQUIC = "quic"
	// CarrierTCP is TLS 1.3 over TCP alone.
	CarrierTCP = "tcp"
)

// What SessionStatus.Role can be.
const (
	// RoleMain is a session that the connector keeps, for all kinds of flows.
	RoleMain = "main"
	// RoleBulk is a session that the edge asked for, for one bulk flow at a time.
	RoleBulk = "bulk"
)
