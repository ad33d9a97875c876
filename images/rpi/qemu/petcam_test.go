//go:build image

package qemu

import (
	"bytes"
	"context"
	"fmt"
	"image/jpeg"
	"io"
	"mime"
	"mime/multipart"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// camera is the kernel's own virtual camera: colour bars with a running clock.
const camera = "modules_load=vivid"

const petcamYAML = `
hostname: petcam
timezone: Europe/Berlin
camera: {hostname: ` + camHost + `, resolution: 640x480, fps: 5}
` + timeYAML

// A card is written with a join token and put into a Pi: a visitor of the edge sees what its camera sees, over TLS with
// a key that is in the HSM. The token is gone from the card, and the next boot does without.
func TestPetCam(t *testing.T) {
	h := newHost(t)
	timeServer(t, h.ns)
	file, token := h.token(t)
	disk := h.personalise(t, petcamYAML, file)
	before := h.signatures()

	start := time.Now()
	r := h.switchOn(t, Machine{Disk: disk, Append: camera}, token, strings.TrimPrefix(token, "khj1_"))
	var first []byte
	eventually(t, r, 5*time.Minute, "the first picture", func(ctx context.Context) (err error) {
		first, err = h.snapshot(ctx)
		return err
	})
	figure(t, "first boot to JPEG", time.Since(start).Seconds(), "s")

	if n := h.signatures(); n <= before {
		t.Errorf("the key server made %d signatures for %s, and %d before there was a visitor", n, camHost, before)
	}
	eventually(t, r, time.Minute, "a picture that differs", func(ctx context.Context) error {
		second, err := h.snapshot(ctx)
		if err == nil && bytes.Equal(first, second) {
			err = fmt.Errorf("two snapshots are equal: the camera stands still")
		}
		return err
	})
	h.stream(t)
	awaitStatus(t, r, 2*time.Minute, "CONNECTED", "petcam", camHost)
	screenshot(t, r, "connected")
	scrubbed(t, disk, token)
	screenshot(t, r, "connected")
	keep(t, "snapshot.jpg", first)

	start = time.Now()
	must(t, r.PowerCut())
	must(t, Edit(disk, 1, func(f *FAT) error { return f.Check() }))
	r = h.switchOn(t, Machine{Disk: disk, Append: camera}, token)
	eventually(t, r, 5*time.Minute, "a picture after the second boot", func(ctx context.Context) error {
		_, err := h.snapshot(ctx)
		return err
	})
	figure(t, "second boot to JPEG", time.Since(start).Seconds(), "s")
}

// scrubbed fails unless the token is nowhere on the card, not even in blocks that no file has any more.
func scrubbed(t *testing.T, d *Disk, token string) {
	t.Helper()
	config, err := ReadFile(d, 1, "keyhaven.yaml")
	must(t, err)
	if bytes.Contains(config, []byte(token)) {
		t.Error("keyhaven.yaml on the card still has the token")
	}
	p, err := d.Partition(1)
	must(t, err)
	all := make([]byte, p.Size)
	_, err = d.ReadAt(all, p.Off)
	must(t, err)
	if i := bytes.Index(all, []byte(token)); i >= 0 {
		t.Errorf("the token is still on the card, %d bytes into the partition", i)
	}
}

// signatures counts those that the key server made for the camera's name.
func (h *host) signatures() int {
	n := 0
	for line := range strings.Lines(h.KeyServer.Log()) {
		if strings.Contains(line, `"msg":"operation"`) && strings.Contains(line, `"sni":"`+camHost+`"`) && strings.Contains(line, `"result":"ok"`) {
			n++
		}
	}
	return n
}

// curl makes a command of a visitor, who trusts the test's authority.
func (h *host) curl(ctx context.Context, path string, args ...string) *exec.Cmd {
	args = append([]string{"-sS", "--fail", "--cacert", h.Roots(), "--resolve", camHost + ":443:127.0.0.1"}, args...)
	return h.ns.Command(ctx, "curl", append(args, "https://"+camHost+path)...)
}

// snapshot fetches one picture and looks whether it is one, of the size that was asked for.
func (h *host) snapshot(ctx context.Context) ([]byte, error) {
	var out, errs bytes.Buffer
	cmd := h.curl(ctx, "/snapshot", "-m", "20")
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("curl: %w: %s", err, errs.String())
	}
	img, err := jpeg.Decode(bytes.NewReader(out.Bytes()))
	if err != nil {
		return nil, fmt.Errorf("%d bytes that are no JPEG: %w", out.Len(), err)
	}
	if size := img.Bounds().Size(); size.X != 640 || size.Y != 480 {
		return nil, fmt.Errorf("the picture has %v, not 640x480", size)
	}
	return out.Bytes(), nil
}

// stream reads three pictures of the endless one.
func (h *host) stream(t *testing.T) {
	t.Helper()
	ctx, cancel := deadline(t, time.Minute)
	defer cancel()
	cmd := h.curl(ctx, "/stream", "-N", "-i", "--http1.1")
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	head, body, err := readHead(out)
	must(t, err)
	kind, params, err := mime.ParseMediaType(head)
	must(t, err)
	if kind != "multipart/x-mixed-replace" {
		t.Fatalf("the stream is %s", head)
	}
	parts := multipart.NewReader(body, strings.TrimPrefix(params["boundary"], "--"))
	for i := range 3 {
		part, err := parts.NextPart()
		if err != nil {
			t.Fatalf("part %d of the stream: %v", i+1, err)
		}
		b, err := io.ReadAll(part)
		must(t, err)
		if _, err := jpeg.Decode(bytes.NewReader(b)); err != nil {
			t.Fatalf("part %d of the stream, %d bytes: %v", i+1, len(b), err)
		}
	}
}

// readHead reads the head of a response and returns its content type.
func readHead(r io.Reader) (kind string, body io.Reader, err error) {
	var head []byte
	for b := make([]byte, 1); !bytes.HasSuffix(head, []byte("\r\n\r\n")); head = append(head, b[0]) {
		if _, err := r.Read(b); err != nil {
			return "", nil, fmt.Errorf("after %q: %w", head, err)
		}
	}
	for line := range strings.Lines(string(head)) {
		if key, value, _ := strings.Cut(line, ":"); strings.EqualFold(key, "content-type") {
			kind = strings.TrimSpace(value)
		}
	}
	return kind, r, nil
}
