package faultmodule

import (
	"embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

//go:embed shim
var sources embed.FS

// compiled is the module, compiled once for a process.
var compiled = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "keyhaven-faultmodule-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.CopyFS(dir, sources); err != nil {
		return nil, err
	}
	object := filepath.Join(dir, "faulty.so")
	cc := exec.Command("gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", object, filepath.Join(dir, "shim", "module.c"), "-ldl", "-lpthread")
	if out, err := cc.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, strings.TrimSpace(string(out)))
	}
	return os.ReadFile(object)
})

// Build compiles the module with gcc, once for a process, and puts it into dir, which is made if it is missing. It returns the
// module's path.
func Build(dir string) (module string, err error) {
	b, err := compiled()
	if err != nil {
		return "", fmt.Errorf("faultmodule: compile the module: %w", err)
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("faultmodule: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("faultmodule: %w", err)
	}
	module = filepath.Join(dir, "faulty.so")
	if err := os.WriteFile(module, b, 0o700); err != nil {
		return "", fmt.Errorf("faultmodule: %w", err)
	}
	return module, nil
}
