package worker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confinedVariable is in the environment of a worker that has confined itself and executed itself again.
const confinedVariable = "KEYHAVEN_WORKER_CONFINED"

// confine gives up what the module does not need, as far as that is a matter of the thread or process that executes: the limits,
// no_new_privs, Landlock and descriptors. In modes that set a thread's attributes the caller must execute the program again, see again.
func confine(r *confineRequest) (confinement, error) {
	var c confinement
	if r.Mode == SandboxOff {
		return c, nil
	}
	// Never unlocked: execve comes next, on this thread.
	runtime.LockOSThread()
	if err := dropInherited(); err != nil {
		return c, err
	}
	if err := limit(r); err != nil {
		return c, err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return c, fmt.Errorf("%w: no_new_privs: %w", errSandbox, err)
	}
	if r.Mode != SandboxStrict {
		return c, nil
	}
	return landlock(r)
}

// executable is this program, which stays the same file when a package is upgraded.
func executable() (string, error) { return "/proc/self/exe", nil }

// dropInherited has the execution that follows close the descriptors that are not for workers: those that whoever started the server left open.
func dropInherited() error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("%w: %w", errSandbox, err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > pinFD {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

func limit(r *confineRequest) error {
	set := func(what string, resource int, value uint64) error {
		var have unix.Rlimit
		if err := unix.Getrlimit(resource, &have); err != nil {
			return fmt.Errorf("%w: limit of %s: %w", errSandbox, what, err)
		}
		value = min(value, have.Max)
		if err := unix.Setrlimit(resource, &unix.Rlimit{Cur: value, Max: value}); err != nil {
			return fmt.Errorf("%w: limit of %s to %d: %w", errSandbox, what, value, err)
		}
		return nil
	}
	if err := set("core dumps", unix.RLIMIT_CORE, 0); err != nil {
		return err
	}
	if err := set("descriptors", unix.RLIMIT_NOFILE, uint64(r.MaxFiles)); err != nil {
		return err
	}
	if r.MaxMemory < 0 {
		return nil
	}
	// Private writable memory. RLIMIT_AS would count what the Go runtime only reserves.
	return set("memory", unix.RLIMIT_DATA, uint64(r.MaxMemory))
}

// systemPaths are what a program and a shared library need to start: the loader, its cache and configuration, names and time.
var systemPaths = []string{
	"/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/local/lib", "/usr/share", "/etc/ld.so.cache", "/etc/ld.so.conf",
	"/etc/ld.so.conf.d", "/etc/ld.so.preload", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf",
	"/etc/host.conf", "/etc/gai.conf", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies", "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys", "/proc/filesystems", "/sys/devices/system/cpu",
	"/sys/kernel/mm/transparent_hugepage", "/dev/urandom", "/dev/random", "/dev/zero", "/run/systemd/resolve",
}

// writablePaths are what any worker may write to.
var writablePaths = []string{"/dev/null", commFile}

// commFile is what top, pgrep and the kernel's log call this process.
const commFile = "/proc/self/comm"

// rename gives the process a name: it would be "exe", as it is executed through /proc/self/exe. It must come before seal.
func rename() { _ = os.WriteFile(commFile, []byte("keyhaven-worker"), 0) }

const (
	landlockRead = unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	// landlockFiles are the rights that a file, not a directory, can have.
	landlockFiles = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_READ_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	// landlockAll are the rights of Landlock's first ABI.
	landlockAll = 1<<13 - 1
	// landlockNever are the rights that nobody has anywhere: to make devices.
	landlockNever = unix.LANDLOCK_ACCESS_FS_MAKE_CHAR | unix.LANDLOCK_ACCESS_FS_MAKE_BLOCK
)

// landlock leaves this thread, and what it executes, the files of the request and the system's.
func landlock(r *confineRequest) (c confinement, err error) {
	abi, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return c, fmt.Errorf("%w: this kernel has no Landlock (%w): set sandbox mode %q, or boot with landlock in the list of security modules (lsm=)",
			errSandbox, errno, SandboxBasic)
	}
	c.Landlock = int(abi)
	rights := unix.LandlockRulesetAttr{Handled_access_fs: landlockAll}
	for _, step := range []struct {
		abi  int
		what string
		add  func()
	}{
		{2, "renaming between directories", func() { rights.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_REFER }},
		{3, "truncating", func() { rights.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_TRUNCATE }},
		{4, "TCP", func() {
			if !r.Network {
				rights.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
			}
		}},
		{5, "ioctl of devices", func() { rights.Handled_access_fs |= unix.LANDLOCK_ACCESS_FS_IOCTL_DEV }},
		{6, "signals and abstract Unix sockets", func() {
			rights.Scoped = unix.LANDLOCK_SCOPE_SIGNAL | unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		}},
	} {
		if c.Landlock >= step.abi {
			step.add()
		} else {
			c.Lacks = append(c.Lacks, step.what)
		}
	}
	size := unsafe.Offsetof(rights.Quiet_access_fs)
	switch {
	case c.Landlock < 4:
		size = unsafe.Offsetof(rights.Handled_access_net)
	case c.Landlock < 6:
		size = unsafe.Offsetof(rights.Scoped)
	}
	fd, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&rights)), size, 0)
	if errno != 0 {
		return c, fmt.Errorf("%w: Landlock: %w", errSandbox, errno)
	}
	defer unix.Close(int(fd))
	if err := allowPaths(int(fd), rights.Handled_access_fs, r); err != nil {
		return c, err
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, fd, 0, 0); errno != 0 {
		return c, fmt.Errorf("%w: Landlock: %w", errSandbox, errno)
	}
	return c, nil
}

func allowPaths(ruleset int, all uint64, r *confineRequest) error {
	allow := func(path string, rights uint64) error { return allowPath(ruleset, path, rights&all) }
	var err error
	// The program itself, for the execution that follows; its directory is not opened by that.
	err = errors.Join(err, allow("/proc/self/exe", landlockRead|unix.LANDLOCK_ACCESS_FS_EXECUTE))
	for _, path := range systemPaths {
		rights := uint64(landlockRead)
		if path[:4] == "/lib" || path[:4] == "/usr" {
			rights |= unix.LANDLOCK_ACCESS_FS_EXECUTE // the program's interpreter
		}
		err = errors.Join(err, allow(path, rights))
	}
	for _, path := range append([]string{filepath.Dir(r.Module)}, r.ReadPaths...) {
		err = errors.Join(err, allow(path, landlockRead))
	}
	for _, path := range append(writablePaths, r.WritePaths...) {
		err = errors.Join(err, allow(path, all&^(landlockNever|unix.LANDLOCK_ACCESS_FS_EXECUTE)))
	}
	return err
}

// allowPath adds a rule for path and, if it is a directory, what is below. A path that is not there is left out.
func allowPath(ruleset int, path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EACCES) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %s: %w", errSandbox, path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%w: %s: %w", errSandbox, path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= landlockFiles
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: rights, Parent_fd: int32(fd)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(ruleset), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("%w: Landlock rule for %s: %w", errSandbox, path, errno)
	}
	return nil
}

// again executes this program again in its place, so that every thread has what this one has. It returns only if that fails.
func again() error {
	env := append(os.Environ(), confinedVariable+"=1")
	err := syscall.Exec("/proc/self/exe", os.Args, env)
	return fmt.Errorf("%w: execute %s again: %w", errSandbox, os.Args[0], err)
}

// seal gives up what is a matter of the process: to be looked into by others, and in strict mode the system calls that no module
// needs. It must come before the PIN is read and the module loaded.
func seal(mode string, network bool) error {
	if mode == SandboxOff {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("%w: %w", errSandbox, err)
	}
	if mode != SandboxStrict {
		return nil
	}
	return filterCalls(network)
}
