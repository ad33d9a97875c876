package slot

import (
	"errors"
	"fmt"
	"os"
)

const (
	autobootFile = "autoboot.txt"
	autobootTemp = "autoboot.new"
)

// autobootText is what autoboot.txt holds. It is of the same length for both slots, so that one sector changes, and in
// it two digits: a sector that was written in part starts one of the two slots as well.
func autobootText(part int) []byte {
	return fmt.Appendf(nil, "[all]\ntryboot_a_b=1\nboot_partition=%d\n[tryboot]\nboot_partition=%d\n", part, Other(part))
}

// parseAutoboot returns the default slot. Nothing but what autobootText gives is taken.
func parseAutoboot(b []byte) (int, error) {
	for _, part := range []int{PartA, PartB} {
		if string(b) == string(autobootText(part)) {
			return part, nil
		}
	}
	return 0, ErrAutoboot
}

// files are the files of the configuration partition's top directory. Each change is on the card when its call returns.
type files interface {
	ReadFile(name string) ([]byte, error)
	Overwrite(name string, b []byte) error // of the same length as what it holds
	Create(name string, b []byte) error    // in place of what is there
	// Replace gives a file another name, which may be taken. The clusters of the one that had it are not free before the
	// new name is on the card: a cut would leave the old name to clusters that belong to nobody.
	Replace(old, name string) error
}

// setDefault writes autoboot.txt and reads it back.
func (s *Slots) setDefault(part int) error {
	text := autobootText(part)
	err := s.m.config(func(dir files) error {
		old, err := dir.ReadFile(autobootFile)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return replace(dir, old, text)
	})
	if err != nil {
		return fmt.Errorf("%w: write autoboot.txt: %w; if this stays so, write another card", ErrCard, err)
	}
	got, err := s.m.readConfig(autobootFile)
	if err != nil || string(got) != string(text) {
		return fmt.Errorf("%w: autoboot.txt reads back as something else (%v); write another card", ErrCard, err)
	}
	s.log.Info("set the default slot", "partition", part)
	return nil
}

// replace makes text the content of autoboot.txt. One of our own texts is overwritten in place: that changes one sector
// of data and neither allocation table nor directory, so there is no state in between in which the file is missing. What
// is there in place of our own is replaced by a file that is whole before it gets the name.
func replace(dir files, old, text []byte) error {
	if len(old) == len(text) {
		return dir.Overwrite(autobootFile, text)
	}
	if err := dir.Create(autobootTemp, text); err != nil {
		return err
	}
	return dir.Replace(autobootTemp, autobootFile)
}
