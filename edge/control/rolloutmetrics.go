package control

import (
	"cmp"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// maxVersionLabels bounds the versions that metrics show one by one: those of most devices.
const maxVersionLabels = 8

// otherLabel stands for all that has no label of its own.
const otherLabel = "other"

// A fleetCollector shows devices and rollouts, over all edges.
type fleetCollector struct{ c *Control }

var (
	descDevices = prometheus.NewDesc("keyhaven_edge_fleet_devices",
		"Devices that have ever reported, over all edges, by the version that runs and the state of their update; silent and away stand in its place.",
		[]string{"version", "state"}, nil)
	descRollouts = prometheus.NewDesc("keyhaven_edge_fleet_rollouts",
		"Rollouts by status; stopped are those that were paused by themselves, for their failures.", []string{"status"}, nil)
)

func newPollResults() *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "keyhaven_edge_fleet_polls_total",
		Help: "Questions to connectors about the device they run on, by result."}, []string{"result"})
}

// Describe implements prometheus.Collector.
func (f fleetCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- descDevices
	ch <- descRollouts
}

// Collect implements prometheus.Collector.
func (f fleetCollector) Collect(ch chan<- prometheus.Metric) {
	m := f.c.model
	m.mu.RLock()
	status := map[string]int{RolloutRunning: 0, RolloutPaused: 0, RolloutStopped: 0}
	for i := range m.rolloutOrder {
		status[m.rolloutOrder[i].Config.status()]++
	}
	byVersion := map[string]map[string]int{}
	up, now := f.c.upLocked(), time.Now()
	m.eachDeviceLocked(func(k Connector, d deviceRecord) {
		state := d.contact(up(k), now)
		if state == DeviceOnline {
			if state = d.Report.State; !slices.Contains(fleet.States(), state) {
				state = otherLabel
			}
		}
		version := cmp.Or(d.Report.Version, otherLabel)
		if byVersion[version] == nil {
			byVersion[version] = map[string]int{}
		}
		byVersion[version][state]++
	})
	m.mu.RUnlock()
	for version, by := range boundVersions(byVersion) {
		for state, n := range by {
			ch <- prometheus.MustNewConstMetric(descDevices, prometheus.GaugeValue, float64(n), version, state)
		}
	}
	for s, n := range status {
		ch <- prometheus.MustNewConstMetric(descRollouts, prometheus.GaugeValue, float64(n), s)
	}
}

// boundVersions puts together the versions of the fewest devices, where there are too many for labels.
func boundVersions(by map[string]map[string]int) map[string]map[string]int {
	if len(by) <= maxVersionLabels {
		return by
	}
	total := func(version string) (n int) {
		for _, k := range by[version] {
			n += k
		}
		return n
	}
	versions := make([]string, 0, len(by))
	for v := range by {
		if v != otherLabel {
			versions = append(versions, v)
		}
	}
	slices.SortFunc(versions, func(a, b string) int { return cmp.Or(total(b)-total(a), cmp.Compare(a, b)) })
	bounded := map[string]map[string]int{otherLabel: {}}
	for i, v := range append(versions, otherLabel) {
		if i < maxVersionLabels && v != otherLabel {
			bounded[v] = by[v]
			continue
		}
		for state, n := range by[v] {
			bounded[otherLabel][state] += n
		}
	}
	return bounded
}
