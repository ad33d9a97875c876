package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func entryOf(t *testing.T, arch, tags string) string {
	t.Helper()
	var out bytes.Buffer
	err := run([]string{"entry", "--image", file(t, "k.img", "raw"), "--download", file(t, "k.img.xz", "packed"), "--arch", arch, "--version", "1.2.3",
		"--epoch", "1700000000", "--url", "https://example.com/v1/", "--devices", tags}, &out)
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestEntry(t *testing.T) {
	var got map[string]any
	if err := json.Unmarshal([]byte(entryOf(t, "arm64", "pi4-64bit pi3-64bit")), &got); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"name": "Keyhaven 1.2.3 (arm64)", "url": "https://example.com/v1/k.img.xz", "icon": "https://example.com/v1/keyhaven.png",
		"extract_size": 3.0, "image_download_size": 6.0,
		"release_date": "2023-11-14", "init_format": "cloudinit",
	}
	for key, value := range want {
		if got[key] != value {
			t.Errorf("%s: got %v, want %v", key, got[key], value)
		}
	}
	for _, key := range []string{"description", "website", "extract_sha256", "image_download_sha256"} {
		if s, _ := got[key].(string); s == "" {
			t.Errorf("%s is empty", key)
		}
	}
	if err := run([]string{"entry", "--arch", "arm64"}, &bytes.Buffer{}); err == nil {
		t.Error("an entry without an image was made")
	}
}

func TestList(t *testing.T) {
	var out bytes.Buffer
	err := run([]string{"list", file(t, "a.json", entryOf(t, "arm64", "pi4-64bit pi3-64bit")), file(t, "b.json", entryOf(t, "armel", "pi1-32bit")),
		file(t, "c.json", entryOf(t, "amd64", ""))}, &out)
	if err != nil {
		t.Fatal(err)
	}
	var got list
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.OSList) != 2 || got.OSList[1].Devices[0] != "pi1-32bit" {
		t.Errorf("got %d images, want those for arm64 and armel", len(got.OSList))
	}
	var names []string
	for _, d := range got.Imager.Devices {
		names = append(names, d.Name)
	}
	if got, want := strings.Join(names, ", "), "Raspberry Pi 4, Raspberry Pi 3, Raspberry Pi 1 or Zero"; got != want {
		t.Errorf("got devices %q, want %q", got, want)
	}
	for name, text := range map[string]string{"unknown field": `{"nam":"x"}`, "empty": `{}`, "no JSON": "x"} {
		if err := run([]string{"list", file(t, "x.json", text)}, &bytes.Buffer{}); err == nil {
			t.Errorf("%s: the list was made", name)
		}
	}
}
