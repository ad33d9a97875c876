package appliance

import "strings"

// What stands in a file in place of a token that was taken. It is of the token's length, so that it can be written over the
// token where that lies on the card, without a change of the file system's own records. Dots are in no token, so that a token
// that was overwritten in part, because the power went, is known for what it is.
const scrubFill = "removed."

// scrubbed reports whether a text is what was left in place of a token, whole or in part.
func scrubbed(s string) bool { return strings.HasPrefix(s, scrubFill) || strings.Contains(s, "....") }

// filler is what to write over n bytes.
func filler(n int) string {
	return (scrubFill + strings.Repeat(".", n))[:n]
}
