package install

import (
	"io/fs"
	"syscall"
)

// A stamp changes whenever a file does: no program can put back the time of the last change of its inode.
type stamp struct {
	device, inode      uint64
	size, mtime, ctime int64
}

func stampOf(info fs.FileInfo) stamp {
	s := stamp{size: info.Size(), mtime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.device, s.inode, s.ctime = uint64(st.Dev), st.Ino, st.Ctim.Nano() //nolint:unconvert // not on every architecture
	}
	return s
}
