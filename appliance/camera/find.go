package camera

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
)

var (
	firstOf = regexp.MustCompile(`-video-index0$`)
	node    = regexp.MustCompile(`^video([0-9]{1,3})$`)
)

// Find returns the device to take for auto, by its name below /dev/v4l/by-id if it has one, as that stays the same however
// it is plugged in, and whether there is one. If there is none, the name is that of the first that would be there. root is
// what the devices' directory is below, "" outside tests; captures tells cameras from other video devices, and is [Captures]
// if nil.
func Find(root string, captures func(path string) bool) (path string, ok bool) {
	if captures == nil {
		captures = Captures
	}
	for _, dir := range []string{"/dev/v4l/by-id", "/dev"} {
		for _, name := range names(filepath.Join(root, dir), dir == "/dev") {
			path := filepath.Join(dir, name)
			if device.MatchString(path) && captures(filepath.Join(root, path)) {
				return path, true
			}
		}
	}
	return "/dev/video0", false
}

// names lists a directory's cameras in the order in which to try them.
func names(dir string, nodes bool) (list []string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if nodes && node.MatchString(e.Name()) || !nodes && firstOf.MatchString(e.Name()) {
			list = append(list, e.Name())
		}
	}
	if nodes {
		slices.SortFunc(list, func(a, b string) int { return number(a[len("video"):]) - number(b[len("video"):]) })
	}
	return list
}
