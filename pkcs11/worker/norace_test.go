//go:build !race

package worker

const testMemory = 0
