package control

// Status sums up the edge.
func (c *Control) Status() Summary {
	tunnels := c.Tunnels()
	m := c.model
	m.mu.RLock()
	defer m.mu.RUnlock()
	s := Summary{TrustDomain: c.cfg.Authority.TrustDomain(), Started: c.started.UTC(), VNets: len(m.vnets), Routes: len(m.routes), Tunnels: tunnels}
	for _, t := range tunnels {
		s.Connectors += t.Connectors
		s.Sessions += t.Sessions
		s.Flows += t.Flows
	}
	return s
}
