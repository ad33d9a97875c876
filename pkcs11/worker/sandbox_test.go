package worker

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// probe is a worker that tries what a module must not be able to do, and prints what came of it.
func probe(args []string) int {
	var r confineRequest
	if err := json.Unmarshal([]byte(args[0]), &r); err != nil {
		fmt.Println(err)
		return 1
	}
	if os.Getenv(confinedVariable) == "" && r.Mode != SandboxOff {
		_, err := confine(&r)
		if err == nil {
			err = again()
		}
		fmt.Println(err)
		return 1
	}
	if err := seal(r.Mode, r.Network); err != nil {
		fmt.Println(err)
		return 1
	}
	for _, what := range args[1:] {
		fmt.Printf("%s=%v\n", what, errorName(attempts[what](&r)))
	}
	return 0
}

func errorName(err error) string {
	var errno syscall.Errno
	switch {
	case err == nil:
		return "done"
	case errors.As(err, &errno):
		return unix.ErrnoName(errno)
	}
	return err.Error()
}

var attempts = map[string]func(*confineRequest) error{
	"read a file of others": func(*confineRequest) error { _, err := os.ReadFile("/etc/hostname"); return err },
	"list the root":         func(*confineRequest) error { _, err := os.ReadDir("/"); return err },
	"write a file":          func(r *confineRequest) error { return os.WriteFile(filepath.Join(os.TempDir(), "x"), nil, 0o600) },
	"read what it may":      func(r *confineRequest) error { _, err := os.ReadFile(r.ReadPaths[0]); return err },
	"write what it may":     func(r *confineRequest) error { return os.WriteFile(filepath.Join(r.WritePaths[0], "x"), nil, 0o600) },
	"execute":               func(*confineRequest) error { return exec.Command("/bin/true").Run() },
	"open TCP": func(*confineRequest) error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	},
	"open UDP over IPv6": func(*confineRequest) error {
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	},
	"open a Unix socket": func(*confineRequest) error {
		l, err := net.Listen("unix", "")
		if err == nil {
			l.Close()
		}
		return err
	},
	"trace": func(*confineRequest) error { return unix.PtraceAttach(os.Getppid()) },
	"clone into a user namespace": func(*confineRequest) error {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_NEWUSER|uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			return errno
		}
		if pid == 0 {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
		_, err := unix.Wait4(int(pid), nil, 0, nil)
		return err
	},
	"clone3": func(*confineRequest) error {
		_, _, errno := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0) // EINVAL if it is there
		return errno
	},
	"limit others": func(*confineRequest) error {
		return unix.Prlimit(os.Getppid(), unix.RLIMIT_NOFILE, nil, new(unix.Rlimit))
	},
	"know its limits": func(*confineRequest) error { return unix.Getrlimit(unix.RLIMIT_NOFILE, new(unix.Rlimit)) },
	"use what the server inherited": func(*confineRequest) error {
		var st unix.Stat_t
		return unix.Fstat(30, &st)
	},
	"unshare": func(*confineRequest) error { return unix.Unshare(unix.CLONE_NEWUSER) },
	"signal":  func(*confineRequest) error { return unix.Kill(os.Getppid(), 0) },
	"signal without Landlock": func(*confineRequest) error {
		if err := filterCalls(true); err != nil {
			return err
		}
		return unix.Kill(os.Getppid(), 0)
	},
	"signal itself": func(*confineRequest) error {
		runtime.LockOSThread()
		return errors.Join(unix.Kill(os.Getpid(), 0), unix.Tgkill(os.Getpid(), unix.Gettid(), 0))
	},
	"use io_uring": func(*confineRequest) error { _, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, 0, 0); return e },
	"read keys": func(*confineRequest) error {
		_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, false)
		return err
	},
	"be dumped": func(*confineRequest) error {
		var core unix.Rlimit
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err == nil {
			err = unix.Getrlimit(unix.RLIMIT_CORE, &core)
		}
		if err == nil && (dumpable == 0 || core.Max == 0) {
			err = syscall.EPERM
		}
		return err
	},
	"gain privileges": func(*confineRequest) error {
		set, err := unix.PrctlRetInt(unix.PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)
		if err == nil && set == 1 {
			err = syscall.EPERM
		}
		return err
	},
	"open many files": func(*confineRequest) error {
		for {
			if _, err := unix.Dup(0); err != nil {
				return err
			}
		}
	},
}

// TestSandbox runs each attempt in each mode. Without the sandbox what is asked for must work, or the test would show nothing.
func TestSandbox(t *testing.T) {
	dir := t.TempDir()
	readable, writable := filepath.Join(dir, "readable"), filepath.Join(dir, "writable")
	if err := errors.Join(os.WriteFile(readable, nil, 0o600), os.Mkdir(writable, 0o700)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile("/etc/hostname"); err != nil {
		t.Fatal(err)
	}
	run := func(mode string, network bool, what string) string {
		t.Helper()
		r := encodeJSON(&confineRequest{Mode: mode, Network: network, Module: "/usr/lib/x.so", MaxMemory: -1, MaxFiles: 64,
			ReadPaths: []string{readable, "/nonexistent"}, WritePaths: []string{writable}})
		cmd := exec.Command(os.Args[0], "probe", string(r), what)
		for range 28 {
			cmd.ExtraFiles = append(cmd.ExtraFiles, os.Stdin) // to descriptor 30
		}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", what, err, out)
		}
		return strings.TrimPrefix(strings.TrimSpace(string(out)), what+"=")
	}
	for _, tc := range []struct{ what, off, basic, strict, strictNetwork string }{
		{"read a file of others", "done", "done", "EACCES", "EACCES"},
		{"list the root", "done", "done", "EACCES", "EACCES"},
		{"write a file", "done", "done", "EACCES", "EACCES"},
		{"read what it may", "done", "done", "done", "done"},
		{"write what it may", "done", "done", "done", "done"},
		{"execute", "done", "done", "EPERM", "EPERM"},
		{"open TCP", "done", "done", "EACCES", "done"},
		{"open UDP over IPv6", "done", "done", "EACCES", "done"},
		{"open a Unix socket", "done", "done", "done", "done"},
		{"unshare", "", "", "EPERM", "EPERM"},
		{"clone into a user namespace", "", "", "EPERM", "EPERM"},
		{"clone3", "EINVAL", "EINVAL", "ENOSYS", "ENOSYS"},
		{"limit others", "done", "done", "EPERM", "EPERM"},
		{"know its limits", "done", "done", "done", "done"},
		{"use what the server inherited", "done", "EBADF", "EBADF", "EBADF"},
		{"trace", "", "", "EPERM", "EPERM"},
		{"signal", "done", "done", "EPERM", "EPERM"},
		{"signal without Landlock", "", "EPERM", "EPERM", "EPERM"},
		{"signal itself", "done", "done", "done", "done"},
		{"use io_uring", "", "", "EPERM", "EPERM"},
		{"read keys", "", "", "EPERM", "EPERM"},
		{"be dumped", "", "EPERM", "EPERM", "EPERM"},
		{"gain privileges", "done", "EPERM", "EPERM", "EPERM"},
		{"open many files", "", "EMFILE", "EMFILE", "EMFILE"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			for _, m := range []struct {
				mode    string
				network bool
				want    string
			}{{SandboxOff, false, tc.off}, {SandboxBasic, false, tc.basic}, {SandboxStrict, false, tc.strict}, {SandboxStrict, true, tc.strictNetwork}} {
				if m.want == "" {
					continue
				}
				if got := run(m.mode, m.network, tc.what); got != m.want {
					t.Errorf("mode %s, network %v: %s, want %s", m.mode, m.network, got, m.want)
				}
			}
		})
	}
}
