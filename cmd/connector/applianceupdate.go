package main

import "github.com/spf13/cobra"

// updateKeys holds the public keys that an image's updates are signed by.
const updateKeys = "/usr/share/keyhaven/update-keys"

// applianceUpdateCommands are the commands about updates.
func applianceUpdateCommands() []*cobra.Command {
	return []*cobra.Command{applianceBundleCommand()}
}
