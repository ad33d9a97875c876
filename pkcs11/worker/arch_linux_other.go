//go:build linux && !amd64 && !arm64

package worker

// No filter of system calls is known for this architecture.
const (
	nativeArch   = 0
	foreignCalls = 0
)

var archCalls []uint32
