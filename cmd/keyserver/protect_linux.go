package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// protect closes the process's memory, which holds PINs and TLS keys, to other processes of the user: workers run as the same one. It also
// means that there are no core dumps. See PR_SET_DUMPABLE in prctl(2).
func protect() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("close the process's memory to others: %w", err)
	}
	return nil
}
