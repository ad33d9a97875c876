package appliance

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// zoneDir holds the time zones of systems that have them as files, as the image does.
var zoneDir = "/usr/share/zoneinfo"

var zoneName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}$`)

// checkZone holds a time zone against those in dir. Where dir has none, its form has to do.
func checkZone(dir, name string) error {
	form := fmt.Errorf("%q is no time zone; write one such as Europe/Berlin or America/New_York, or UTC", curtail(name))
	if len(name) > 64 || !zoneName.MatchString(name) {
		return form
	}
	if _, err := os.Stat(filepath.Join(dir, "Europe", "Berlin")); err != nil {
		return nil
	}
	if info, err := os.Stat(filepath.Join(dir, filepath.FromSlash(name))); err == nil && info.Mode().IsRegular() {
		return nil
	}
	if near := nearestOf(name, zones(dir)); near != "" {
		return fmt.Errorf("%q is no time zone; did you mean %s?", curtail(name), near)
	}
	return form
}

// zones lists the time zones below dir.
func zones(dir string) (list []string) {
	_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error { // what cannot be read is not suggested
		if err != nil {
			return nil
		}
		name := filepath.ToSlash(strings.TrimPrefix(strings.TrimPrefix(p, dir), string(filepath.Separator)))
		if d.IsDir() {
			if name == "posix" || name == "right" {
				return fs.SkipDir
			}
			return nil
		}
		if zoneName.MatchString(name) {
			list = append(list, name)
		}
		return nil
	})
	return list
}
