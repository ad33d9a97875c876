// Package notify tells the service manager how a program is, see sd_notify(3). Without NOTIFY_SOCKET it tells nobody.
package notify

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// A Notifier speaks for one program. Its methods may be called by several goroutines.
type Notifier struct {
	// Logger takes what goes wrong. Nil discards.
	Logger *slog.Logger
}

func (n Notifier) log() *slog.Logger {
	if n.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return n.Logger
}

// tell sends a message of several lines at once.
func (n Notifier) tell(lines ...string) {
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		n.log().Warn("the service manager cannot be told", "err", err)
	}
}

// Ready says that the program does what it is there for.
func (n Notifier) Ready(status string) { n.tell(daemon.SdNotifyReady, "STATUS="+status) }

// Status says, on a line, how the program is.
func (n Notifier) Status(status string) { n.tell("STATUS=" + status) }

// Stopping says that the program is about to end.
func (n Notifier) Stopping(status string) { n.tell(daemon.SdNotifyStopping, "STATUS="+status) }

// Reloading comes before a reload, and Ready after it.
func (n Notifier) Reloading() {
	n.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()), "STATUS=reading the configuration")
}

// Main says that another process of the unit is its main process from now on. What this one says afterwards, the service
// manager ignores.
func (n Notifier) Main(pid int) { n.tell(fmt.Sprintf("MAINPID=%d", pid)) }

// Watchdog tells the service manager at half of the interval that it asks for that the program is alive, if it is: alive gets
// as long as half of the other half to say so. A program that is not alive is not spoken for, so that the service manager
// restarts it. Watchdog returns when ctx ends, or at once if the service manager does not ask.
func (n Notifier) Watchdog(ctx context.Context, alive func(context.Context) error) error {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return fmt.Errorf("the service manager's watchdog: %w", err)
	}
	if interval == 0 {
		return nil
	}
	tick := time.NewTicker(interval / 2)
	defer tick.Stop()
	for {
		check, cancel := context.WithTimeout(ctx, interval/4)
		err := alive(check)
		cancel()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			n.log().Error("the program does not answer itself; the service manager's watchdog is not told that it lives", "err", err)
		default:
			n.tell(daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}
