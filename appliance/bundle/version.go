package bundle

import (
	"cmp"
	"errors"
	"regexp"
	"strconv"
	"strings"
)

// A Version is what a version's text says, by Semantic Versioning 2.0.0. Build metadata is left out: it does not order.
type Version struct {
	Major, Minor, Patch uint64
	Pre                 []string
}

var semver = regexp.MustCompile(`^(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})(?:-([0-9A-Za-z.-]{1,64}))?(?:\+[0-9A-Za-z.-]{1,64})?$`)

// ParseVersion reads a version such as 1.2.3 or 0.5.0-dev.12+g1a2b3c.
func ParseVersion(s string) (Version, error) {
	m := semver.FindStringSubmatch(s)
	if m == nil {
		return Version{}, errors.New("not a version like 1.2.3 or 1.2.3-rc.1")
	}
	var v Version
	for i, n := range []*uint64{&v.Major, &v.Minor, &v.Patch} {
		*n, _ = strconv.ParseUint(m[i+1], 10, 64) // at most nine digits
	}
	if m[4] == "" {
		return v, nil
	}
	v.Pre = strings.Split(m[4], ".")
	for _, id := range v.Pre {
		if id == "" || number(id) && len(id) > 1 && id[0] == '0' || number(id) && len(id) > 18 {
			return Version{}, errors.New("its part after the hyphen is not as Semantic Versioning says")
		}
	}
	return v, nil
}

// Compare orders two versions as cmp.Compare does. A text that is no version is before all that are.
func Compare(a, b string) int {
	x, errX := ParseVersion(a)
	y, errY := ParseVersion(b)
	switch {
	case errX != nil && errY != nil:
		return 0
	case errX != nil:
		return -1
	case errY != nil:
		return 1
	}
	if c := cmp.Or(cmp.Compare(x.Major, y.Major), cmp.Compare(x.Minor, y.Minor), cmp.Compare(x.Patch, y.Patch)); c != 0 {
		return c
	}
	if len(x.Pre) == 0 || len(y.Pre) == 0 {
		return cmp.Compare(len(y.Pre), len(x.Pre)) // a release is after what led to it
	}
	for i := range min(len(x.Pre), len(y.Pre)) {
		if c := comparePre(x.Pre[i], y.Pre[i]); c != 0 {
			return c
		}
	}
	return cmp.Compare(len(x.Pre), len(y.Pre))
}

func comparePre(a, b string) int {
	switch na, nb := number(a), number(b); {
	case na && nb:
		x, _ := strconv.ParseUint(a, 10, 64)
		y, _ := strconv.ParseUint(b, 10, 64)
		return cmp.Compare(x, y)
	case na:
		return -1
	case nb:
		return 1
	}
	return strings.Compare(a, b)
}

func number(s string) bool {
	return strings.Trim(s, "0123456789") == ""
}
