package slot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"
)

// exclusive makes opening a block device fail while it is mounted.
const exclusive = unix.O_EXCL

// lockFile keeps two writers of the configuration partition apart, in one process or several.
const lockFile = "run/keyhaven/config.lock"

// Writable calls do with the directory of the configuration partition, which can be written while do runs: one caller at a
// time, over all processes. It is read-only before and after, and what do wrote is on the card when Writable returns. Root is
// "/" on an appliance; of any other directory, which tests make, nothing is mounted.
func Writable(root string, do func(dir string) error) error {
	dir := filepath.Join(root, configDir)
	lock, err := os.OpenFile(filepath.Join(root, lockFile), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close() // which unlocks
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", lockFile, err)
	}
	if root != "/" {
		return do(dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", dir, err)
	}
	keep := uintptr(fs.Flags)&(unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC) | unix.MS_NOATIME | unix.MS_REMOUNT
	if err := unix.Mount("", dir, "", keep, ""); err != nil {
		return fmt.Errorf("make %s writable: %w; is the card's lock switch set?", dir, err)
	}
	err = do(dir)
	if merr := unix.Mount("", dir, "", keep|unix.MS_RDONLY, ""); merr != nil {
		err = errors.Join(err, fmt.Errorf("make %s read-only again: %w", dir, merr))
	}
	return err
}

// dropCache makes the kernel forget what it has of f in memory, which must be synced.
func dropCache(f *os.File) error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("fadvise: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Mode()&os.ModeDevice == 0 {
		return nil // a file of a test
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKFLSBUF, 0); errno != 0 {
		return fmt.Errorf("BLKFLSBUF: %w", errno)
	}
	return nil
}

func syncDir(f *os.File) error { return f.Sync() }

// restart writes out all file systems and restarts the machine by reboot(2), which the kernel does at once. The firmware reads
// arg as the kernel hands it on.
func (h *host) restart(arg string) error {
	if !h.real() {
		return nil
	}
	unix.Sync()
	if arg == "" {
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	p, err := unix.BytePtrFromString(arg)
	if err != nil {
		return err
	}
	_, _, errno := unix.Syscall6(unix.SYS_REBOOT, unix.LINUX_REBOOT_MAGIC1, unix.LINUX_REBOOT_MAGIC2,
		unix.LINUX_REBOOT_CMD_RESTART2, uintptr(unsafe.Pointer(p)), 0, 0)
	return fmt.Errorf("reboot: %w", errno)
}
