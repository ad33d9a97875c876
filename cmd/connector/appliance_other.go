//go:build !linux

package main

import "github.com/spf13/cobra"

// applianceOnLinux are commands that work on a device alone.
func applianceOnLinux() []*cobra.Command { return nil }
