package doctest

import (
	"encoding/xml"
	"errors"
	"image/png"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/keyhaven/keyhaven/appliance"
)

const imagePage = "images/rpi/README.md"

// inlineYAML is a line of a keyhaven.yaml within a sentence.
var inlineYAML = regexp.MustCompile("`((?:token|edges|hostname|timezone|wifi|network|ntp|ssh|camera|publish|allow|update): [^`]+)`")

// What the pages about appliances have people write into keyhaven.yaml is what the program takes. docs/petcam.md has files of other
// programs too: see TestPetCam.
func TestKeyhavenYAML(t *testing.T) {
	for name, least := range map[string]int{imagePage: 4, "docs/appliance.md": 3, "docs/updates.md": 1} {
		text := page(t, name)
		found := append(yamlBlock.FindAllStringSubmatch(text, -1), inlineYAML.FindAllStringSubmatch(text, -1)...)
		if len(found) < least {
			t.Errorf("%s: %d files were found; adjust this test", name, len(found))
		}
		for _, m := range found {
			if _, err := appliance.Parse("keyhaven.yaml", []byte(m[1])); err != nil {
				t.Errorf("%s: %v in\n%s", name, err, m[1])
			}
		}
	}
	if _, err := appliance.Parse("keyhaven.yaml", []byte("camera: {hostnam: a}\n")); err == nil {
		t.Error("a file with a mistake was found good")
	}
}

var pictureLink = regexp.MustCompile(`!\[([^\]]*)\]\(([^)]+)\)`)

// Each picture that the page shows is there, has words for those who do not see it, is small, and can be shown; and no other lies
// beside them.
func TestPictures(t *testing.T) {
	dir := filepath.Join(root(t), filepath.Dir(imagePage))
	shown := map[string]bool{}
	for _, m := range pictureLink.FindAllStringSubmatch(page(t, imagePage), -1) {
		file := filepath.Join(dir, m[2])
		shown[filepath.Base(file)] = true
		if len(m[1]) < 20 {
			t.Errorf("%s: %q says too little", m[2], m[1])
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
			continue
		}
		if len(b) > 150_000 {
			t.Errorf("%s has %d bytes", m[2], len(b))
		}
		if err := drawn(file, string(b)); err != nil {
			t.Errorf("%s: %v", m[2], err)
		}
	}
	if len(shown) < 8 {
		t.Errorf("%d pictures were found; adjust this test", len(shown))
	}
	files, err := os.ReadDir(filepath.Join(dir, "pictures"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !shown[f.Name()] {
			t.Errorf("no page shows pictures/%s", f.Name())
		}
	}
}

// drawn reports what keeps a picture from being shown. An SVG brings all that it needs, as pages load nothing for it.
func drawn(file, content string) error {
	switch filepath.Ext(file) {
	case ".png":
		_, err := png.Decode(strings.NewReader(content))
		return err
	case ".svg":
		if !strings.Contains(content, "viewBox=") || !strings.Contains(content, "<title>") {
			return errors.New("no viewBox or no title")
		}
		if strings.Contains(content, "href") || strings.Contains(content, "<script") || strings.Contains(content, "@import") {
			return errors.New("refers to something else")
		}
		d := xml.NewDecoder(strings.NewReader(content))
		for {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
	return errors.New("neither PNG nor SVG")
}

var (
	makeCommand = regexp.MustCompile("(?m)(?:^|`)make ((?:[a-z][a-z0-9-]*)(?: [a-z][a-z0-9-]*)*)")
	makeTarget  = regexp.MustCompile(`(?m)^([a-z][a-z0-9-]*):`)
)

// Each target that the pages have people make is one of the makefile.
func TestMakeTargets(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root(t), "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, m := range makeTarget.FindAllStringSubmatch(string(makefile), -1) {
		targets[m[1]] = true
	}
	pages, err := filepath.Glob(filepath.Join(root(t), "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range append(pages, filepath.Join(root(t), imagePage), filepath.Join(root(t), "README.md"), filepath.Join(root(t), "CONTRIBUTING.md")) {
		text := page(t, strings.TrimPrefix(file, root(t)+string(filepath.Separator)))
		for _, m := range makeCommand.FindAllStringSubmatch(text, -1) {
			for _, target := range strings.Fields(m[1]) {
				found++
				if !targets[target] {
					t.Errorf("%s: make has no target %s", filepath.Base(file), target)
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("%d targets were found; adjust this test", found)
	}
}

var (
	anchorLink = regexp.MustCompile(`\]\(([^)#: ]*)#([^)]+)\)`)
	heading    = regexp.MustCompile(`(?m)^#+ (.*)$`)
	noAnchor   = regexp.MustCompile(`[^\p{L}\p{N} _-]`)
)

// Links to a part of a page lead to a heading that is there.
func TestAnchors(t *testing.T) {
	found := 0
	for _, from := range pages(t) {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range anchorLink.FindAllStringSubmatch(string(b), -1) {
			to := from
			if m[1] != "" {
				to = filepath.Join(filepath.Dir(from), m[1])
			}
			text, err := os.ReadFile(to)
			if err != nil {
				t.Errorf("%s: %v", filepath.Base(from), err)
				continue
			}
			found++
			if !anchors(string(text))[m[2]] {
				t.Errorf("%s: %s has no heading #%s", filepath.Base(from), m[1], m[2])
			}
		}
	}
	if found < 5 {
		t.Errorf("%d links were found; adjust this test", found)
	}
}

// anchors are the names that headings of a page get.
func anchors(text string) map[string]bool {
	names := map[string]bool{}
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		names[strings.ReplaceAll(noAnchor.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-")] = true
	}
	return names
}
