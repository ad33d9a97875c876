//go:build !linux

package check

// host has nothing to look at where the kernel needs no settings, or does not show them.
func host() []Finding { return nil }
