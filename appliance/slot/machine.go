package slot

import (
	"io"
	"os"
	"path/filepath"
	"strconv"
)

// host is the machine itself.
type host struct {
	root string
	boot boot
}

func newMachine(root string, b boot) machine { return &host{root: root, boot: b} }

// real reports whether this is a machine and not a directory that a test made.
func (h *host) real() bool { return h.root == "/" }

// partition returns the device of a partition: the kernel puts a p before the number if the disk's name ends in a digit.
func (h *host) partition(part int) string {
	disk := h.boot.Disk
	if part == 0 {
		return filepath.Join(h.root, disk)
	}
	if c := disk[len(disk)-1]; c >= '0' && c <= '9' {
		disk += "p"
	}
	return filepath.Join(h.root, disk+strconv.Itoa(part))
}

func (h *host) open(part int, write bool) (device, error) {
	flags := os.O_RDONLY
	if write {
		flags = os.O_RDWR | exclusive // refuses a device that is mounted
	}
	f, err := os.OpenFile(h.partition(part), flags, 0)
	if err != nil {
		return nil, err
	}
	return partitionFile{f}, nil
}

// partitionFile is a device by its file.
type partitionFile struct{ *os.File }

func (f partitionFile) Size() (int64, error) { return f.Seek(0, io.SeekEnd) }
func (f partitionFile) Drop() error          { return dropCache(f.File) }

func (h *host) readConfig(name string) ([]byte, error) {
	return readSmall(filepath.Join(h.root, configDir, name))
}

func (h *host) config(do func(files) error) error {
	return Writable(h.root, func(dir string) error { return do(osFiles(dir)) })
}

// osFiles are the files of a directory.
type osFiles string

func (d osFiles) path(name string) string { return filepath.Join(string(d), name) }

func (d osFiles) ReadFile(name string) ([]byte, error) { return readSmall(d.path(name)) }

func (d osFiles) Overwrite(name string, b []byte) error { return d.write(name, os.O_WRONLY, b) }

func (d osFiles) Create(name string, b []byte) error {
	return d.write(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, b)
}

func (d osFiles) write(name string, flags int, b []byte) error {
	f, err := os.OpenFile(d.path(name), flags, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

func (d osFiles) Replace(old, name string) error {
	// While it is open its clusters stay its own.
	if f, err := os.Open(d.path(name)); err == nil {
		defer f.Close()
	}
	if err := os.Rename(d.path(old), d.path(name)); err != nil {
		return err
	}
	dir, err := os.Open(string(d))
	if err != nil {
		return err
	}
	err = syncDir(dir)
	if cerr := dir.Close(); err == nil {
		err = cerr
	}
	return err
}
