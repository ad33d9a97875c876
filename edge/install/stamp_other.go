//go:build !linux

package install

import "io/fs"

// A stamp changes whenever a file does, unless somebody puts its time back.
type stamp struct {
	name        string
	size, mtime int64
}

func stampOf(info fs.FileInfo) stamp {
	return stamp{info.Name(), info.Size(), info.ModTime().UnixNano()}
}
