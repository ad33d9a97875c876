package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// disk is what the writer needs of a file system, so that tests can make it fail.
type disk interface {
	// create makes a new file to append to. With again set it may exist, and is emptied: it is one that was begun in vain.
	create(path string, again bool) (file, error)
	// syncDir makes what was created in dir durable.
	syncDir(dir string) error
}

// file is an open file of the log.
type file interface {
	io.WriteCloser
	Truncate(size int64) error
	Stat() (fs.FileInfo, error)
	// datasync makes what was written durable.
	datasync() error
}

type realDisk struct{}

type realFile struct{ *os.File }

func (realDisk) create(path string, again bool) (file, error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND | os.O_EXCL
	if again {
		flags = os.O_WRONLY | os.O_CREATE | os.O_APPEND | os.O_TRUNC | noFollow
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return nil, err
	}
	return realFile{f}, nil
}

func (realDisk) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// The names in the directory.
const (
	filePrefix = "audit-"
	fileSuffix = ".jsonl"
	headFile   = "audit-head.json"
	repairFile = "audit-repair"
	lockFile   = "audit.lock"
)

// maxNumber is the highest number of a file.
const maxNumber = math.MaxInt32

func fileName(number int) string { return fmt.Sprintf("%s%08d%s", filePrefix, number, fileSuffix) }

// fileNumber is the reverse of fileName; 0 for any other name.
func fileNumber(name string) int {
	digits, ok := strings.CutPrefix(name, filePrefix)
	if !ok {
		return 0
	}
	if digits, ok = strings.CutSuffix(digits, fileSuffix); !ok {
		return 0
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 1 || n > maxNumber || fileName(n) != name {
		return 0
	}
	return n
}

// listFiles returns the names of a directory's log files in order.
func listFiles(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if fileNumber(e.Name()) > 0 {
			names = append(names, e.Name())
		}
	}
	slices.SortFunc(names, func(a, b string) int { return fileNumber(a) - fileNumber(b) })
	return names, nil
}

// openRead opens a file to read it. What is no regular file, and could make the reader wait without end, is an error.
func openRead(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &os.PathError{Op: "open", Path: path, Err: errors.New("is no regular file; move it away")}
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// writeAtomic puts a file in place of another, durably and in one step.
func writeAtomic(path string, content []byte, mode fs.FileMode) error {
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Chmod(mode) // whatever the umask is
	}
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return realDisk{}.syncDir(filepath.Dir(path))
}

// remedy says what an operator can do about an error of the disk.
func remedy(err error) string {
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "make room on the file system, or move files that are closed elsewhere; writing goes on by itself"
	case errors.Is(err, syscall.EROFS):
		return "mount the file system for writing; writing goes on by itself"
	case errors.Is(err, fs.ErrPermission):
		return "let the server's user write there; writing goes on by itself"
	case errors.Is(err, fs.ErrNotExist):
		return "put the directory back; writing goes on by itself"
	case errors.Is(err, fs.ErrExist):
		return "this server did not make that file: move it away"
	case errors.Is(err, syscall.EIO):
		return "look after the disk; writing goes on in a new file as soon as the disk allows"
	}
	return "writing is tried again"
}
