package control

import (
	"cmp"
	"slices"

	"github.com/keyhaven/keyhaven/tunnel"
)

// turnIndexes is how far apart the indexes are of a session and of the one that took its place while it lived. See
// tunnel/SPEC.md, "Registration".
const turnIndexes = 64

// processesOf sums up sessions by process, sorted.
func processesOf(ls []*live) []presentProcess {
	type group struct{ bits, want int } // of the sessions to one address of the edge
	type sum struct {
		presentProcess
		groups map[int]*group
	}
	by := map[[2]string]*sum{}
	for _, l := range ls {
		if l.role != tunnel.RoleMain {
			continue
		}
		reg := l.s.Registration()
		key := [2]string{l.connector.Name, reg.Instance}
		s := by[key]
		if s == nil {
			s = &sum{presentProcess: presentProcess{Connector: l.connector.Name, Instance: plain(reg.Instance)}, groups: map[int]*group{}}
			by[key] = s
		}
		want := cmp.Or(reg.Connections, sessionsPerEdge)
		s.Want = max(s.Want, want)
		if l.s.Draining() {
			s.Draining++
			continue
		}
		s.Sessions++
		number := reg.Index % turnIndexes / sessionsPerEdge
		g := s.groups[number]
		if g == nil {
			g = &group{}
			s.groups[number] = g
		}
		g.bits++
		g.want = max(g.want, min(want, sessionsPerEdge))
	}
	list := make([]presentProcess, 0, len(by))
	for _, s := range by {
		s.Complete = s.Sessions > 0 // those that drain may have been replaced already
		for _, g := range s.groups {
			s.Complete = s.Complete && g.bits >= g.want
		}
		list = append(list, s.presentProcess)
	}
	slices.SortFunc(list, func(a, b presentProcess) int {
		return cmp.Or(cmp.Compare(a.Connector, b.Connector), cmp.Compare(a.Instance, b.Instance))
	})
	return list
}
