package appliance

import (
	"regexp"
	"strings"
)

// scrubFill, and dots up to the token's length, stand in a file in place of a token that was taken. The length is kept so
// that it can be written over the token where that lies on the card, without a change of the file system's own records. It
// begins and ends with dots, which no token has, so that a token that was overwritten in part, because the power went, is
// known for what it is.
const scrubFill = ".removed"

// half is a token that was overwritten at its beginning, or at its end.
var half = regexp.MustCompile(`^\.(r(e(m(o(v(e(d\.*)?)?)?)?)?)?)?[A-Za-z0-9_-]+$|^khj1_[A-Za-z0-9_-]*\.{2,}$`)

// filler is what to write over n bytes.
func filler(n int) string { return (scrubFill + strings.Repeat(".", n))[:n] }

// scrubbed reports whether a text is what was left in place of a token, whole or in part.
func scrubbed(s string) bool {
	return s != "" && s[0] == '.' && s == filler(len(s)) || half.MatchString(s)
}
