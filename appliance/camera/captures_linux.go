package camera

import (
	"encoding/binary"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// From linux/videodev2.h.
const (
	queryCap     = 0x80685600 // VIDIOC_QUERYCAP
	capBytes     = 104        // of struct v4l2_capability
	capabilities = 84         // offset of what the whole device can
	deviceCaps   = 88         // offset of what this node can

	capVideoCapture = 0x1
	capM2M          = 0x8000
	capDeviceCaps   = 0x80000000
)

// Captures reports whether a device file is a camera's picture, rather than its metadata, a codec or an output.
func Captures(path string) bool {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	var caps [capBytes]byte
	raw, err := f.SyscallConn()
	if err != nil {
		return false
	}
	var errno syscall.Errno
	err = raw.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, queryCap, uintptr(unsafe.Pointer(&caps)))
	})
	return err == nil && errno == 0 && isCamera(caps)
}

func isCamera(caps [capBytes]byte) bool {
	can := binary.NativeEndian.Uint32(caps[capabilities:])
	if can&capDeviceCaps != 0 {
		can = binary.NativeEndian.Uint32(caps[deviceCaps:])
	}
	return can&capVideoCapture != 0 && can&capM2M == 0
}
