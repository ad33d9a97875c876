package install

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"aead.dev/minisign"
)

const (
	listName     = "SHA256SUMS"
	listSigName  = listName + ".minisig"
	maxList      = 4 << 20 // bytes
	maxSignature = 4 << 10
	maxName      = 512
)

// ParseKey reads a public key of minisign: the line of its file that is no comment, or the whole file's text.
func ParseKey(text string) (minisign.PublicKey, error) {
	var k minisign.PublicKey
	if err := k.UnmarshalText([]byte(strings.TrimSpace(text))); err != nil {
		return k, fmt.Errorf("not a public key of minisign, such as RWQ… from a .pub file: %w", err)
	}
	return k, nil
}

// A list is what is served: SHA-256 in hexadecimal by path.
type list map[string]string

// parseList reads SHA256SUMS, as sha256sum writes it. Every line must name a file below the directory, once and in its
// shortest form.
func parseList(b []byte) (list, error) {
	l := list{}
	for n, sc := 1, bufio.NewScanner(bytes.NewReader(b)); ; n++ {
		if !sc.Scan() {
			if err := sc.Err(); err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
			break
		}
		sum, name, ok := strings.Cut(sc.Text(), "  ")
		if raw, err := hex.DecodeString(sum); !ok || err != nil || len(raw) != 32 || strings.ToLower(sum) != sum {
			return nil, fmt.Errorf("line %d is not a SHA-256 and a file", n)
		}
		name = strings.TrimPrefix(name, "./")
		switch _, twice := l[name]; {
		case len(name) > maxName || !fs.ValidPath(name) || name == "." || strings.ContainsFunc(name, control) || strings.Contains(name, `\`):
			return nil, fmt.Errorf("line %d: %q is not the path of a file of the directory", n, name)
		case twice:
			return nil, fmt.Errorf("line %d: %q is there twice", n, name)
		case name == listName || name == listSigName || name == scriptName:
			return nil, fmt.Errorf("line %d: %q cannot be in the list", n, name)
		}
		l[name] = sum
	}
	if len(l) == 0 {
		return nil, errors.New("it names no file")
	}
	return l, nil
}

func control(r rune) bool { return r < ' ' || r == 0x7f }

// readList reads and verifies the directory's list.
func readList(root *os.Root, keys []minisign.PublicKey) (list, error) {
	b, err := readFile(root, listName, maxList)
	if err != nil {
		return nil, err
	}
	sig, err := readFile(root, listSigName, maxSignature)
	if err != nil {
		return nil, err
	}
	verified := false
	for _, k := range keys {
		verified = verified || minisign.Verify(k, b, sig)
	}
	if !verified {
		return nil, fmt.Errorf("%s: the signature in %s is of none of the configured keys, or of another list", listName, listSigName)
	}
	l, err := parseList(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", listName, err)
	}
	return l, nil
}

func readFile(root *os.Root, name string, limit int64) ([]byte, error) {
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", name, limit)
	}
	return b, err
}

// under lists the paths of a folder that match a pattern of its own.
func (l list) match(pattern string) (names []string) {
	for name := range l {
		if ok, _ := path.Match(pattern, name); ok { //nolint:errcheck // the patterns are constants
			names = append(names, name)
		}
	}
	return names
}
