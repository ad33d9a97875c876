package main

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Bounds of a dpkg status file.
const (
	maxStatus = 64 << 20
	maxLine   = 1 << 20
)

// A debPackage is a package that dpkg's status says is installed.
type debPackage struct {
	name, version, arch, source, homepage, maintainer string
}

// readStatus reads dpkg's status file and returns the installed packages, by name.
func readStatus(r io.Reader) ([]debPackage, error) {
	limited := &io.LimitedReader{R: r, N: maxStatus + 1}
	sc := bufio.NewScanner(limited)
	sc.Buffer(make([]byte, 64<<10), maxLine)
	var out []debPackage
	fields := map[string]string{}
	flush := func() error {
		if len(fields) == 0 {
			return nil
		}
		p := debPackage{fields["package"], fields["version"], fields["architecture"], fields["source"], fields["homepage"], fields["maintainer"]}
		status := strings.Fields(fields["status"])
		clear(fields)
		if p.name == "" {
			return errors.New("a paragraph has no Package")
		}
		if len(status) != 3 || status[2] != "installed" {
			return nil
		}
		if p.version == "" || p.arch == "" {
			return fmt.Errorf("package %q has no Version or Architecture", p.name)
		}
		out = append(out, p)
		return nil
	}
	for n := 1; sc.Scan(); n++ {
		line := sc.Text()
		switch key, value, ok := strings.Cut(line, ":"); {
		case strings.TrimSpace(line) == "":
			if err := flush(); err != nil {
				return nil, fmt.Errorf("line %d: %w", n, err)
			}
		case line[0] == ' ' || line[0] == '\t': // more of the field before, of which none matters here
		case !ok:
			return nil, fmt.Errorf("line %d is no field", n)
		default:
			fields[strings.ToLower(key)] = strings.TrimSpace(value)
		}
	}
	if err := sc.Err(); err != nil {
		return nil, err
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("larger than %d bytes", maxStatus)
	}
	if err := flush(); err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(a, b debPackage) int { return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.arch, b.arch)) })
	return out, nil
}
