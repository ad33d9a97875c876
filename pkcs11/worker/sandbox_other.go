//go:build !linux

package worker

import (
	"fmt"
	"os"
	"runtime"
)

const confinedVariable = "KEYHAVEN_WORKER_CONFINED"

func confine(r *confineRequest) (confinement, error) {
	if r.Mode == SandboxOff {
		return confinement{}, nil
	}
	return confinement{}, fmt.Errorf("%w: sandbox mode %q needs Linux, this is %s: set mode %q", errSandbox, r.Mode, runtime.GOOS, SandboxOff)
}

func rename() {}

func executable() (string, error) { return os.Executable() }

func again() error { return errSandbox }

func seal(mode string, network bool) error { return nil }
