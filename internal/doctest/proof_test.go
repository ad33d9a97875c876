package doctest

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	proofRow  = regexp.MustCompile(`(?m)^\| .* \| (.*) \|$`)
	proof     = regexp.MustCompile("`(Test\\w+)(?:/\\w+)?`")
	proofDir  = regexp.MustCompile("in `([a-z0-9/]+)`")
	makeProof = regexp.MustCompile("`make ([a-z-]+)`")
)

// What README.md says to be proved is proved by tests and targets that there are.
func TestProofsExist(t *testing.T) {
	_, text, _ := strings.Cut(page(t, "README.md"), "## What is proved, and by what")
	text, _, _ = strings.Cut(text, "\n## ")
	makefile, err := os.ReadFile(filepath.Join(root(t), "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	tests := 0
	for _, row := range proofRow.FindAllStringSubmatch(text, -1) {
		for _, m := range makeProof.FindAllStringSubmatch(row[1], -1) {
			if !bytes.Contains(makefile, []byte("\n"+m[1]+":")) {
				t.Errorf("%s: there is no such target", m[0])
			}
		}
		for _, part := range strings.Split(row[1], ";") {
			dirs := proofDir.FindAllStringSubmatch(part, -1)
			for _, m := range proof.FindAllStringSubmatch(part, -1) {
				tests++
				if len(dirs) == 0 {
					t.Errorf("%s: its directory is missing", m[0])
				}
				for _, d := range dirs {
					if !hasTest(t, d[1], m[1]) {
						t.Errorf("%s: there is no such test in %s", m[1], d[1])
					}
				}
			}
		}
	}
	if tests < 20 {
		t.Errorf("%d tests were found in the table; adjust this test", tests)
	}
	if hasTest(t, "integration", "TestNoSuch") {
		t.Error("a test that is not there was found")
	}
}

// hasTest reports whether a directory of the tree has a test of this name.
func hasTest(t *testing.T, dir, name string) (found bool) {
	t.Helper()
	files, err := fs.Glob(os.DirFS(filepath.Join(root(t), dir)), "*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(filepath.Join(root(t), dir, file))
		if err != nil {
			t.Fatal(err)
		}
		found = found || bytes.Contains(b, []byte("func "+name+"(t *testing.T)"))
	}
	return found
}
