package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fatimage"
	"github.com/keyhaven/keyhaven/mtls"
)

// smallImage makes an image whose configuration partition is an empty FAT16 file system of 4200 sectors.
func smallImage(t *testing.T, dir string) string {
	t.Helper()
	const start = 64
	b := make([]byte, (start+4200)*512)
	binary.LittleEndian.PutUint32(b[440:], 0x4b485631)
	binary.LittleEndian.PutUint32(b[446+8:], start)
	binary.LittleEndian.PutUint32(b[446+12:], 4200)
	p := b[start*512:]
	copy(p[11:], []byte{0, 2, 1, 1, 0, 2, 64, 0, 0, 0, 0xf8, 17, 0})
	binary.LittleEndian.PutUint16(p[19:], 4200)
	copy(p[43:], "KEYHAVEN   ")
	for _, head := range [][]byte{b, p} {
		head[510], head[511] = 0x55, 0xaa
	}
	for i := range 2 {
		copy(p[(1+17*i)*512:], []byte{0xf8, 0xff, 0xff, 0xff})
	}
	path := filepath.Join(dir, "image.img")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func configOf(t *testing.T, image string) string {
	t.Helper()
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v, _, err := fatimage.Find(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := v.ReadFile(fatimage.ConfigName)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newToken(t *testing.T) string {
	t.Helper()
	token, err := mtls.NewJoinToken([32]byte{1}, []string{"edge.example.com:7844"})
	if err != nil {
		t.Fatal(err)
	}
	return token.Reveal()
}

func TestPersonalise(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image := smallImage(t, dir)
	config := write(t, filepath.Join(dir, "pi.yaml"), "# mine\nhostname: pi # old\nwifi: {country: DE, ssid: Home, password: canary99}\n")
	token := newToken(t)

	out := filepath.Join(dir, "out.img")
	said, code := runProgram(t, token+"\n", "image", "personalise", "--config", config, "--token-file", "-", "--hostname", "petcam", "--output", out, image)
	if code != 0 || strings.Contains(said, "khj1_") || strings.Contains(said, "canary") {
		t.Fatalf("code %d: %s", code, said)
	}
	got := configOf(t, out)
	for _, want := range []string{"# mine", "hostname: petcam", "token: " + token, "canary99"} {
		if !strings.Contains(got, want) {
			t.Errorf("the image has no %q:\n%s", want, got)
		}
	}
	if info, err := os.Stat(out); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}

	if said, code = runProgram(t, "", "image", "personalise", "--config", config, "--in-place", image); code != 0 || !strings.Contains(said, "has no token") {
		t.Errorf("code %d: %s", code, said)
	}
	if got := configOf(t, image); !strings.Contains(got, "hostname: pi # old") {
		t.Errorf("in place:\n%s", got)
	}
	if info, err := os.Stat(image); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("in place: mode %v, %v", info.Mode(), err)
	}
	part := filepath.Join(dir, "part.fat")
	if said, code = runProgram(t, "", "image", "personalise", "--config", config, "--partition", "--output", part, image); code != 0 {
		t.Errorf("code %d: %s", code, said)
	}
	if info, err := os.Stat(part); err != nil || info.Size() != 4200*512 {
		t.Errorf("the partition alone: %v, %v", info, err)
	}
}

func TestPersonaliseEach(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image := smallImage(t, dir)
	devices, images := filepath.Join(dir, "devices"), filepath.Join(dir, "images")
	if err := os.Mkdir(devices, 0o700); err != nil {
		t.Fatal(err)
	}
	tokens := map[string]string{"a": newToken(t), "b": newToken(t)}
	for name, token := range tokens {
		write(t, filepath.Join(devices, name+".yaml"), "hostname: "+name+"\ntoken: "+token+"\n")
	}
	if said, code := runProgram(t, "", "image", "personalise", "--each", devices, "--output", images, image); code != 0 || strings.Contains(said, "khj1_") {
		t.Fatalf("code %d: %s", code, said)
	}
	for name, token := range tokens {
		path := filepath.Join(images, name+".img")
		if got := configOf(t, path); got != "hostname: "+name+"\ntoken: "+token+"\n" {
			t.Errorf("%s:\n%s", name, got)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for other, secret := range tokens {
			if other != name && bytes.Contains(b, []byte(secret)) {
				t.Errorf("the image of %s holds the token of %s", name, other)
			}
		}
	}
	write(t, filepath.Join(devices, "c.yaml"), "token: "+tokens["a"]+"\n")
	write(t, filepath.Join(devices, "d.yaml"), "hostnam: d\n")
	said, code := runProgram(t, "", "image", "personalise", "--each", devices, "--output", filepath.Join(dir, "none"), image)
	if code != 3 || !strings.Contains(said, "have the same token") || !strings.Contains(said, "did you mean hostname?") || strings.Contains(said, "khj1_") {
		t.Errorf("code %d: %s", code, said)
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("images are made although a file is wrong")
	}
}

func TestPersonaliseRefuses(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	image := smallImage(t, dir)
	config := write(t, filepath.Join(dir, "pi.yaml"), "hostname: pi\n")
	wrong := write(t, filepath.Join(dir, "wrong.yaml"), "hostname: p_i\n")
	other := write(t, filepath.Join(dir, "other.img"), strings.Repeat("x", 4096))
	out := filepath.Join(dir, "out.img")
	token := newToken(t)
	for _, tt := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--config", config, image, token, "--output", out}, 2, "name one image"},
		{[]string{"--config", config, image}, 2, "--output"},
		{[]string{"--output", out, image}, 2, "--config"},
		{[]string{"--config", config, "--each", dir, "--output", out, image}, 2, "--each"},
		{[]string{"--config", config, "--output", "x.img.xz", image}, 2, "not compressed"},
		{[]string{"--config", config, "--in-place", "x.img.xz"}, 2, "cannot be changed in place"},
		{[]string{"--config", wrong, "--output", out, image}, 3, "wrong.yaml:1: hostname"},
		{[]string{"--config", config, "--output", out, other}, 1, "is no image of Keyhaven"},
		{[]string{"--config", config, "--output", image, image}, 1, "remove it, or name another file"},
		{[]string{"--each", filepath.Join(dir, "nothing"), "--output", out, image}, 3, "holds no .yaml files"},
	} {
		said, code := runProgram(t, "", append([]string{"image", "personalise"}, tt.args...)...)
		if code != tt.code || !strings.Contains(said, tt.says) || strings.Contains(said, token) {
			t.Errorf("%v: code %d, want %d with %q: %s", tt.args, code, tt.code, tt.says, said)
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("%v: something is left behind", tt.args)
		}
	}
}

func TestApplianceCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := write(t, filepath.Join(dir, "keyhaven.yaml"), "hostname: pi\n")
	if said, code := runProgram(t, "", "appliance", "check", good); code != 0 || !strings.Contains(said, "good, but without a join token") {
		t.Errorf("code %d: %s", code, said)
	}
	bad := write(t, filepath.Join(dir, "user-data"), "hostname: p_i\n")
	write(t, good, "token: "+install(t).token(t, time.Now().Add(time.Hour))+"\nhostname: pi\n")
	if said, code := runProgram(t, "", "appliance", "check", good); code != 0 || !strings.HasSuffix(said, ": good\n") {
		t.Errorf("with a token: code %d: %s", code, said)
	}
	if said, code := runProgram(t, "", "appliance", "check"); code != 2 || !strings.Contains(said, "name one file") {
		t.Errorf("no file: code %d: %s", code, said)
	}
	if said, code := runProgram(t, "", "appliance", "check", bad); code != 3 || !strings.Contains(said, "user-data:1: hostname") {
		t.Errorf("code %d: %s", code, said)
	}
}
