package install

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"html/template"
	"path"
	"regexp"
	"slices"
	"strings"
	text "text/template"
)

// scriptName is where the script is.
const scriptName = "install.sh"

//go:embed install.sh.tmpl
var scriptText string

//go:embed index.html.tmpl
var indexText string

var (
	scriptTemplate = text.Must(text.New(scriptName).Option("missingkey=error").Parse(scriptText))
	indexTemplate  = template.Must(template.New("index").Parse(indexText))
)

// Where the files of a release are in the directory; make install-site puts them there.
const (
	programPrefix = "bin/keyhaven-connector-linux-"
	unitPath      = "bin/keyhaven-connector.service"
	configPath    = "bin/connector.yaml"
	keyringPath   = "repo/keyhaven-archive-keyring"
	debDir        = "repo/deb"
	rpmDir        = "repo/rpm"
)

// Patterns that show what the repositories have.
const (
	debPattern = debDir + "/dists/*/main/binary-*/Packages"
	rpmPattern = rpmDir + "/Packages/keyhaven-connector-*.rpm"
)

// Only what is made of these goes into the script, where it stands between quotes or in words.
var (
	safeBase = regexp.MustCompile(`^https://[a-z0-9.-]+(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*$|^https://\[[0-9a-f:.]+\](:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*$`)
	safeWord = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*$`)
)

type listed struct{ Sum, Path string }

// script is the script for a list, at an address.
func script(l list, base string) ([]byte, error) {
	if !safeBase.MatchString(base) {
		return nil, fmt.Errorf("%q is no address that can stand in a script", base)
	}
	d := struct {
		Base, Programs, Program, Deb, RPM, Unit, Config, Keyring, DebDir, RPMDir string
		Files                                                                    []listed
	}{Base: base, Program: programPrefix, Unit: unitPath, Config: configPath, Keyring: keyringPath, DebDir: debDir, RPMDir: rpmDir}
	add := func(names ...string) {
		for _, n := range names {
			if sum, ok := l[n]; ok {
				d.Files = append(d.Files, listed{sum, n})
			}
		}
	}
	var programs, deb, rpm []string
	for name := range l {
		if arch, ok := strings.CutPrefix(name, programPrefix); ok && safeWord.MatchString(arch) {
			programs = append(programs, arch)
		}
	}
	slices.Sort(programs)
	for _, p := range programs {
		add(programPrefix + p)
	}
	if len(programs) > 0 && (l[unitPath] == "" || l[configPath] == "") {
		return nil, fmt.Errorf("there are programs, but not %s and %s", unitPath, configPath)
	}
	if l[keyringPath+".gpg"] != "" {
		for _, name := range l.match(debPattern) {
			parts := strings.Split(name, "/")
			deb = append(deb, parts[3]+"/"+strings.TrimPrefix(parts[5], "binary-"))
		}
	}
	if l[keyringPath+".asc"] != "" && l[rpmDir+"/repodata/repomd.xml"] != "" {
		for _, name := range l.match(rpmPattern) {
			rpm = append(rpm, strings.TrimPrefix(path.Ext(strings.TrimSuffix(name, ".rpm")), "."))
		}
	}
	add(unitPath, configPath, keyringPath+".gpg", keyringPath+".asc")
	if len(programs)+len(deb)+len(rpm) == 0 {
		return nil, errors.New("the list has neither programs nor a repository: was it made by make install-site?")
	}
	d.Programs, d.Deb, d.RPM = words(programs), words(deb), words(rpm)
	var b bytes.Buffer
	if err := scriptTemplate.Execute(&b, d); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// words joins those that are sound, each once, in order.
func words(list []string) string {
	slices.Sort(list)
	list = slices.DeleteFunc(slices.Compact(list), func(w string) bool {
		return slices.ContainsFunc(strings.Split(w, "/"), func(part string) bool { return !safeWord.MatchString(part) })
	})
	return strings.Join(list, " ")
}

// indexPage says to people what to do.
func indexPage(base string) ([]byte, error) {
	if !safeBase.MatchString(base) {
		return nil, fmt.Errorf("%q is no address that can stand on a page", base)
	}
	var b bytes.Buffer
	if err := indexTemplate.Execute(&b, struct{ Base string }{base}); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
