package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// A Machine says what to run.
type Machine struct {
	Board Board
	Disk  *Disk
	// Dir is for the machine's files. It must exist and be short, as it holds sockets.
	Dir string
	// Append is added to the kernel's command line.
	Append string
	// Clock is what the machine's clock says at its first boot; zero is the present.
	Clock time.Time
	// NS is where the machine's network is: 10.0.2.2 in the guest is 127.0.0.1 there. If nil, this process's own.
	NS *testnet.Namespace
	// Cores overrides how many the board has; zero leaves it.
	Cores int
	// Boots is how many times it may boot before the run ends with an error; zero is 10.
	Boots int
}

// A Run is a machine that is switched on. Its methods are safe for concurrent use.
type Run struct {
	m      Machine
	serial string // file
	server *Server
	cancel context.CancelFunc
	done   chan struct{} // closed when the machine is off; err holds from then on
	err    error

	mu    sync.Mutex // guards the fields below
	boots []Boot
	qmp   *qmp
}

// ErrBootLoop says that a machine booted more often than it may.
var ErrBootLoop = errors.New("qemu: the machine boots again and again")

// Start switches the machine on. Switch it off with PowerCut, whatever becomes of it.
func (m Machine) Start() (*Run, error) {
	if m.Boots == 0 {
		m.Boots = 10
	}
	server, err := Serve(m.Disk, filepath.Join(m.Dir, "nbd.sock"))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Run{m: m, serial: filepath.Join(m.Dir, "serial.log"), server: server, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		err := r.loop(ctx)
		if ctx.Err() != nil {
			err = nil // the power was cut
		}
		r.err = errors.Join(err, server.Close())
	}()
	return r, nil
}

// The lines by which the kernel says how it ends, whatever its log level.
const (
	lineTryboot  = "reboot: Restarting system with command '0 tryboot'"
	linePowerOff = "reboot: Power down"
	lineHalted   = "reboot: System halted"
)

// loop boots until the machine switches itself off.
func (r *Run) loop(ctx context.Context) error {
	tryboot := false
	for range r.m.Boots {
		b, err := PlayFirmware(r.m.Disk, r.m.Dir, tryboot, r.m.Board.DTB, r.m.Board.Filter...)
		if err != nil {
			return err
		}
		from := len(r.Serial())
		r.mu.Lock()
		r.boots = append(r.boots, *b)
		r.mu.Unlock()
		if err := r.boot(ctx, b); err != nil {
			return err
		}
		said := r.Serial()[from:]
		if strings.Contains(said, linePowerOff) || strings.Contains(said, lineHalted) {
			return nil
		}
		tryboot = strings.Contains(said, lineTryboot)
	}
	return fmt.Errorf("%w: %d times", ErrBootLoop, r.m.Boots)
}

// boot runs QEMU until the guest resets, or ctx ends.
func (r *Run) boot(ctx context.Context, b *Boot) error {
	monitor := filepath.Join(r.m.Dir, "qmp.sock")
	os.Remove(monitor)
	cmd := r.m.NS.Command(ctx, r.m.Board.Program, r.args(b, monitor)...)
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return err
	}
	var wg sync.WaitGroup
	ended := make(chan struct{})
	wg.Go(func() { r.attend(monitor, ended) })
	err := cmd.Wait()
	close(ended)
	wg.Wait()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() == nil) {
		return fmt.Errorf("%s: %w: %s", r.m.Board.Program, err, out.String())
	}
	return ctx.Err()
}

// attend keeps a connection to the monitor while QEMU runs.
func (r *Run) attend(monitor string, ended chan struct{}) {
	q, err := dialQMP(monitor, func() bool {
		select {
		case <-ended:
			return false
		default:
			return true
		}
	})
	if err != nil {
		return // QEMU ended, and says why itself
	}
	r.mu.Lock()
	r.qmp = q
	r.mu.Unlock()
	<-ended
	r.mu.Lock()
	r.qmp = nil
	r.mu.Unlock()
	q.close()
}

func (r *Run) args(b *Boot, monitor string) []string {
	m, board := r.m, r.m.Board
	args := slices.Clone(board.Args)
	if i := slices.Index(args, "-smp"); i >= 0 && m.Cores > 0 {
		args[i+1] = strconv.Itoa(m.Cores)
	}
	node := "driver=nbd,server.type=unix,server.path=" + filepath.Join(m.Dir, "nbd.sock")
	if board.SD {
		args = append(args, "-drive", "if=sd,"+node)
	} else {
		args = append(args, "-blockdev", "node-name=card,"+node, "-device", "virtio-blk-pci,drive=card")
	}
	args = append(args, "-netdev", "user,id=net")
	args = append(args, board.Net...)
	args = append(args, board.Screen...)
	args = append(args, "-display", "none", "-nodefaults", "-no-reboot", "-kernel", b.Kernel, "-initrd", b.Initrd, "-append", r.cmdline(b),
		"-chardev", "file,id=serial,append=on,path="+r.serial, "-serial", "chardev:serial", "-qmp", "unix:"+monitor+",server=on,wait=off")
	if b.DTB != "" {
		args = append(args, "-dtb", b.DTB)
	}
	if !m.Clock.IsZero() {
		args = append(args, "-rtc", "base="+m.Clock.UTC().Format("2006-01-02T15:04:05"))
	}
	return args
}

// cmdline is the slot's, as the firmware would hand it on: with the serial line's own name, and for machines without the
// firmware's device tree with the partition.
func (r *Run) cmdline(b *Boot) string {
	var words []string
	serial := "console=" + r.m.Board.Console + ",115200"
	for _, w := range strings.Fields(b.Cmdline) {
		if strings.HasPrefix(w, "console=serial0") {
			w = serial
		}
		words = append(words, w)
	}
	if !slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(w, "console="+r.m.Board.Console) }) {
		words = append([]string{serial}, words...) // before the others, of which the last is /dev/console
	}
	words = append(words, "kh.part="+strconv.Itoa(b.Slot), r.m.Board.Cmdline, r.m.Append)
	return strings.Join(strings.Fields(strings.Join(words, " ")), " ")
}

// Reset restarts the machine as a push on its reset button does.
func (r *Run) Reset() error {
	r.mu.Lock()
	q := r.qmp
	r.mu.Unlock()
	if q == nil {
		return errQMPGone
	}
	_, err := q.do("quit", nil)
	if errors.Is(err, errQMPGone) {
		err = nil // that quickly
	}
	return err
}

// PowerCut switches the machine off as a pulled plug does, and returns what went wrong before.
func (r *Run) PowerCut() error {
	r.cancel()
	<-r.done
	return r.err
}

// Wait waits until the machine has switched itself off.
func (r *Run) Wait(ctx context.Context) error {
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Running reports whether the machine is on.
func (r *Run) Running() bool {
	select {
	case <-r.done:
		return false
	default:
		return true
	}
}

// History lists the boots so far, the present one last.
func (r *Run) History() []Boot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.boots)
}

// Serial is what came over the serial line so far, over all boots.
func (r *Run) Serial() string {
	b, err := os.ReadFile(r.serial)
	if err != nil {
		return "" // not yet
	}
	return string(b)
}

// Until calls f until it succeeds, ctx ends or the machine is off, and then returns f's last error.
func (r *Run) Until(ctx context.Context, f func(context.Context) error) error {
	for {
		err := f(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-r.done:
			return errors.Join(fmt.Errorf("qemu: the machine has switched itself off: %w", err), r.err)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// WaitSerial waits until the serial line has said text after the offset from.
func (r *Run) WaitSerial(ctx context.Context, from int, text string) error {
	return r.Until(ctx, func(context.Context) error {
		if s := r.Serial(); len(s) < from || !strings.Contains(s[from:], text) {
			return fmt.Errorf("qemu: the serial line has not said %q", text)
		}
		return nil
	})
}

// Screenshot writes a picture of the screen, as PNG.
func (r *Run) Screenshot(file string) error {
	r.mu.Lock()
	q := r.qmp
	r.mu.Unlock()
	if q == nil {
		return errQMPGone
	}
	_, err := q.do("screendump", map[string]any{"filename": file, "format": "png"})
	return err
}

// PressPower asks the guest to shut down, as a power button does.
func (r *Run) PressPower() error {
	r.mu.Lock()
	q := r.qmp
	r.mu.Unlock()
	if q == nil {
		return errQMPGone
	}
	_, err := q.do("system_powerdown", nil)
	return err
}

// ReadFile reads a file of a FAT partition while the machine may run. What is written meanwhile may be half there.
func (r *Run) ReadFile(part int, name string) ([]byte, error) { return ReadFile(r.m.Disk, part, name) }

// ReadFile reads a file of a FAT partition of a disk.
func ReadFile(d *Disk, part int, name string) ([]byte, error) {
	fat, done, err := scratch(d, part)
	if err != nil {
		return nil, err
	}
	defer done()
	return fat.Read(name)
}

// Edit changes a FAT partition of a disk, as a card reader would.
func Edit(d *Disk, part int, f func(*FAT) error) error {
	fat, done, err := scratch(d, part)
	if err != nil {
		return err
	}
	defer done()
	if err := f(fat); err != nil {
		return err
	}
	return fat.Store(d, part)
}

// scratch copies a partition into a file that done removes.
func scratch(d *Disk, part int) (fat *FAT, done func(), err error) {
	f, err := os.CreateTemp("", "keyhaven-fat-")
	if err != nil {
		return nil, nil, err
	}
	f.Close()
	done = func() { os.Remove(f.Name()) }
	if fat, err = Extract(d, part, f.Name()); err != nil {
		done()
	}
	return fat, done, err
}
