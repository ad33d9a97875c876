package reliability

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

const document = "../docs/reliability.md"

// TestDocumentHasTheRows holds the document's table against the rows, and has each explained.
func TestDocumentHasTheRows(t *testing.T) {
	b, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(b), begin)
	table, after, ok := strings.Cut(rest, end)
	if !ok {
		t.Fatalf("%s has no results", document)
	}
	var got []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]+) \\| ([^|]+) \\|").FindAllStringSubmatch(table, -1) {
		got = append(got, strings.Join(m[1:], " | "))
	}
	var want []string
	names := map[string]bool{}
	for _, r := range Rows() {
		if names[r.Name] {
			t.Errorf("two rows are named %s", r.Name)
		}
		names[r.Name] = true
		want = append(want, fmt.Sprintf("%s | %s | %d × %d", r.Name, r.Failure, r.Homes, r.Workers))
		if name := strings.TrimSuffix(r.Name, "-2"); !strings.Contains(before+after, "`"+name+"`") && !strings.Contains(before+after, "`"+r.Name+"`") {
			t.Errorf("%s does not explain %s", document, r.Name)
		}
	}
	if g, w := strings.Join(got, "\n"), strings.Join(want, "\n"); g != w {
		t.Errorf("the document has the rows\n%s\nwant\n%s\nwrite them with: go run ./reliability/cmd/matrix", g, w)
	}
}
