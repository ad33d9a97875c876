package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// A FAT is a copy of a FAT partition in a file, which mtools read and change.
type FAT struct{ file string }

// Extract copies a partition, from 1, off a disk into a file.
func Extract(d *Disk, part int, file string) (*FAT, error) {
	p, err := d.Partition(part)
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := copySparse(f, io.NewSectionReader(d, p.Off, p.Size), p.Size); err != nil {
		return nil, err
	}
	return &FAT{file}, f.Close()
}

// copySparse leaves out what is zero.
func copySparse(f *os.File, r io.Reader, size int64) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < size; {
		n, err := io.ReadFull(r, buf[:min(int64(len(buf)), size-off)])
		if err != nil {
			return err
		}
		if !bytes.Equal(buf[:n], zeros[:n]) {
			if _, err := f.WriteAt(buf[:n], off); err != nil {
				return err
			}
		}
		off += int64(n)
	}
	return f.Truncate(size)
}

// Store copies what changed back onto a disk.
func (v *FAT) Store(d *Disk, part int) error {
	p, err := d.Partition(part)
	if err != nil {
		return err
	}
	f, err := os.Open(v.file)
	if err != nil {
		return err
	}
	defer f.Close()
	is, was := make([]byte, blockSize), make([]byte, blockSize)
	for off := int64(0); off < p.Size; off += blockSize {
		n := min(blockSize, p.Size-off)
		if _, err := f.ReadAt(is[:n], off); err != nil {
			return err
		}
		if _, err := d.ReadAt(was[:n], p.Off+off); err != nil {
			return err
		}
		if bytes.Equal(is[:n], was[:n]) {
			continue
		}
		if _, err := d.WriteAt(is[:n], p.Off+off); err != nil {
			return err
		}
	}
	return nil
}

// ErrNoFile says that a FAT has no file of a name.
var ErrNoFile = errors.New("no such file")

// Read returns a file. If it is not there, the error is ErrNoFile.
func (v *FAT) Read(name string) ([]byte, error) {
	out, err := v.mtool(nil, "mtype", "::"+name)
	if err != nil && strings.Contains(err.Error(), "not found") {
		return nil, fmt.Errorf("qemu: %s: %w", name, ErrNoFile)
	}
	return out, err
}

// Write puts a file in, in the place of an older one of the name.
func (v *FAT) Write(name string, b []byte) error {
	_, err := v.mtool(bytes.NewReader(b), "mcopy", "-o", "-", "::"+name)
	return err
}

// Remove takes a file away.
func (v *FAT) Remove(name string) error {
	_, err := v.mtool(nil, "mdel", "::"+name)
	return err
}

// Check has fsck.vfat judge the file system.
func (v *FAT) Check() error {
	if out, err := exec.Command("fsck.vfat", "-n", v.file).CombinedOutput(); err != nil {
		return fmt.Errorf("fsck.vfat: %w: %s", err, out)
	}
	return nil
}

func (v *FAT) mtool(in io.Reader, name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, append([]string{"-i", v.file}, args...)...)
	var out, errs bytes.Buffer
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("qemu: %s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.Bytes(), nil
}
