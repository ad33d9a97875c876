package control

import "slices"

// A Thing is a kind of record that others refer to by name.
type Thing string

// The things that a configuration file may refer to.
const (
	ThingVNet   Thing = "virtual network"
	ThingTunnel Thing = "tunnel"
	ThingPool   Thing = "pool"
)

// Local is what this edge's own configuration file says.
type Local struct {
	// Users returns descriptions of what in the configuration uses a thing with a name and an id, the same for pools.
	// Nil: nothing does.
	Users func(thing Thing, name, id string) []string
	// KeyServers are the names of the key server groups, which zones refer to.
	KeyServers []string
}

// SetLocal tells what the configuration file says, so that nothing is deleted that it uses. It may be called again at any
// time.
func (c *Control) SetLocal(l Local) { c.local.Store(&l) }

// localUsers describes what in the configuration file uses a thing.
func (c *Control) localUsers(thing Thing, name, id string) []string {
	l := c.local.Load()
	if l == nil || l.Users == nil {
		return nil
	}
	return l.Users(thing, name, id)
}

func (c *Control) hasKeyServer(name string) bool {
	l := c.local.Load()
	return l != nil && slices.Contains(l.KeyServers, name)
}
