package appliance

import (
	"context"
	"path/filepath"
	"time"
)

// A Host is the machine of an agent. Every path of the agent is below Root, so that tests work on a directory. The zero
// value of a field stands for the real thing on Linux; [NewHost] fills them in.
type Host struct {
	// Root stands in place of /. Empty: /.
	Root string
	// Command runs a program and returns what it printed. Nothing secret is ever among its arguments.
	Command func(ctx context.Context, name string, args ...string) ([]byte, error)
	// Writable makes the configuration partition writable, or read-only again.
	Writable func(dir string, yes bool) error
	// Now and SetClock are the machine's clock.
	Now      func() time.Time
	SetClock func(time.Time) error
	// Reboot restarts the machine. The argument is for the firmware, such as "0 tryboot"; empty: none.
	Reboot func(arg string) error
	// Notify tells the service manager a state such as READY=1.
	Notify func(state string) error
	// Chown gives a file to a user, by the name in the machine's own list of users.
	Chown func(path, user string) error
	// Addresses lists the machine's addresses that others can reach, for people.
	Addresses func() []string
}

// path returns a path of the machine.
func (h *Host) path(p string) string { return filepath.Join(h.Root, filepath.FromSlash(p)) }

// Paths of the machine.
const (
	cardDir      = "/boot/keyhaven"       // the configuration partition
	runDir       = "/run/keyhaven"        // what is rendered at each start
	dataDir      = "/data"                // the data partition
	identityDir  = "/data/identity"       // the connector's
	configDir    = "/data/config"         // accepted configuration and token
	systemDir    = "/data/system"         // machine-id, random seed, keys of the SSH server, clock
	slotFile     = "/boot/slot/slot.json" // which version runs
	bootFile     = "/run/keyhaven/boot.json"
	controlPath  = "/run/keyhaven-connector/control.sock"
	statusName   = "keyhaven-status.txt"
	screenPath   = "/dev/tty1"
	cameraListen = "127.0.0.1:8090"

	cameraService = "http://" + cameraListen
)

// Units of the machine.
const (
	unitConnector = "keyhaven-connector.service"
	unitCamera    = "keyhaven-camera.service"
	unitSSH       = "ssh.service"
	unitTime      = "systemd-timesyncd.service"
	unitWiFi      = "keyhaven-wifi@" // and the interface, and .service
)
