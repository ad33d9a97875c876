//go:build !linux

package slot

import (
	"fmt"
	"os"
	"path/filepath"
)

const exclusive = 0

// Writable calls do with the directory below root that stands for the configuration partition. Appliances run Linux, where
// it is a partition.
func Writable(root string, do func(dir string) error) error {
	return do(filepath.Join(root, configDir))
}

func dropCache(*os.File) error { return nil }

func syncDir(*os.File) error { return nil } // not every system can

func (h *host) restart(string) error {
	if !h.real() {
		return nil
	}
	return fmt.Errorf("%w: they run Linux", ErrNoAppliance)
}
