package fatimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ulikunitz/xz"
)

const partStart = 1 << 20 // of the test's configuration partition

// tool runs a program that others wrote, by which our own is judged.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), "MTOOLS_SKIP_CHECK=1", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if p, err := exec.LookPath("/usr/sbin/" + name); err == nil {
		cmd.Path, cmd.Err = p, nil
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// makeImage makes an image as a release's: a partition table with our signature and, as first partition, a FAT16 file system of
// dosfstools with some files of mtools.
func makeImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	part := filepath.Join(dir, "part")
	tool(t, "mkfs.vfat", "-C", "-F", "16", "-s", "1", "-n", "KEYHAVEN", "-i", "12345678", part, "4096")
	for name, text := range map[string]string{"autoboot.txt": "[all]\n", "keyhaven.yaml": "# fill me in\n", "README.txt": strings.Repeat("read me\n", 1000),
		"A rather long name of a file.text": "long"} {
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		tool(t, "mcopy", "-i", part, file, "::"+name)
	}
	b, err := os.ReadFile(part)
	if err != nil {
		t.Fatal(err)
	}
	head := make([]byte, partStart)
	binary.LittleEndian.PutUint32(head[440:], signature)
	head[446+4] = 0x0e
	binary.LittleEndian.PutUint32(head[446+8:], partStart/sector)
	binary.LittleEndian.PutUint32(head[446+12:], uint32(len(b)/sector))
	head[510], head[511] = 0x55, 0xaa
	image := filepath.Join(dir, "image.img")
	if err := os.WriteFile(image, append(append(head, b...), make([]byte, 256<<10)...), 0o644); err != nil {
		t.Fatal(err)
	}
	return image
}

func open(t *testing.T, image string) *os.File {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// judge has fsck.vfat look at the partition, and returns it as mtools want it.
func judge(t *testing.T, image string) string {
	t.Helper()
	part := filepath.Join(t.TempDir(), "part")
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > 4<<20 {
		b = b[partStart : partStart+4<<20]
	}
	if err := os.WriteFile(part, b, 0o644); err != nil {
		t.Fatal(err)
	}
	tool(t, "fsck.vfat", "-n", part)
	return part
}

func TestPersonalise(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	for i, config := range []string{"hostname: a\n", strings.Repeat("# a long file\n", 2000), ""} {
		if err := Personalise(open(t, image), []byte(config), time.Date(2026, 5, 6, 7, 8, 10, 0, time.UTC)); err != nil {
			t.Fatal(err)
		}
		part := judge(t, image)
		if got := tool(t, "mtype", "-i", part, "::keyhaven.yaml"); got != config {
			t.Errorf("%d: mtools read %d bytes, want %d", i, len(got), len(config))
		}
		if got := tool(t, "mdir", "-i", part, "::"); strings.Count(got, "keyhaven.yaml") != 1 || !strings.Contains(got, "2026-05-06") || !strings.Contains(got, "autoboot txt") {
			t.Errorf("%d: the directory is\n%s", i, got)
		}
	}
}

// A file that is replaced leaves nothing behind: it may have held a token.
func TestPersonaliseForgets(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	f := open(t, image)
	for _, config := range []string{"token: canary\n", "hostname: a\n"} {
		if err := Personalise(f, []byte(config), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if b, err := os.ReadFile(image); err != nil || bytes.Contains(b, []byte("canary")) {
		t.Error("the image holds what was replaced")
	}
}

func TestManyFiles(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	v, _, err := Find(open(t, image))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{}
	for i := range 30 {
		name := fmt.Sprintf("file with a long name %d%s", i%20, strings.Repeat(".x", i%20%4))
		want[name] = strings.Repeat("x", i*i*3)
		if err := v.WriteFile(name, []byte(want[name]), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	part := judge(t, image)
	for name, text := range want {
		if got, err := v.ReadFile(strings.ToUpper(name)); err != nil || string(got) != text {
			t.Errorf("%s: %d bytes, want %d, %v", name, len(got), len(text), err)
		}
		if got := tool(t, "mtype", "-i", part, "::"+name); got != text {
			t.Errorf("%s: mtools read %d bytes, want %d", name, len(got), len(text))
		}
	}
	names, err := v.Names()
	if err != nil || len(names) != 24 || !slices.Contains(names, "A rather long name of a file.text") || !slices.Contains(names, "autoboot.txt") {
		t.Errorf("%q, %v", names, err)
	}
}

func TestFull(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	v, _, err := Find(open(t, image))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; err == nil; i++ {
		err = v.WriteFile(fmt.Sprintf("%d", i), make([]byte, MaxFile), time.Now())
	}
	if !strings.Contains(err.Error(), "is full; delete") {
		t.Error(err)
	}
	judge(t, image)
	image = makeImage(t)
	if v, _, err = Find(open(t, image)); err != nil {
		t.Fatal(err)
	}
	for i := 0; err == nil; i++ {
		err = v.WriteFile(fmt.Sprintf("%d", i), nil, time.Now())
	}
	if !strings.Contains(err.Error(), "directory of the configuration partition is full") {
		t.Error(err)
	}
	judge(t, image)
}

func TestRefused(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	f := open(t, image)
	v, _, err := Find(f)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.ReadFile("nothing"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	for _, name := range []string{"", "a/b", "a\nb", "a.", strings.Repeat("x", 300)} {
		if err := v.WriteFile(name, nil, time.Now()); err == nil {
			t.Errorf("%q is taken as a name", name)
		}
	}
	if err := v.WriteFile("KEYHAVEN.yml", nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := Personalise(f, nil, time.Now()); err == nil || !strings.Contains(err.Error(), "KEYHAVEN.yml") {
		t.Errorf("two configurations: %v", err)
	}
	if _, err := f.WriteAt([]byte{0}, 440); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Find(f); !errors.Is(err, ErrNotOurs) {
		t.Errorf("another image: %v", err)
	}
	if _, _, err := Find(&memory{}); !errors.Is(err, ErrNotOurs) {
		t.Errorf("nothing: %v", err)
	}
}

func TestCopy(t *testing.T) {
	t.Parallel()
	image := makeImage(t)
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	w, err := xz.NewWriter(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(raw); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"image.img.xz": packed.Bytes(), "image.img": raw} {
		from, to := filepath.Join(dir, name), filepath.Join(dir, name+".out")
		if err := os.WriteFile(from, b, 0o644); err != nil {
			t.Fatal(err)
		}
		f, err := Copy(from, to)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v", name, info.Mode(), err)
		}
		if got, err := os.ReadFile(to); err != nil || !bytes.Equal(got, raw) {
			t.Errorf("%s: the copy differs, %v", name, err)
		}
		if _, err := Copy(from, to); !errors.Is(err, fs.ErrExist) {
			t.Errorf("%s: a file that is there: %v", name, err)
		}
		if err := KeepPartition(f); err != nil {
			t.Fatal(err)
		}
		if _, p, err := Find(f); err != nil || p.Start != 0 {
			t.Errorf("the partition alone: %v", err)
		}
		if err := Personalise(f, []byte("hostname: b\n"), time.Now()); err != nil {
			t.Error(err)
		}
		judge(t, to)
	}
	bad := filepath.Join(dir, "bad.img.xz")
	if err := os.WriteFile(bad, packed.Bytes()[:packed.Len()/2], 0o644); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(dir, "out")
	if _, err := Copy(bad, out); err == nil || !strings.Contains(err.Error(), "fetch it again") {
		t.Errorf("half an image: %v", err)
	}
	if _, err := os.Stat(out); !errors.Is(err, fs.ErrNotExist) {
		t.Error("half an image is left behind")
	}
}

// A memory is a device of 64 MiB: b, then zeros.
type memory struct {
	b       []byte
	written map[int64]byte
}

func (m *memory) ReadAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > 64<<20 {
		return 0, io.EOF
	}
	clear(p)
	if at < int64(len(m.b)) {
		copy(p, m.b[at:])
	}
	if len(m.written) > 0 {
		for i := range p {
			if b, ok := m.written[at+int64(i)]; ok {
				p[i] = b
			}
		}
	}
	return len(p), nil
}

func (m *memory) WriteAt(p []byte, at int64) (int, error) {
	if at < 0 || at+int64(len(p)) > 64<<20 {
		return 0, io.ErrShortWrite
	}
	if at == 0 {
		return 0, errors.New("it writes over the head")
	}
	for i, b := range p {
		if int64(i)+at < int64(len(m.b)) || b != 0 {
			m.written[at+int64(i)] = b
		}
	}
	return len(p), nil
}

// A card may hold anything in place of a file system.
func FuzzVolume(f *testing.F) {
	head := make([]byte, 4096)
	copy(head[11:], []byte{0, 2, 1, 1, 0, 1, 64, 0, 0, 0, 0xf8, 17, 0})
	binary.LittleEndian.PutUint16(head[19:], 4200)
	copy(head[43:], "KEYHAVEN   ")
	head[510], head[511] = 0x55, 0xaa
	f.Add(head)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &memory{b: b[:min(len(b), 64<<10)], written: map[int64]byte{}}
		v, err := Open(m, 0)
		if err != nil {
			return
		}
		names, err := v.Names()
		if err != nil {
			return
		}
		for _, n := range names[:min(len(names), 8)] {
			_, _ = v.ReadFile(n) // it ends
		}
		if v.WriteFile("keyhaven.yaml", []byte("hostname: a\n"), time.Now()) != nil {
			return
		}
		if got, err := v.ReadFile("keyhaven.yaml"); err != nil || string(got) != "hostname: a\n" {
			t.Errorf("what was written reads as %q, %v", got, err)
		}
	})
}
