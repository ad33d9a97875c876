package tunnel

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode"
	"unicode/utf8"
)

// An item is
//
//	0      tag (u8)
//	1..2   length n (u16)
//	3..    value (n bytes)
//
// See SPEC.md, "Items".
const (
	itemHeaderLen = 3
	// tagSkippable: receivers skip unknown tags from here on and refuse unknown ones below.
	tagSkippable = 0x80
)

// errMalformed is what every decoder's error wraps.
var errMalformed = errors.New("malformed")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, args...))
}

// appendItem appends a non-empty value; empty ones are absent.
func appendItem[T string | []byte](dst []byte, tag byte, value T) []byte {
	if len(value) == 0 {
		return dst
	}
	dst = append(dst, tag, byte(len(value)>>8), byte(len(value)))
	return append(dst, value...)
}

// items walks over encoded items and checks their order.
type items struct {
	rest []byte
	last int // the previous tag, -1 before the first
	list func(tag byte) bool
}

func readItems(b []byte, list func(tag byte) bool) items {
	return items{rest: b, last: -1, list: list}
}

// next returns the next item; ok is false at the end.
func (it *items) next() (tag byte, value []byte, ok bool, err error) {
	if len(it.rest) == 0 {
		return 0, nil, false, nil
	}
	if len(it.rest) < itemHeaderLen {
		return 0, nil, false, malformed("item cut short")
	}
	tag = it.rest[0]
	n := int(binary.BigEndian.Uint16(it.rest[1:]))
	if n == 0 {
		return 0, nil, false, malformed("item 0x%02x is empty", tag)
	}
	if n > len(it.rest)-itemHeaderLen {
		return 0, nil, false, malformed("item 0x%02x is longer than what holds it", tag)
	}
	repeated := int(tag) == it.last && it.list != nil && it.list(tag)
	if int(tag) <= it.last && !repeated {
		return 0, nil, false, malformed("item 0x%02x is repeated or out of order", tag)
	}
	it.last = int(tag)
	value = it.rest[itemHeaderLen : itemHeaderLen+n]
	it.rest = it.rest[itemHeaderLen+n:]
	return tag, value, true, nil
}

// unknownItem is what to do with a tag that the decoder does not know.
func unknownItem(tag byte) error {
	if tag >= tagSkippable {
		return nil
	}
	return malformed("unknown item 0x%02x", tag)
}

// checkText checks text that people will read: UTF-8, no control characters, at most limit bytes.
func checkText(s string, limit int) error {
	if len(s) > limit {
		return malformed("text of %d bytes, at most %d allowed", len(s), limit)
	}
	if !utf8.ValidString(s) {
		return malformed("text is not UTF-8")
	}
	for _, r := range s {
		if unicode.IsControl(r) {
			return malformed("text has a control character")
		}
	}
	return nil
}
