//go:build !unix

package update

import "os"

// lock does nothing: appliances run Linux.
func lock(string) (func(), error) { return func() {}, nil }

func syncDir(*os.File) error { return nil }
