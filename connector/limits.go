package connector

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/keyhaven/keyhaven/vnet"
)

// defaultMaxFlows is the limit over all networks if none is given.
const defaultMaxFlows = 8192

// Limits bound the flows at a time, over all sessions. Further ones are refused.
type Limits struct {
	// MaxFlows counts the flows of all virtual networks. If zero, 8192.
	MaxFlows int
	// PerVNet bounds the flows of single virtual networks, by id. A network that is not in it has no limit of its own.
	PerVNet map[vnet.ID]int
}

// A VNetFlows says how far a virtual network with a limit of its own has used it.
type VNetFlows struct {
	VNet  vnet.ID `json:"vnet"`
	Flows int     `json:"flows"`
	Limit int     `json:"limit"`
}

// counts are the flows open or being dialled. The zero value has no room.
type counts struct {
	mu     sync.Mutex // guards the fields below
	limits Limits
	used   int
	byVNet map[vnet.ID]int // without zeros
}

func (s *counts) set(l Limits) {
	if l.MaxFlows <= 0 {
		l.MaxFlows = defaultMaxFlows
	}
	l.PerVNet = maps.Clone(l.PerVNet)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limits = l
}

// reserve takes room for a flow of v, if there is any; release gives it back.
func (s *counts) reserve(v vnet.ID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.used >= s.limits.MaxFlows {
		return false
	}
	if most, ok := s.limits.PerVNet[v]; ok && s.byVNet[v] >= most {
		return false
	}
	if s.byVNet == nil {
		s.byVNet = map[vnet.ID]int{}
	}
	s.used++
	s.byVNet[v]++
	return true
}

func (s *counts) release(v vnet.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.used--
	if s.byVNet[v]--; s.byVNet[v] == 0 {
		delete(s.byVNet, v)
	}
}

// total returns the flows and their limit.
func (s *counts) total() (used, most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.used, s.limits.MaxFlows
}

// limited returns how the networks with limits stand.
func (s *counts) limited() (list []VNetFlows) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for v, most := range s.limits.PerVNet {
		list = append(list, VNetFlows{VNet: v, Flows: s.byVNet[v], Limit: most})
	}
	slices.SortFunc(list, func(a, b VNetFlows) int { return cmp.Compare(a.VNet, b.VNet) })
	return list
}
