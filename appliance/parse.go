package appliance

import (
	"bytes"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/keyhaven/keyhaven/internal/conf"
)

// parseOwn reads keyhaven.yaml.
func parseOwn(name string, b []byte) (*Config, error) {
	text, err := plainText(name, b)
	if err != nil {
		return nil, err
	}
	c := &Config{}
	f, err := conf.Decode(c, text)
	if err != nil {
		return nil, explain(name, text, err)
	}
	var errs conf.Errors
	c.complete(func(key, format string, args ...any) { errs = append(errs, f.Errorf(key, format, args...)) })
	if len(errs) > 0 {
		return nil, explain(name, text, errs)
	}
	return c, nil
}

// plainText returns what an editor saved as UTF-8 with plain line ends, or says why that cannot be.
func plainText(name string, b []byte) ([]byte, error) {
	fail := func(msg string) ([]byte, error) { return nil, conf.Errors{&conf.Error{File: name, Msg: msg}} }
	if len(b) > MaxConfig {
		return fail(fmt.Sprintf("is larger than %d KiB; is this the right file? keyhaven.yaml is a short text", MaxConfig>>10))
	}
	b = fromUTF16(b)
	b = bytes.TrimPrefix(b, []byte("\ufeff"))
	b = bytes.ReplaceAll(b, []byte("\r\n"), []byte("\n"))
	b = bytes.ReplaceAll(b, []byte("\r"), []byte("\n"))
	start := bytes.ToLower(bytes.TrimSpace(b[:min(len(b), 256)]))
	switch {
	case bytes.HasPrefix(start, []byte(`{\rtf`)):
		return fail("is a document with formatting (RTF), not plain text; in TextEdit choose Format, then Make Plain Text, and save it again")
	case bytes.HasPrefix(start, []byte("<")):
		return fail("is a web page, not plain text; save the file itself, not the page that shows it")
	case bytes.HasPrefix(start, []byte("pk\x03\x04")) || bytes.IndexByte(b, 0) >= 0:
		return fail("is not plain text; write it with a text editor (Notepad, TextEdit as plain text, nano), not with a word processor")
	case !utf8.Valid(b):
		line := 1 + bytes.Count(b[:invalidAt(b)], []byte("\n"))
		return nil, conf.Errors{&conf.Error{File: name, Line: line, Msg: "has a letter that is not UTF-8; save the file with the encoding UTF-8"}}
	}
	return b, nil
}

// fromUTF16 decodes what older editors of Windows call Unicode.
func fromUTF16(b []byte) []byte {
	var at func(i int) uint16
	switch {
	case len(b) < 2 || len(b)%2 != 0:
		return b
	case b[0] == 0xff && b[1] == 0xfe:
		at = func(i int) uint16 { return uint16(b[i]) | uint16(b[i+1])<<8 }
	case b[0] == 0xfe && b[1] == 0xff:
		at = func(i int) uint16 { return uint16(b[i])<<8 | uint16(b[i+1]) }
	default:
		return b
	}
	units := make([]uint16, 0, len(b)/2)
	for i := 2; i < len(b); i += 2 {
		units = append(units, at(i))
	}
	return []byte(string(utf16.Decode(units)))
}

func invalidAt(b []byte) int {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return len(b)
}

var (
	urlUser     = regexp.MustCompile(`//[^/\s"]*@`)
	ourPackage  = regexp.MustCompile(`\b(?:vnet|mtls|ingressconf): `) // as Go's errors begin
	tokenText   = regexp.MustCompile(`khj1_[A-Za-z0-9_-]+`)
	quotedText  = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
	unknownText = regexp.MustCompile(`unknown anchor '.*' referenced`)
	noColon     = regexp.MustCompile(`^\s*(?:- )?(token|edges|hostname|timezone|country|ssid|password|address|gateway|service|camera|proxy)(?:[:=]\S|\s*=|\s+[^\s:])`)
)

// explain gives errors the file's name, words for beginners, and takes out what may be secret.
func explain(name string, text []byte, err error) error {
	list, ok := errors.AsType[conf.Errors](err)
	if !ok {
		list = conf.Errors{err}
	}
	lines := strings.Split(string(text), "\n")
	out := make(conf.Errors, 0, len(list))
	for _, e := range list {
		fault, ok := errors.AsType[*conf.Error](e)
		if !ok {
			fault = &conf.Error{Msg: e.Error()}
		}
		fault = &conf.Error{File: name, Line: fault.Line, Key: fault.Key, Msg: ourPackage.ReplaceAllString(fault.Msg, "")}
		if rest, broken := strings.CutPrefix(fault.Msg, "not valid YAML: "); broken {
			explainSyntax(fault, rest, lines)
		}
		hide(fault)
		out = append(out, fault)
	}
	return out
}

// hide takes out of a fault what may be a secret in the wrong place.
func hide(e *conf.Error) {
	if strings.HasPrefix(e.Key, "wifi") || strings.HasPrefix(e.Key, "proxy") {
		unknown := strings.HasPrefix(e.Msg, "unknown key")
		if unknown && !strings.Contains(e.Msg, "did you mean") {
			e.Key, _, _ = strings.Cut(e.Key, ".")
			e.Msg = "has a key here that is not known" + strings.TrimPrefix(e.Msg, "unknown key")
		} else if !unknown && !strings.HasPrefix(e.Key, "wifi.country") {
			e.Msg = quotedText.ReplaceAllString(e.Msg, "this")
		}
	}
	e.Key = tokenText.ReplaceAllString(e.Key, "khj1_…")
	e.Msg = urlUser.ReplaceAllString(tokenText.ReplaceAllString(e.Msg, "khj1_…"), "//…@")
}

// explainSyntax finds what beginners do where YAML only says that it got lost. The parser often notices a mistake a line or
// two late, so lines before the one it names are looked at too.
func explainSyntax(e *conf.Error, reason string, lines []string) {
	first, last := 1, len(lines)
	if e.Line > 0 {
		first, last = max(1, e.Line-2), min(len(lines), e.Line+1)
	}
	for i := first; i <= last; i++ {
		line := lines[i-1]
		indent := line[:len(line)-len(strings.TrimLeft(line, " \t"))]
		if strings.Contains(indent, "\t") && strings.TrimSpace(line) != "" {
			e.Line, e.Msg = i, "the line starts with a tab; YAML takes spaces alone there: replace each tab by two spaces"
			return
		}
	}
	for i := first; i <= last; i++ {
		line := lines[i-1]
		if m := noColon.FindStringSubmatch(line); m != nil {
			e.Line, e.Msg = i, fmt.Sprintf("write %s, a colon, a space, and then the value, such as %s: value", m[1], m[1])
			return
		}
	}
	reason = unknownText.ReplaceAllString(reason, "a value starts with *")
	e.Msg = "this is not valid YAML near here (" + reason + "); check that keys of one group start in the same column, that every key is followed by " +
		"a colon and a space, and put values with one of : # { } [ ] & * ! | > ' \" % @ ` in 'single quotes'"
}
