// Package balance shares requests and connections out among the endpoints of pools.
//
// A pool has endpoints, which are addresses in virtual networks, or other pools. Monitors probe the endpoints through the
// tunnel. The configuration changes live: what is known of an endpoint, and what is under way to it, outlives a change, as
// long as pool and address stay the same.
//
// An endpoint whose monitor has given no result yet counts as down. So that an edge that has just started does not refuse
// everything, it is probed at once, its first result decides by itself whatever the thresholds, and a visitor waits for
// such results, for the monitor's timeout at most, where nothing else is up.
package balance
