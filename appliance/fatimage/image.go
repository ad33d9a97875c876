package fatimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/ulikunitz/xz"
)

// signature is the disk signature of every Keyhaven image, and label the one of its configuration partition.
const (
	signature = 0x4b485631
	label     = "KEYHAVEN"
)

// ErrNotOurs says that an image or a card is none of Keyhaven.
var ErrNotOurs = errors.New("is no image of Keyhaven; take the .img or .img.xz of a release")

// A Part is the place of the configuration partition on a device, in bytes.
type Part struct{ Start, Size int64 }

// Find finds the configuration partition of an image or of a card. A device that is that partition alone is taken too.
func Find(dev Device) (*Volume, Part, error) {
	b := make([]byte, sector)
	if _, err := dev.ReadAt(b, 0); err != nil {
		return nil, Part{}, fmt.Errorf("%w (%w)", ErrNotOurs, err)
	}
	p := Part{}
	if b[510] == 0x55 && b[511] == 0xaa && binary.LittleEndian.Uint32(b[440:]) == signature {
		p = Part{int64(binary.LittleEndian.Uint32(b[446+8:])) * sector, int64(binary.LittleEndian.Uint32(b[446+12:])) * sector}
	}
	v, err := Open(dev, p.Start)
	switch {
	case err != nil && p.Start > 0:
		return nil, p, fmt.Errorf("its configuration partition is damaged: %w; write the image anew", err)
	case err != nil, v.Label() != label:
		return nil, p, ErrNotOurs
	}
	return v, p, nil
}

// ConfigName is the file that [Personalise] writes.
const ConfigName = "keyhaven.yaml"

// other are names under which a device would find another configuration, which must not be there.
var other = []string{"keyhaven.yml", "keyhaven.yaml.txt", "keyhaven.txt"}

// Personalise writes keyhaven.yaml into the configuration partition of a device.
func Personalise(dev Device, config []byte, when time.Time) error {
	v, _, err := Find(dev)
	if err != nil {
		return err
	}
	names, err := v.Names()
	if err != nil {
		return err
	}
	for _, n := range names {
		for _, o := range other {
			if strings.EqualFold(n, o) {
				return fmt.Errorf("there is a file %s, too, so that the device would have two; delete it", n)
			}
		}
	}
	if err := v.WriteFile(ConfigName, config, when); err != nil {
		return err
	}
	back, err := v.ReadFile(ConfigName)
	if err != nil {
		return err
	}
	if !bytes.Equal(back, config) {
		return errors.New("what was written reads back as something else; is the card worn out?")
	}
	return nil
}

// maxImage bounds an image, in bytes: what is said to be one and goes on for ever ends there.
const maxImage = 64 << 30

// Copy writes an image to a file that it makes, readable by its owner alone: the image holds a token afterwards. An image that ends in
// .xz is unpacked. What is zero takes no room. The file is open for reading and writing.
func Copy(image, output string) (_ *os.File, err error) {
	in, err := os.Open(image)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	var r io.Reader = in
	if strings.HasSuffix(strings.ToLower(image), ".xz") {
		if r, err = xz.NewReader(in); err != nil {
			return nil, fmt.Errorf("%s: %w; fetch it again", image, err)
		}
	}
	out, err := os.OpenFile(output, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	if err := sparse(out, r); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", image, err), out.Close(), os.Remove(output))
	}
	return out, nil
}

// sparse copies r to a new file.
func sparse(out *os.File, r io.Reader) error {
	buf, zero := make([]byte, 256<<10), make([]byte, 256<<10)
	for at := int64(0); ; {
		n, err := fill(r, buf)
		if n > 0 && !bytes.Equal(buf[:n], zero[:n]) {
			if _, err := out.WriteAt(buf[:n], at); err != nil {
				return err
			}
		}
		at += int64(n)
		switch {
		case at > maxImage:
			return fmt.Errorf("is larger than %d GiB; is it an image?", maxImage>>30)
		case err == io.EOF:
			return out.Truncate(at)
		case err != nil:
			return fmt.Errorf("%w; fetch it again", err)
		}
	}
}

// fill is io.ReadFull that tells the end of r from its being cut off.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

// KeepPartition leaves of an image the configuration partition alone, at the file's beginning.
func KeepPartition(f *os.File) error {
	_, p, err := Find(f)
	if err != nil || p.Start == 0 {
		return err
	}
	buf := make([]byte, 256<<10)
	for at := int64(0); at < p.Size; {
		n, err := f.ReadAt(buf[:min(int64(len(buf)), p.Size-at)], p.Start+at)
		if n == 0 {
			return errors.Join(errors.New("the image ends within its configuration partition"), err)
		}
		if _, err := f.WriteAt(buf[:n], at); err != nil {
			return err
		}
		at += int64(n)
	}
	return f.Truncate(p.Size)
}
