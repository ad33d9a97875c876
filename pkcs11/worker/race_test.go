//go:build race

package worker

// testMemory is no limit: the race detector's own memory counts.
const testMemory = -1
