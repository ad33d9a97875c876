package camera

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/ingressconf"
	"github.com/keyhaven/keyhaven/internal/freeport"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		s    Settings
		want string // fields
	}{
		{Settings{}, ""},
		{Settings{Device: "auto", Resolution: "640x480", FPS: 30, Quality: 100}, ""},
		{Settings{Device: "/dev/video12"}, ""},
		{Settings{Device: "/dev/v4l/by-id/usb-046d_HD_Pro_Webcam_C920_1A2B-video-index0"}, ""},
		{Settings{Device: "/dev/v4l/by-path/platform-fd500000.pcie-pci-0000:01:00.0-usb-0:1.3:1.0-video-index0"}, ""},
		{Settings{Device: "webcam"}, "device"},
		{Settings{Device: "/dev/sda"}, "device"},
		{Settings{Device: "/dev/video0 --unix=/x"}, "device"},
		{Settings{Device: "/dev/v4l/by-id/../../mem"}, "device"},
		{Settings{Device: "/dev/v4l/by-id/.."}, "device"},
		{Settings{Device: "/dev/video0\n"}, "device"},
		{Settings{Resolution: "720p"}, "resolution"},
		{Settings{Resolution: "1280 x 720"}, "resolution"},
		{Settings{Resolution: "10x10"}, "resolution"},
		{Settings{Resolution: "9999x720"}, "resolution"},
		{Settings{FPS: -1, Quality: 101}, "fps quality"},
		{Settings{FPS: 1000, Quality: -5}, "fps quality"},
	} {
		var got []string
		for _, f := range tt.s.Check() {
			got = append(got, f.Field)
			if !strings.HasPrefix(f.Error(), f.Field+": ") {
				t.Errorf("%+v: %v", tt.s, f)
			}
		}
		if strings.Join(got, " ") != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.s, got, tt.want)
		}
		if b, err := tt.s.Environment("/dev/video0"); (err == nil) != (tt.want == "") || bytes.Count(b, []byte("\n")) > 1 {
			t.Errorf("%+v: %q, %v", tt.s, b, err)
		}
	}
	b, err := Settings{FPS: 5}.Environment("/dev/video3")
	must(t, err)
	for _, want := range []string{"STREAMER_ARGS=--host=127.0.0.1 --port=8090 ", " --device=/dev/video3 ", " --desired-fps=5 ", " --resolution=1280x720 "} {
		if !strings.Contains(string(b), want) {
			t.Errorf("got %q, want %q in it", b, want)
		}
	}
	if strings.Contains(string(b), "allow-origin") {
		t.Errorf("other sites may read the pictures: %q", b)
	}
	if _, err := (Settings{}).Args("no device"); err == nil {
		t.Error("a found device that is none")
	}
	if b, err := (Settings{Device: "/dev/video7"}).Environment(""); err != nil || !strings.Contains(string(b), "--device=/dev/video7 ") {
		t.Errorf("a device that is named: %q, %v", b, err)
	}
}

func TestFind(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(root, "dev/v4l/by-id"), 0o755))
	var cameras []string
	find := func() (string, bool) {
		return Find(root, func(path string) bool { return slices.Contains(cameras, filepath.Base(path)) })
	}
	if path, ok := find(); ok || path != "/dev/video0" {
		t.Errorf("nothing there: got %s, %t", path, ok)
	}
	for _, name := range []string{"dev/video10", "dev/video2", "dev/video1", "dev/vbi0", "dev/videoX", "dev/v4l/by-id/usb-b-video-index0", "dev/v4l/by-id/usb-a-video-index1", "dev/v4l/by-id/usb-a-video-index0"} {
		must(t, os.WriteFile(filepath.Join(root, name), nil, 0o600))
	}
	if path, ok := find(); ok || path != "/dev/video0" {
		t.Errorf("no camera among them: got %s, %t", path, ok)
	}
	cameras = []string{"video10", "video2", "vbi0"}
	if path, ok := find(); !ok || path != "/dev/video2" {
		t.Errorf("by number: got %s, %t", path, ok)
	}
	cameras = append(cameras, "usb-b-video-index0", "usb-a-video-index1")
	if path, ok := find(); !ok || path != "/dev/v4l/by-id/usb-b-video-index0" {
		t.Errorf("by id: got %s, %t", path, ok)
	}
	if path, ok := Find(root, nil); ok { // files are no devices
		t.Errorf("a file is a camera: %s", path)
	}
}

func TestIsCamera(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		all, node uint32
		want      bool
	}{
		{0x84a00001, 0x04200001, true},  // a webcam's pictures
		{0x84a00001, 0x04a00000, false}, // its metadata
		{0x84204000, 0x04204000, false}, // a codec
		{0x84208001, 0x04208001, false}, // memory to memory
		{0x04000001, 0, true},           // an old driver, which knows the device alone
		{0, 0, false},
	} {
		var caps [104]byte
		binary.NativeEndian.PutUint32(caps[84:], tt.all)
		binary.NativeEndian.PutUint32(caps[88:], tt.node)
		if got := isCamera(caps); got != tt.want {
			t.Errorf("%#x, %#x: got %t", tt.all, tt.node, got)
		}
	}
}

// The page runs the one script and the one style that it holds, whatever else somebody got into it.
func TestPage(t *testing.T) {
	t.Parallel()
	page := string(Page())
	for tag, kind := range map[string]string{"style": "style-src", "script": "script-src"} {
		text := regexp.MustCompile(`(?s)<` + tag + `>(.*?)</` + tag + `>`).FindStringSubmatch(page)
		if text == nil {
			t.Fatalf("no %s", tag)
		}
		sum := sha256.Sum256([]byte(text[1]))
		if want := kind + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"; !strings.Contains(page, want) {
			t.Errorf("the policy lacks %s", want)
		}
	}
	for _, want := range []string{"default-src 'none'", "img-src 'self'", `src="/stream"`, `href="/snapshot"`} {
		if !strings.Contains(page, want) {
			t.Errorf("the page lacks %s", want)
		}
	}
	if regexp.MustCompile(`https?://|<(iframe|object|form)| on[a-z]+=`).MatchString(page) {
		t.Error("the page leads elsewhere, or has what its policy does not let run")
	}
}

func TestRule(t *testing.T) {
	t.Parallel()
	c, err := ingressconf.New([]ingressconf.Rule{Rule("cam.example.com", "2Mbit/s"), {Service: "http_status:404"}}, ingressconf.Defaults())
	must(t, err)
	for path, want := range map[string]int{"/": 0, "/stream": 0, "/snapshot": 0, "/state": 1, "/stream/x": 1, "/index.html": 1, "/snapshot.jpg": 1, "//": 1} {
		if i, _ := c.Match("cam.example.com", path); i != want {
			t.Errorf("%s: rule %d, want %d", path, i, want)
		}
	}
	if i, _ := c.Match("other.example.com", "/"); i != 1 {
		t.Error("another host gets the camera")
	}
	if c.Targets()[0].Bandwidth != 250_000 || c.Targets()[0].Service.Addr() != Addr {
		t.Errorf("got %+v", c.Targets()[0])
	}
}

func TestParseState(t *testing.T) {
	t.Parallel()
	s, err := parseState([]byte(`{"ok": true, "result": {"encoder": {"type": "HW", "quality": 80}, "source": {"resolution": {"width": 1280, "height": 720}, "online": true, "desired_fps": 10, "captured_fps": 9}, "stream": {"queued_fps": 0, "clients": 2, "clients_stat": {"a": {}}}}}`))
	if want := (State{true, 1280, 720, 9, 2}); err != nil || s != want {
		t.Errorf("got %+v, %v", s, err)
	}
	if got, want := s.String(), "camera works: 1280x720, 9 pictures a second, 2 visitors"; got != want {
		t.Errorf("got %q", got)
	}
	for _, bad := range []string{"", "{}", "[]", `{"ok":false}`, `{"ok":true,"result":{"source":{"online":"yes"}}}`} {
		if s, err := parseState([]byte(bad)); err == nil {
			t.Errorf("%q: got %+v", bad, s)
		}
	}
}

// The flags are those that the packaged streamer has, it serves the page, and it says that there is no camera.
func TestStreamer(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	must(t, os.WriteFile(filepath.Join(dir, "index.html"), Page(), 0o644))
	addr, err := freeport.Addr("127.0.0.1")
	must(t, err)
	_, port, err := net.SplitHostPort(addr)
	must(t, err)
	args, err := Settings{Device: "/dev/video63"}.Args("")
	must(t, err)
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "--port="):
			args[i] = "--port=" + port
		case strings.HasPrefix(a, "--static="):
			args[i] = "--static=" + dir
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cmd := exec.CommandContext(ctx, "ustreamer", args...)
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	if err := cmd.Start(); err != nil {
		t.Fatalf("ustreamer is needed: scripts/setup installs it: %v", err)
	}
	defer func() {
		cancel()
		cmd.Wait() //nolint:errcheck // it was killed
		if t.Failed() {
			t.Log(log.String())
		}
	}()
	var s State
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if s, err = Ask(t.Context(), addr); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	if s.Online || !strings.Contains(s.String(), "no camera") {
		t.Errorf("got %+v: %s", s, s)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	for path, want := range map[string]string{"/": string(Page()), "/snapshot": "\xff\xd8\xff"} {
		res, err := client.Get("http://" + addr + path)
		must(t, err)
		b, err := io.ReadAll(res.Body)
		must(t, err)
		res.Body.Close()
		if res.StatusCode != 200 || !strings.HasPrefix(string(b), want) || res.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: %s, %d bytes, header %v", path, res.Status, len(b), res.Header)
		}
	}
	cancel()
	if _, err := Ask(t.Context(), "127.0.0.1:1"); err == nil {
		t.Error("nobody answers, and all is well")
	}
}

// FuzzParseState stands for a streamer gone mad, or somebody else at its port.
func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"ok": true, "result": {"source": {"online": true}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseState(b); err == nil && s.String() == "" {
			t.Fatal("nothing to say")
		}
	})
}
