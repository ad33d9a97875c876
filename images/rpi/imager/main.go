// Command imager writes what the Raspberry Pi Imager reads of images: an entry for each, and the list that one names to the
// Imager as its repository. See the Imager's documentation of its JSON schema.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// An entry is one image of the list.
type entry struct {
	Name           string   `json:"name"`
	Description    string   `json:"description"`
	Icon           string   `json:"icon"`
	Website        string   `json:"website"`
	URL            string   `json:"url"`
	ExtractSize    int64    `json:"extract_size"`
	ExtractSHA256  string   `json:"extract_sha256"`
	DownloadSize   int64    `json:"image_download_size"`
	DownloadSHA256 string   `json:"image_download_sha256"`
	ReleaseDate    string   `json:"release_date"`
	InitFormat     string   `json:"init_format"`
	Devices        []string `json:"devices"`
}

// A device is a line of the Imager's question which Raspberry Pi the card is for.
type device struct {
	Name         string   `json:"name"`
	Tags         []string `json:"tags"`
	Description  string   `json:"description"`
	MatchingType string   `json:"matching_type"`
}

type list struct {
	Imager struct {
		Devices []device `json:"devices"`
	} `json:"imager"`
	OSList []entry `json:"os_list"`
}

// devices are offered where at least one image is for them.
var devices = []device{
	{"Raspberry Pi 4", []string{"pi4-64bit", "pi4-32bit"}, "Raspberry Pi 4, 400 and Compute Module 4", "inclusive"},
	{"Raspberry Pi 3", []string{"pi3-64bit", "pi3-32bit"}, "Raspberry Pi 3, 3+, Zero 2 W and Compute Module 3", "inclusive"},
	{"Raspberry Pi 2", []string{"pi2-32bit"}, "Raspberry Pi 2", "inclusive"},
	{"Raspberry Pi 1 or Zero", []string{"pi1-32bit"}, "Raspberry Pi 1, Zero and Zero W", "inclusive"},
}

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "imager:", err)
		os.Exit(1)
	}
}

func run(args []string, out io.Writer) error {
	if len(args) == 0 {
		return errors.New("say entry or list")
	}
	switch args[0] {
	case "entry":
		e, err := newEntry(args[1:])
		if err != nil {
			return err
		}
		return write(out, e)
	case "list":
		l, err := newList(args[1:])
		if err != nil {
			return err
		}
		return write(out, l)
	}
	return fmt.Errorf("%q is neither entry nor list", args[0])
}

func write(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// newEntry measures an image and what is downloaded of it.
func newEntry(args []string) (e entry, err error) {
	f := flag.NewFlagSet("entry", flag.ContinueOnError)
	image := f.String("image", "", "the raw image")
	download := f.String("download", "", "the compressed image")
	arch := f.String("arch", "", "architecture")
	version := f.String("version", "", "version")
	epoch := f.Int64("epoch", 0, "when it was made, in seconds")
	url := f.String("url", "", "the directory that it will be downloaded from")
	tags := f.String("devices", "", "the Imager's tags of what it runs on, with spaces between")
	if err := f.Parse(args); err != nil {
		return e, err
	}
	for _, required := range []string{*image, *download, *arch, *version, *url} {
		if required == "" {
			return e, errors.New("entry: --image, --download, --arch, --version and --url are needed")
		}
	}
	base := strings.TrimSuffix(*url, "/")
	e = entry{
		Name:        fmt.Sprintf("Keyhaven %s (%s)", *version, *arch),
		Description: "Puts a camera or a service of your network behind a Keyhaven edge. Fill in keyhaven.yaml on the card",
		Icon:        base + "/keyhaven.png",
		Website:     "https://github.com/keyhaven/keyhaven",
		URL:         base + "/" + filepath.Base(*download),
		ReleaseDate: time.Unix(*epoch, 0).UTC().Format(time.DateOnly),
		InitFormat:  "cloudinit", // of which the host name, the time zone, Wi-Fi and SSH keys are read
		Devices:     append([]string{}, strings.Fields(*tags)...),
	}
	if e.ExtractSize, e.ExtractSHA256, err = sum(*image); err != nil {
		return e, err
	}
	e.DownloadSize, e.DownloadSHA256, err = sum(*download)
	return e, err
}

func sum(name string) (int64, string, error) {
	f, err := os.Open(name)
	if err != nil {
		return 0, "", err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return n, hex.EncodeToString(h.Sum(nil)), err
}

// newList merges entries, each in a file of its own, in the order of the files. Images for no Raspberry Pi are left out.
func newList(names []string) (l list, err error) {
	l.Imager.Devices, l.OSList = []device{}, []entry{}
	used := map[string]bool{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return l, err
		}
		var e entry
		d := json.NewDecoder(strings.NewReader(string(b)))
		d.DisallowUnknownFields()
		if err := d.Decode(&e); err != nil {
			return l, fmt.Errorf("%s is no entry: %w", name, err)
		}
		if e.Name == "" || e.URL == "" || e.ExtractSHA256 == "" {
			return l, fmt.Errorf("%s is no entry: name, url or extract_sha256 is missing", name)
		}
		if len(e.Devices) == 0 {
			continue
		}
		for _, tag := range e.Devices {
			used[tag] = true
		}
		l.OSList = append(l.OSList, e)
	}
	for _, d := range devices {
		for _, tag := range d.Tags {
			if used[tag] {
				l.Imager.Devices = append(l.Imager.Devices, d)
				break
			}
		}
	}
	return l, nil
}
