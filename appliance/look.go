package appliance

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/appliance/camera"
	"github.com/keyhaven/keyhaven/connector"
)

// Limits of the connector's answer.
const (
	askTimeout = 3 * time.Second
	maxAnswer  = 1 << 20
)

// askStatus asks the connector over its control socket.
func askStatus(ctx context.Context, socket string) (*connector.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://keyhaven-connector/v1/status", nil)
	if err != nil {
		return nil, err
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the connector answers with status %s", resp.Status)
	}
	st := &connector.Status{}
	return st, json.Unmarshal(b, st)
}

// connectorText says how the connector is.
func connectorText(st *connector.Status) string {
	switch {
	case st == nil:
		return "The connector does not answer."
	case !st.Up.IsZero():
		edges := map[string]bool{}
		for _, s := range st.Sessions {
			if s.State == connector.StateConnected {
				edges[s.Edge] = true
			}
		}
		return fmt.Sprintf("The connector has a connection to %s.", strings.Join(sorted(edges), " and "))
	}
	for _, s := range st.Sessions {
		if s.Error != "" {
			return oneLine(fmt.Sprintf("Edge %s: %s", s.Edge, s.Error))
		}
	}
	return "The connector is trying."
}

// connectorTodo is what a person can do about a connector without a session.
func connectorTodo(st *connector.Status) string {
	if st != nil {
		for _, s := range st.Sessions {
			if s.Remedy != "" {
				return oneLine(s.Remedy)
			}
		}
	}
	return "Look whether the edge runs, and whether your network lets UDP and TCP out to its port (7844 as a rule). The device keeps trying."
}

func (r *runner) exists(path string) bool {
	_, err := os.Stat(r.Host.path(path))
	return err == nil
}

// lookAtCamera finds the camera, has the streamer serve it, and asks how it is.
func (r *runner) lookAtCamera(ctx context.Context) {
	file := r.Host.path(runDir, "streamer.env")
	c := r.config.Camera
	if c == nil {
		if had, err := remove(file); had || err != nil {
			r.report("the camera's service", r.systemctl(ctx, "--no-block", "stop", unitCamera))
		}
		r.device, r.camera = "", ""
		return
	}
	device, ok := r.findCamera(ctx, c)
	env, err := c.settings().Environment(device)
	if err != nil {
		r.report("the camera's settings", err)
		return
	}
	changed, err := update(file, env, 0o644)
	r.report("the camera's settings", err)
	if changed {
		r.report("the camera's service", r.systemctl(ctx, "--no-block", "restart", unitCamera))
	}
	r.device = device
	st, err := camera.Ask(ctx, camera.Addr)
	switch {
	case !ok || err == nil:
		r.camera = st.String()
	default:
		r.camera = "starting"
	}
}

// findCamera returns the device and whether it is there.
func (r *runner) findCamera(ctx context.Context, c *Camera) (device string, ok bool) {
	if c.Test {
		if device = r.testCamera(); device == "" {
			_, err := r.Host.Command(ctx, "modprobe", "vivid", "n_devs=1")
			r.report("the test picture", err)
			device = r.testCamera()
		}
		return orElse(device, "/dev/video0"), device != ""
	}
	if c.Device != "" && c.Device != camera.Auto {
		return c.Device, r.exists(c.Device)
	}
	return camera.Find(r.Host.Root, r.Host.Captures)
}

// testCamera is the device of the kernel's test picture, or "".
func (r *runner) testCamera() string {
	names, err := filepath.Glob(r.Host.path("/sys/class/video4linux/video*/name"))
	if err != nil {
		return ""
	}
	for _, n := range names {
		if b, err := readSmall(n); err == nil && strings.Contains(string(b), "vid-cap") {
			return "/dev/" + filepath.Base(filepath.Dir(n))
		}
	}
	return ""
}

// report logs what went wrong, if anything did.
func (r *runner) report(what string, err error) {
	if err != nil {
		r.log.Error("not as it should be", "op", what, "err", err)
	}
}

// lookAtWiFi finds out why there is no address over Wi-Fi, as far as that can be known.
func (r *runner) lookAtWiFi(ctx context.Context) {
	r.wifi = ""
	if len(r.config.WiFi.Networks) == 0 || len(r.Host.Addresses()) > 0 {
		return
	}
	if !r.exists("/sys/class/net/" + r.wireless()) {
		r.wifi = "It has no Wi-Fi, or the kernel does not know its radio."
		return
	}
	out, err := r.Host.Command(ctx, "wpa_cli", "-s", wpaDir, "-p", wpaDir, "-i", r.wireless(), "list_networks")
	switch s := string(out); {
	case err != nil: // it is starting
	case strings.Contains(s, "TEMP-DISABLED"):
		r.wifi = "The Wi-Fi refuses it: the password is most likely wrong."
	case strings.Contains(s, "CURRENT"):
		r.wifi = "The Wi-Fi was joined, but no address came: look at the router's DHCP."
	default:
		r.wifi = "The Wi-Fi was not found: its name may be spelt in another way (capital letters count), or it is out of reach, or on 5 GHz, which older devices do not have."
	}
}
