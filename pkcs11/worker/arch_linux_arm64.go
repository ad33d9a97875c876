package worker

import "golang.org/x/sys/unix"

const (
	nativeArch   = unix.AUDIT_ARCH_AARCH64
	foreignCalls = 0
)

var archCalls = []uint32{unix.SYS_KEXEC_FILE_LOAD}
