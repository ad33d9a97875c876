package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyhaven/keyhaven/internal/conf"
)

// A card is what the configuration partition says.
type card struct {
	config *Config  // nil: nothing that can be used
	files  []string // that were read
	faults []string // in the files, a line each
	notes  []string // what a person should know besides
	tokens []string // texts to take off the card: the token, or what is left of one

	contents map[string][]byte // of the files, by what they are called in configDir
}

// readCard reads the files of the card. keyhaven.yaml comes before what the Raspberry Pi Imager wrote. A fault in one file
// makes the whole card unusable, so that the machine is never set up by half of what a person wrote.
func readCard(dir string) card {
	c := card{contents: map[string][]byte{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		c.faults = append(c.faults, fmt.Sprintf("the card cannot be read (%v); take it out, look at it with a computer, and put it in again; if that does not help, write the image to another card", unwrapPath(err)))
		return c
	}
	own := c.own(dir, entries)
	var config *Config
	for _, name := range slices.DeleteFunc([]string{own, UserData, NetworkConfig}, func(s string) bool { return s == "" }) {
		b, err := readUpTo(filepath.Join(dir, name), MaxConfig)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		c.files = append(c.files, name)
		if err != nil {
			c.faults = append(c.faults, fmt.Sprintf("%s: cannot be read (%v); look at the card with a computer", name, unwrapPath(err)))
			continue
		}
		parsed, err := Parse(name, b)
		if err != nil {
			c.faults = append(c.faults, faultLines(err)...)
			continue
		}
		c.findTokens(parsed)
		if name == own {
			name = ConfigNames[0]
		}
		c.contents[name] = b
		if config == nil {
			config = parsed
		} else {
			config.complement(parsed)
		}
	}
	if len(c.faults) == 0 {
		c.config = config
	}
	return c
}

// own finds keyhaven.yaml by one of its names, however it is spelt.
func (c *card) own(dir string, entries []fs.DirEntry) string {
	var found []string
	for _, want := range ConfigNames {
		for _, e := range entries {
			if !e.IsDir() && strings.EqualFold(e.Name(), want) {
				found = append(found, e.Name())
			}
		}
	}
	if len(found) == 0 {
		return ""
	}
	if len(found) > 1 {
		c.notes = append(c.notes, fmt.Sprintf("There are several files: %s. The first counts; delete the others.", strings.Join(found, ", ")))
	}
	return found[0]
}

// findTokens notes the token, and what a power cut left of one.
func (c *card) findTokens(parsed *Config) {
	for _, t := range []Secret{parsed.Token, parsed.leftover} {
		if t != "" {
			c.tokens = append(c.tokens, t.Reveal())
		}
	}
}

func faultLines(err error) []string {
	if list, ok := errors.AsType[conf.Errors](err); ok {
		lines := make([]string, len(list))
		for i, e := range list {
			lines[i] = e.Error()
		}
		return lines
	}
	return []string{err.Error()}
}

// unwrapPath takes the paths of this machine out of an error for people.
func unwrapPath(err error) error {
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err
	}
	return err
}

// scrub overwrites the texts wherever they stand in the small files of the card's first level: in keyhaven.yaml, and in what an
// editor left beside it. They are overwritten where they lie, so that they are gone from the card and no record of the file
// system changes. It is an error if a token is still found afterwards.
func scrub(dir string, texts []string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.Size() > MaxConfig {
			continue
		}
		errs = append(errs, scrubFile(filepath.Join(dir, e.Name()), texts))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(readCard(dir).tokens) > 0 {
		return errors.New("it is not written in one piece")
	}
	return nil
}

func scrubFile(path string, texts []string) error {
	b, err := readUpTo(path, MaxConfig)
	if err != nil || !containsAny(b, texts) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(overwritten(b, texts), 0) // of the same length
	return errors.Join(err, f.Sync(), f.Close())
}

// WriteCard puts a keyhaven.yaml on the card of the appliance at root, in place of the one that is there, whatever the name of
// that. The caller has checked it.
func WriteCard(root string, config []byte) error {
	h := Host{Root: root}.withDefaults()
	return h.Writable(func(dir string) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		if err := writeCard(filepath.Join(dir, ConfigNames[0]), config); err != nil {
			return err
		}
		for _, e := range entries {
			isOld := slices.ContainsFunc(ConfigNames, func(n string) bool { return strings.EqualFold(n, e.Name()) })
			if isOld && !strings.EqualFold(e.Name(), ConfigNames[0]) {
				if _, err := remove(filepath.Join(dir, e.Name())); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// overwritten is a file as scrub leaves it.
func overwritten(b []byte, texts []string) []byte {
	for _, t := range texts {
		for i, f := range forms(t) {
			b = bytes.ReplaceAll(b, f, forms(filler(len(t)))[i])
		}
	}
	return b
}

// forms are a text as UTF-8 and as UTF-16, which some editors write: without the zero that is before the first letter or
// behind the last, as the order of the bytes may be.
func forms(s string) [][]byte {
	wide := make([]byte, max(2*len(s)-1, 0))
	for i := range len(s) {
		wide[2*i] = s[i]
	}
	return [][]byte{[]byte(s), wide}
}

func containsAny(b []byte, texts []string) bool {
	return slices.ContainsFunc(texts, func(t string) bool {
		return slices.ContainsFunc(forms(t), func(f []byte) bool { return bytes.Contains(b, f) })
	})
}
