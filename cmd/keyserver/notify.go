package main

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// A notifier tells the service manager how the server is. See sd_notify(3); without NOTIFY_SOCKET it tells nobody.
type notifier struct{ logger *slog.Logger }

// tell sends a message of several lines at once.
func (n notifier) tell(lines ...string) {
	if _, err := daemon.SdNotify(false, strings.Join(lines, "\n")); err != nil {
		n.logger.Warn("the service manager cannot be told", "err", err)
	}
}

func (n notifier) ready(status string)    { n.tell(daemon.SdNotifyReady, "STATUS="+status) }
func (n notifier) stopping(status string) { n.tell(daemon.SdNotifyStopping, "STATUS="+status) }

// reloading comes before a reload, and ready after it.
func (n notifier) reloading() {
	n.tell(daemon.SdNotifyReloading, strings.TrimSpace(daemon.SdNotifyMonotonicUsec()), "STATUS=reading the configuration")
}

// watchdog tells the service manager at half of the interval that it asks for that the server is alive, if it is: alive gets as long
// as the other half to say so. A server that is not alive is not spoken for, so that the service manager restarts it.
func (n notifier) watchdog(ctx context.Context, alive func(context.Context) error) error {
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
			n.logger.Error("the server does not answer itself; the service manager's watchdog is not told that it lives", "err", err)
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
