package worker

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// deniedCalls are system calls that fail with EPERM: to execute programs, to look into other processes and disturb them, to change mounts, namespaces,
// the kernel, its keys and clocks, and ways around all this.
var deniedCalls = []uint32{
	unix.SYS_EXECVE, unix.SYS_EXECVEAT,
	unix.SYS_TKILL, unix.SYS_PIDFD_SEND_SIGNAL, unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_KCMP, unix.SYS_PIDFD_GETFD, unix.SYS_PERF_EVENT_OPEN,
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_CHROOT, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_FSOPEN,
	unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOUNT_SETATTR, unix.SYS_SETNS, unix.SYS_UNSHARE,
	unix.SYS_BPF, unix.SYS_KEXEC_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
	unix.SYS_KEYCTL, unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY,
	unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_USERFAULTFD, unix.SYS_OPEN_BY_HANDLE_AT,
	unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_QUOTACTL, unix.SYS_SYSLOG,
	unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME, unix.SYS_ADJTIMEX, unix.SYS_CLOCK_ADJTIME,
	unix.SYS_SETHOSTNAME, unix.SYS_SETDOMAINNAME, unix.SYS_VHANGUP, unix.SYS_LOOKUP_DCOOKIE, unix.SYS_NFSSERVCTL,
}

// Offsets in struct seccomp_data.
const (
	dataCall     = 0
	dataArch     = 4
	dataArgument = 16 // the low half of the first, on little-endian machines
)

// filter is a seccomp program in the making. See seccomp(2).
type filter []unix.SockFilter

func (f *filter) op(code uint16, k uint32) {
	*f = append(*f, unix.SockFilter{Code: code, K: k})
}

func (f *filter) load(offset uint32) { f.op(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, offset) }

// jump skips yes instructions if the loaded value compares so to k, and no instructions otherwise.
func (f *filter) jump(compare uint16, k uint32, yes, no uint8) {
	*f = append(*f, unix.SockFilter{Code: unix.BPF_JMP | compare | unix.BPF_K, K: k, Jt: yes, Jf: no})
}

func (f *filter) answer(action uint32) { f.op(unix.BPF_RET|unix.BPF_K, action) }

// namespaces are the flags of clone(2) that make one: in a user namespace of its own a process has every privilege.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWUSER | unix.CLONE_NEWPID |
	unix.CLONE_NEWNET

const answerDenied = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)

// onlyFor allows a call if its first argument is the value, and denies it otherwise.
func (f *filter) onlyFor(call, value uint32) {
	f.jump(unix.BPF_JEQ, call, 0, 4)
	f.load(dataArgument)
	f.jump(unix.BPF_JEQ, value, 1, 0)
	f.answer(answerDenied)
	f.answer(unix.SECCOMP_RET_ALLOW)
}

// callFilter returns the program for this architecture and process, nil if there is none.
func callFilter(network bool, pid uint32) filter {
	if nativeArch == 0 {
		return nil
	}
	var f filter
	f.load(dataArch)
	f.jump(unix.BPF_JEQ, nativeArch, 1, 0)
	f.answer(unix.SECCOMP_RET_KILL_PROCESS)
	f.load(dataCall)
	if foreignCalls != 0 {
		f.jump(unix.BPF_JGE, foreignCalls, 0, 1)
		f.answer(answerDenied)
	}
	for _, call := range slices.Concat(deniedCalls, archCalls) {
		f.jump(unix.BPF_JEQ, call, 0, 1)
		f.answer(answerDenied)
	}
	// clone3(2) has its flags in memory, where a filter cannot see them. C libraries fall back to clone.
	f.jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1)
	f.answer(unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS))
	f.jump(unix.BPF_JEQ, unix.SYS_CLONE, 0, 4)
	f.load(dataArgument)
	f.jump(unix.BPF_JSET, namespaces, 0, 1)
	f.answer(answerDenied)
	f.answer(unix.SECCOMP_RET_ALLOW)
	f.onlyFor(unix.SYS_PRLIMIT64, 0) // which is this process
	for _, call := range []uint32{unix.SYS_KILL, unix.SYS_TGKILL, unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO} {
		f.onlyFor(call, pid)
	}
	if !network {
		// socket(2) of any family but Unix and netlink, which tells the host's own addresses.
		f.jump(unix.BPF_JEQ, unix.SYS_SOCKET, 0, 4)
		f.load(dataArgument)
		f.jump(unix.BPF_JEQ, unix.AF_UNIX, 2, 0)
		f.jump(unix.BPF_JEQ, unix.AF_NETLINK, 1, 0)
		f.answer(unix.SECCOMP_RET_ERRNO | uint32(unix.EACCES))
	}
	f.answer(unix.SECCOMP_RET_ALLOW)
	return f
}

// filterCalls puts the filter on all threads of the process.
func filterCalls(network bool) error {
	f := callFilter(network, uint32(os.Getpid()))
	if f == nil {
		return fmt.Errorf("%w: no filter of system calls for %s: set sandbox mode %q", errSandbox, runtime.GOARCH, SandboxBasic)
	}
	prog := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	tid, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("%w: seccomp: %w: set sandbox mode %q if this kernel has none", errSandbox, errno, SandboxBasic)
	}
	if tid != 0 {
		return fmt.Errorf("%w: seccomp: thread %d keeps its own filter", errSandbox, tid)
	}
	runtime.KeepAlive(f)
	return nil
}
