package archtest

import (
	"encoding/json"
	"errors"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/keyhaven/keyhaven"

// allowed is the table of docs/ARCHITECTURE.md: which packages of ours a package may import. A package's entry also
// holds for its sub-packages; one with a slash is that package alone. Besides, programs may import everything, and everything may import internal/….
var allowed = map[string][]string{
	"keyless":     {},
	"signer":      {"keyless"},
	"pkcs11":      {"signer", "keyless"},
	"transit":     {"signer", "keyless"},
	"mtls":        {},
	"vnet":        {},
	"tunnel":      {"mtls", "vnet"},
	"ingressconf": {"vnet"},
	"appliance":   {"appliance", "connector", "ingressconf", "mtls", "tunnel", "vnet"},
	"connector":   {"appliance/fleet", "connector", "ingressconf", "mtls", "tunnel", "vnet"},
	"edge":        {"appliance/fleet", "edge", "ingressconf", "keyless", "mtls", "state", "tunnel", "vnet"},
	"state":       {"state"},
}

// harness are the trees that wire or test the others.
var harness = []string{"cmd", "demo", "bench", "integration", "internal", "examples", "images", "packaging", "reliability"}

type pkg struct {
	ImportPath string
	Dir        string
	Imports    []string
	Deps       []string
	CgoFiles   []string
	GoFiles    []string
}

// list runs go list.
func list(t *testing.T, args ...string) []pkg {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list", "-json=ImportPath,Dir,Imports,Deps,CgoFiles,GoFiles"}, args...)...)
	cmd.Dir = root(t)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var pkgs []pkg
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatal(err)
		}
		pkgs = append(pkgs, p)
	}
}

func root(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	// Opening each Go file makes the test cache depend on it, so that no stale pass is replayed.
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && path != dir {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") || d.Name() == "go.mod" {
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			return f.Close()
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func ours(path string) (string, bool) { return strings.CutPrefix(path, module+"/") }

func top(path string) string {
	first, _, _ := strings.Cut(path, "/")
	return first
}

func TestImportsFollowTheTable(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range list(t, "./...") {
		name, _ := ours(p.ImportPath)
		seen[top(name)] = true
		if slices.Contains(harness, top(name)) {
			continue
		}
		may, ok := allowed[top(name)]
		if !ok {
			t.Errorf("package %s is not in the table; add it here and in docs/ARCHITECTURE.md", name)
			continue
		}
		for _, imp := range p.Imports {
			dep, own := ours(imp)
			if !own || top(dep) == "internal" || top(dep) == top(name) && strings.HasPrefix(name, top(name)+"/") {
				continue
			}
			if !slices.Contains(may, top(dep)) && !slices.Contains(may, dep) {
				t.Errorf("%s imports %s; it may import %v", name, dep, may)
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("the table names %s, which does not exist", name)
		}
	}
}

// The public programs must stay unable to hold a private key of a site or to load a vendor's module.
func TestPublicProgramsCannotSign(t *testing.T) {
	for _, prog := range []string{"edge", "connector"} {
		p := list(t, "./cmd/"+prog)[0]
		if len(p.Deps) < 50 {
			t.Fatalf("cmd/%s has %d dependencies: go list did not list them", prog, len(p.Deps))
		}
		for _, dep := range p.Deps {
			name, own := ours(dep)
			if own && slices.Contains([]string{"signer", "pkcs11", "transit"}, top(name)) || strings.HasPrefix(dep, "github.com/miekg/pkcs11") {
				t.Errorf("cmd/%s depends on %s", prog, dep)
			}
		}
	}
}

func TestNoPeerCode(t *testing.T) {
	for _, p := range list(t, "./...") {
		for _, dep := range p.Deps {
			if strings.HasPrefix(dep, "github.com/cloudflare/") {
				t.Errorf("%s depends on %s", p.ImportPath, dep)
			}
		}
	}
}

func TestOnlyTunnelAndEdgeImportQUIC(t *testing.T) {
	found := 0
	for _, p := range list(t, "./...") {
		name, _ := ours(p.ImportPath)
		for _, imp := range p.Imports {
			if !strings.HasPrefix(imp, "github.com/quic-go/quic-go") {
				continue
			}
			found++
			if name != "tunnel" && name != "edge" {
				t.Errorf("%s imports %s; only tunnel, and edge for HTTP/3, may", name, imp)
			}
		}
	}
	if found == 0 {
		t.Error("nobody imports quic-go: the test looks at the wrong thing")
	}
}

func TestCgoOnlyInPKCS11(t *testing.T) {
	for _, p := range list(t, "./...") {
		if name, _ := ours(p.ImportPath); len(p.CgoFiles) > 0 && name != "pkcs11" {
			t.Errorf("%s uses cgo: %v", name, p.CgoFiles)
		}
	}
}

func TestPublicProgramsBuildWithoutCgo(t *testing.T) {
	cmd := exec.Command("go", "build", "-o", t.TempDir(), "./cmd/edge", "./cmd/connector")
	cmd.Dir = root(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func TestOnePackageComment(t *testing.T) {
	for _, p := range list(t, "./...") {
		var with []string
		for _, name := range append(p.GoFiles, p.CgoFiles...) {
			f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(p.Dir, name), nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil {
				with = append(with, name)
			}
		}
		if len(with) != 1 {
			t.Errorf("%s has %d package comments (%v), want 1", p.ImportPath, len(with), with)
		}
	}
}

func TestFilesStaySmall(t *testing.T) {
	for _, p := range list(t, "./...") {
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if n := strings.Count(string(b), "\n"); n > 600 {
				t.Errorf("%s has %d lines, more than 600: is there a second thing in it?", file, n)
			}
		}
	}
}

// The lane must run with the race detector: each package that starts goroutines relies on it.
func TestRaceDetectorIsOn(t *testing.T) {
	if !race {
		t.Error("run the tests with -race, as make test does")
	}
}
