package appliance

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/appliance/slot"
)

// A Host is the machine of an agent. Every path of the agent is below Root, so that tests work on a directory. The zero
// value of a field stands for the real thing.
type Host struct {
	// Root stands in place of /. Empty: /.
	Root string
	// Command runs a program and returns what it printed. Nothing secret is ever among its arguments.
	Command func(ctx context.Context, name string, args ...string) ([]byte, error)
	// Writable calls do with the directory of the configuration partition, which can be written while do runs.
	Writable func(do func(dir string) error) error
	// Now and SetClock are the machine's clock.
	Now      func() time.Time
	SetClock func(time.Time) error
	// Addresses lists the machine's addresses that others can reach, for people.
	Addresses func() []string
	// Captures tells cameras from other video devices.
	Captures func(path string) bool
}

// Paths of the machine.
const (
	cardDir     = "/boot/keyhaven"       // the configuration partition
	runDir      = "/run/keyhaven"        // what is rendered at each start
	dataDir     = "/data"                // the data partition
	identityDir = "/data/identity"       // the connector's
	configDir   = "/data/config"         // accepted configuration and token
	systemDir   = "/data/system"         // machine-id, random seed, keys of the SSH server, clock
	slotFile    = "/boot/slot/slot.json" // which version runs
	controlPath = "/run/keyhaven-connector/control.sock"
	screenPath  = "/dev/tty1"
	wpaDir      = runDir + "/wpa" // sockets of wpa_supplicant, which its unit makes
)

// Units of the machine.
const (
	unitConnector = "keyhaven-connector.service"
	unitCamera    = "keyhaven-camera.service"
	unitSSH       = "ssh.service"
	unitTime      = "systemd-timesyncd.service"
)

// unitWiFi joins wireless networks on an interface.
func unitWiFi(iface string) string { return "keyhaven-wifi@" + iface + ".service" }

// connectorUser is whom the connector runs as.
const connectorUser = "kh-connector"

// commandTimeout bounds a program that the agent runs.
const commandTimeout = 60 * time.Second

// withDefaults fills in the real things.
func (h Host) withDefaults() Host {
	if h.Root == "" {
		h.Root = "/"
	}
	if h.Command == nil {
		h.Command = runCommand
	}
	if h.Writable == nil {
		root := h.Root
		h.Writable = func(do func(dir string) error) error { return slot.Writable(root, do) }
	}
	if h.Now == nil {
		h.Now = time.Now
	}
	if h.SetClock == nil {
		h.SetClock = setClock
	}
	if h.Addresses == nil {
		h.Addresses = addresses
	}
	return h
}

// path returns a path of the machine.
func (h *Host) path(p ...string) string {
	return filepath.Join(append([]string{h.Root}, p...)...)
}

func runCommand(ctx context.Context, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %.300s", strings.Join(append([]string{name}, args...), " "), err, bytes.TrimSpace(out))
	}
	return out, err
}

// addresses lists the addresses of this machine that reach beyond the cable, IPv4 first.
func addresses() (list []string) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var v6 []string
	for _, a := range all {
		n, ok := a.(*net.IPNet)
		switch {
		case !ok || n.IP.IsLoopback() || n.IP.IsLinkLocalUnicast():
		case n.IP.To4() != nil:
			list = append(list, n.IP.String())
		default:
			v6 = append(v6, n.IP.String())
		}
	}
	return append(list, v6...)
}

// chown gives files to a user of the machine's own list.
func (h *Host) chown(user string, paths ...string) error {
	uid, gid, err := h.user(user)
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := os.Lchown(p, uid, gid); err != nil {
			return err
		}
	}
	return nil
}

// user looks a user up.
func (h *Host) user(name string) (uid, gid int, err error) {
	b, err := readSmall(h.path("/etc/passwd"))
	if err != nil {
		return 0, 0, err
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		f := strings.Split(sc.Text(), ":")
		if len(f) < 4 || f[0] != name {
			continue
		}
		uid, err := strconv.Atoi(f[2])
		if err != nil {
			return 0, 0, fmt.Errorf("/etc/passwd: user %s: %w", name, err)
		}
		gid, err := strconv.Atoi(f[3])
		if err != nil {
			return 0, 0, fmt.Errorf("/etc/passwd: user %s: %w", name, err)
		}
		return uid, gid, nil
	}
	return 0, 0, fmt.Errorf("/etc/passwd has no user %s", name)
}
