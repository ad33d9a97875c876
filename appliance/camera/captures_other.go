//go:build !linux

package camera

// Captures reports whether a device file is a camera. Appliances run Linux alone; elsewhere nothing is.
func Captures(string) bool { return false }
