package main

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"debug/buildinfo"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	spdx "github.com/spdx/tools-golang/spdx/v2/v2_3"
	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/internal/cli"
)

func sbomCommand() *cobra.Command {
	var output, name, status string
	cmd := &cobra.Command{
		Use:   "sbom --output FILE [--name NAME] [--dpkg STATUS] BINARY...",
		Short: "Write a bill of materials, SPDX 2.3 as JSON, of programs and of Debian packages beside them",
		RunE: func(cmd *cobra.Command, args []string) error {
			if output == "" {
				return cli.UsageError("--output is missing")
			}
			if len(args) == 0 && status == "" {
				return cli.UsageError("neither programs nor --dpkg given")
			}
			if name == "" {
				name = strings.TrimSuffix(filepath.Base(output), ".spdx.json")
			}
			b, err := newBill(cmd, name)
			if err != nil {
				return err
			}
			for _, path := range args {
				if err := b.addProgram(path); err != nil {
					return err
				}
			}
			if status != "" {
				if err := b.addStatus(status); err != nil {
					return err
				}
			}
			text, err := b.encode()
			if err != nil {
				return err
			}
			return os.WriteFile(output, text, 0o644)
		},
		Args: cobra.ArbitraryArgs,
	}
	cmd.Flags().StringVar(&output, "output", "", "where it goes")
	cmd.Flags().StringVar(&name, "name", "", "what it describes; the name of the output without .spdx.json by default")
	cmd.Flags().StringVar(&status, "dpkg", "", "dpkg's status file of a file system that the programs are in")
	return cmd
}

// A bill is an SPDX document in the making.
type bill struct {
	name, version string
	at            time.Time
	packages      map[common.ElementID]*spdx.Package
	relations     map[relation]bool
}

type relation struct {
	from, to common.ElementID
	kind     string
}

const (
	document = common.ElementID("DOCUMENT")
	whole    = common.ElementID("Image") // what holds the Debian packages
	supplier = "Keyhaven"
)

func newBill(cmd *cobra.Command, name string) (*bill, error) {
	v, err := version(cmd.Context())
	if err != nil {
		return nil, err
	}
	at, err := epoch(cmd.Context())
	return &bill{name: name, version: v, at: at, packages: map[common.ElementID]*spdx.Package{}, relations: map[relation]bool{}}, err
}

// addProgram adds a Go program and the modules that its build information names. Go's own hash of a module's tree is not the
// hash of a file, so that it stands as what it is, in the source information.
func (b *bill) addProgram(path string) error {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	sum, err := fileSum(path)
	if err != nil {
		return err
	}
	base := filepath.Base(path)
	id := elementID("Program", base)
	if b.packages[id] != nil {
		return fmt.Errorf("two programs are called %s", base)
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	p := b.add(id, base, b.version, purl("golang", info.Path, b.version))
	p.PackageFileName = base
	p.PrimaryPackagePurpose = "APPLICATION"
	p.PackageLicenseConcluded, p.PackageLicenseDeclared = "Apache-2.0", "Apache-2.0"
	p.PackageSupplier = &common.Supplier{Supplier: supplier, SupplierType: "Organization"}
	p.PackageChecksums = []common.Checksum{{Algorithm: common.SHA256, Value: sum}}
	p.PackageSourceInfo = strings.TrimSpace(fmt.Sprintf("built by %s for %s/%s", info.GoVersion, settings["GOOS"], settings["GOARCH"]))
	b.relate(document, id, "DESCRIBES")

	toolchain, _, _ := strings.Cut(strings.TrimPrefix(info.GoVersion, "go"), " ")
	std := elementID("Module", "stdlib", toolchain)
	s := b.add(std, "stdlib", toolchain, "pkg:golang/stdlib@"+toolchain)
	s.PackageLicenseDeclared = "BSD-3-Clause"
	b.relate(id, std, "DEPENDS_ON")
	for _, m := range info.Deps {
		b.addModule(id, m)
	}
	return nil
}

func (b *bill) addModule(program common.ElementID, m *debug.Module) {
	if m.Replace != nil {
		m = m.Replace
	}
	id := elementID("Module", m.Path, m.Version)
	p := b.add(id, m.Path, m.Version, purl("golang", m.Path, m.Version))
	p.PrimaryPackagePurpose = "LIBRARY"
	if m.Sum != "" {
		p.PackageSourceInfo = "go.sum: " + m.Sum
	}
	b.relate(program, id, "DEPENDS_ON")
}

// addStatus adds the packages of a Debian file system, which holds the programs.
func (b *bill) addStatus(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	packages, err := readStatus(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	var programs []common.ElementID
	for r := range b.relations {
		if r.kind == "DESCRIBES" {
			programs = append(programs, r.to)
		}
	}
	image := b.add(whole, b.name, b.version, "")
	image.PrimaryPackagePurpose = "OPERATING-SYSTEM"
	image.PackageSupplier = &common.Supplier{Supplier: supplier, SupplierType: "Organization"}
	b.relate(document, whole, "DESCRIBES")
	for _, id := range programs {
		b.relate(whole, id, "CONTAINS")
	}
	for _, d := range packages {
		id := elementID("Debian", d.name, d.arch, d.version)
		p := b.add(id, d.name, d.version, purl("deb", "debian/"+d.name, d.version)+"?arch="+d.arch)
		p.PackageHomePage = d.homepage
		if d.source != "" {
			p.PackageSourceInfo = "source package: " + d.source
		}
		if d.maintainer != "" {
			p.PackageSupplier = &common.Supplier{Supplier: d.maintainer, SupplierType: "Organization"}
		}
		b.relate(whole, id, "CONTAINS")
	}
	return nil
}

func (b *bill) add(id common.ElementID, name, version, locator string) *spdx.Package {
	p := &spdx.Package{
		PackageName: name, PackageSPDXIdentifier: id, PackageVersion: version, PackageDownloadLocation: "NOASSERTION",
		IsFilesAnalyzedTagPresent: true, PackageLicenseConcluded: "NOASSERTION", PackageLicenseDeclared: "NOASSERTION",
		PackageCopyrightText: "NOASSERTION",
	}
	if locator != "" {
		p.PackageExternalReferences = []*spdx.PackageExternalReference{{Category: "PACKAGE-MANAGER", RefType: "purl", Locator: locator}}
	}
	b.packages[id] = p
	return p
}

func (b *bill) relate(from, to common.ElementID, kind string) {
	b.relations[relation{from, to, kind}] = true
}

// encode writes the document. Its name space, which must be nobody else's, is the hash of its content.
func (b *bill) encode() ([]byte, error) {
	doc := &spdx.Document{
		SPDXVersion: spdx.Version, DataLicense: spdx.DataLicense, SPDXIdentifier: document, DocumentName: b.name,
		CreationInfo: &spdx.CreationInfo{
			Created:  b.at.UTC().Format(time.RFC3339),
			Creators: []common.Creator{{CreatorType: "Organization", Creator: supplier}, {CreatorType: "Tool", Creator: "keyhaven-release-" + b.version}},
		},
	}
	for _, p := range b.packages {
		doc.Packages = append(doc.Packages, p)
	}
	slices.SortFunc(doc.Packages, func(x, y *spdx.Package) int { return cmp.Compare(x.PackageSPDXIdentifier, y.PackageSPDXIdentifier) })
	for r := range b.relations {
		doc.Relationships = append(doc.Relationships, &spdx.Relationship{
			RefA: common.DocElementID{ElementRefID: r.from}, RefB: common.DocElementID{ElementRefID: r.to}, Relationship: r.kind,
		})
	}
	slices.SortFunc(doc.Relationships, func(x, y *spdx.Relationship) int {
		return cmp.Or(cmp.Compare(x.RefA.ElementRefID, y.RefA.ElementRefID), cmp.Compare(x.Relationship, y.Relationship), cmp.Compare(x.RefB.ElementRefID, y.RefB.ElementRefID))
	})
	var out bytes.Buffer
	if err := spdxjson.Write(doc, &out, spdxjson.Indent("  ")); err != nil {
		return nil, err
	}
	doc.DocumentNamespace = fmt.Sprintf("https://github.com/keyhaven/keyhaven/spdx/%s-%x", url.PathEscape(b.name), sha256.Sum256(out.Bytes()))
	out.Reset()
	if err := spdxjson.Write(doc, &out, spdxjson.Indent("  ")); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

var notInID = regexp.MustCompile(`[^a-zA-Z0-9.]+`)

// elementID makes an SPDX identifier of words. What an identifier cannot hold is a hyphen there, and a short hash keeps
// those apart that would become the same.
func elementID(words ...string) common.ElementID {
	text := strings.Join(words, "-")
	id := strings.Trim(notInID.ReplaceAllString(text, "-"), "-")
	return common.ElementID(fmt.Sprintf("%s-%x", id, sha256.Sum256([]byte(text)))[:len(id)+9])
}

// purl is a package URL: https://github.com/package-url/purl-spec.
func purl(kind, name, version string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return "pkg:" + kind + "/" + strings.Join(parts, "/") + "@" + strings.ReplaceAll(url.QueryEscape(version), "%3A", ":")
}
