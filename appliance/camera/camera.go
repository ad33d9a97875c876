// Package camera says how the picture of a USB camera is served on an appliance: with which flags the streamer (uStreamer,
// as Debian packages it) runs, which device it takes, the ingress rule that publishes it, the page that visitors see, and how
// the streamer is. It starts nothing by itself.
package camera

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/keyhaven/keyhaven/ingressconf"
)

const (
	// Addr is where the streamer listens, on the machine's loopback.
	Addr = "127.0.0.1:" + port
	port = "8090"
	// PageDir is where the image keeps what [Page] returns.
	PageDir = "/usr/share/keyhaven/camera"
	// Auto is the device that [Find] chooses.
	Auto = "auto"
)

// Limits of what may be set.
const (
	maxSide = 8192
	maxFPS  = 120
)

// Settings say what the picture is like. The zero value of a field means its default.
type Settings struct {
	Device     string // "auto", /dev/videoN, or a name below /dev/v4l; if empty, auto
	Resolution string // width x height; if empty, 1280x720
	FPS        int    // frames a second at most; if zero, 10
	Quality    int    // of the JPEG, 1 to 100, where the camera makes none by itself; if zero, 80
}

// A Fault is what is wrong with one field. Field is its name in keyhaven.yaml, such as resolution.
type Fault struct{ Field, Text string }

// Error implements error.
func (f *Fault) Error() string { return f.Field + ": " + f.Text }

var (
	device     = regexp.MustCompile(`^/dev/(video[0-9]{1,3}|v4l/by-(id|path)/[A-Za-z0-9][A-Za-z0-9_.:+,@-]*)$`)
	resolution = regexp.MustCompile(`^([1-9][0-9]{1,3})x([1-9][0-9]{1,3})$`)
)

func (s Settings) completed() Settings {
	if s.Device == "" {
		s.Device = Auto
	}
	if s.Resolution == "" {
		s.Resolution = "1280x720"
	}
	if s.FPS == 0 {
		s.FPS = 10
	}
	if s.Quality == 0 {
		s.Quality = 80
	}
	return s
}

// Check returns everything that is wrong.
func (s Settings) Check() (faults []*Fault) {
	s = s.completed()
	add := func(field, format string, args ...any) {
		faults = append(faults, &Fault{field, fmt.Sprintf(format, args...)})
	}
	if s.Device != Auto && (len(s.Device) > 255 || !device.MatchString(s.Device)) {
		add("device", "%q is no camera; write auto, /dev/video0, or a name below /dev/v4l/by-id", s.Device)
	}
	m := resolution.FindStringSubmatch(s.Resolution)
	if m == nil {
		add("resolution", "%q: write width x height without spaces, such as 1280x720 or 640x480", s.Resolution)
	} else if w, h := number(m[1]), number(m[2]); w < 64 || h < 64 || w > maxSide || h > maxSide {
		add("resolution", "%q: each side must be from 64 to %d", s.Resolution, maxSide)
	}
	if s.FPS < 1 || s.FPS > maxFPS {
		add("fps", "must be from 1 to %d frames a second, not %d", maxFPS, s.FPS)
	}
	if s.Quality < 1 || s.Quality > 100 {
		add("quality", "must be from 1 to 100, not %d", s.Quality)
	}
	return faults
}

func number(s string) int {
	n, _ := strconv.Atoi(s) //nolint:errcheck // the expression takes digits alone
	return n
}

// Args are the streamer's arguments, for a device that was found ([Find]) where Settings leave it open. An error is a fault
// that Check would have told.
//
// A camera that makes JPEG itself is passed through as it is; pictures of others are encoded. Nobody but this machine
// reaches the streamer, and pages of other sites may not read what it sends: no origin is allowed. While nobody watches it
// takes one picture a second, and the picture that stands still, as that of a missing camera, is sent rarely.
func (s Settings) Args(found string) ([]string, error) {
	s = s.completed()
	if faults := s.Check(); len(faults) > 0 {
		return nil, fmt.Errorf("camera: %w", faults[0])
	}
	if s.Device == Auto {
		if s.Device = found; !device.MatchString(found) {
			return nil, fmt.Errorf("camera: %q is no device", found)
		}
	}
	return []string{
		"--host=127.0.0.1", "--port=" + port, "--static=" + PageDir,
		"--device=" + s.Device, "--resolution=" + s.Resolution, "--desired-fps=" + strconv.Itoa(s.FPS),
		"--format=MJPEG", "--encoder=HW", "--quality=" + strconv.Itoa(s.Quality), "--workers=2", "--buffers=3",
		"--drop-same-frames=30", "--slowdown", "--tcp-nodelay",
		"--device-timeout=5", "--device-error-delay=5", "--no-log-colors",
	}, nil
}

// Environment is the streamer's environment file: STREAMER_ARGS, which its unit splits at spaces. No argument has one.
func (s Settings) Environment(found string) ([]byte, error) {
	args, err := s.Args(found)
	if err != nil {
		return nil, err
	}
	return []byte("STREAMER_ARGS=" + strings.Join(args, " ") + "\n"), nil
}

// Rule publishes the page, the stream and snapshots, and nothing else of the streamer, under a host name. bandwidth is for all
// visitors together; if empty, there is no bound.
func Rule(hostname, bandwidth string) ingressconf.Rule {
	return ingressconf.Rule{Hostname: hostname, Path: "^/(stream|snapshot)?$", Service: "http://" + Addr, Bandwidth: bandwidth}
}
