// Package chaos tests that an installation survives what goes wrong at random: two edges, three connectors, two key servers
// and their store, while parts are killed, links fail and configurations change. Its test has the build tag netns and is run
// by make chaos; the same seed makes the same sequence of faults.
package chaos
