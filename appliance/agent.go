package appliance

import (
	"context"
	"errors"
	"log/slog"
	"net/url"
	"os"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/internal/notify"
)

// Health is how the connector is.
type Health struct {
	Tunnel bool      // at least one session to an edge is up
	Since  time.Time // when Tunnel became what it is
	Text   string    // for people
}

// An Updater keeps the system up to date. Its methods may be called by several goroutines.
type Updater interface {
	Run(ctx context.Context) error
	Report() fleet.Report
	Text() string
}

// UpdateHooks are what an [Updater] asks the agent.
type UpdateHooks struct {
	Settings  Update                 // of the configuration
	Proxy     *url.URL               // by which the source is reached, with user and password; nil: none
	Location  *time.Location         // of the machine's clock
	Healthy   func() bool            // whether the tunnel is up
	Directive func() fleet.Directive // what an edge wants
	Stop      func(context.Context)  // ends what runs, before a restart of the machine
	Changed   func()                 // is told of changes of Report
}

// An Agent runs an appliance. Its fields are set before Run, and not changed after.
type Agent struct {
	Host    Host
	Join    JoinFunc                             // nil: tokens are kept and not used
	Updates func(h UpdateHooks) (Updater, error) // nil: there are no updates
	Reload  <-chan os.Signal                     // each value has the card read again; nil: never
	Version string                               // of this program
	Log     *slog.Logger                         // nil: nothing is logged
}

// Intervals of the agent.
const (
	tickEvery     = 2 * time.Second
	askEvery      = 4 * time.Second  // how the connector is
	wifiEvery     = 15 * time.Second // why there is no address
	cameraEvery   = 10 * time.Second // whether there is a camera, and how it is
	unitsEvery    = time.Minute      // units that should run are started
	reportEvery   = time.Minute      // to the fleet
	clockEvery    = time.Hour        // the time is kept
	aliveWithin   = 90 * time.Second // no step takes longer, or the watchdog restarts the agent: the longest is one program
	networkWithin = 30 * time.Second // an address is waited for before its lack is told
	connectWithin = 45 * time.Second // after the start, or after joining, a session is waited for before its lack is told
	updaterEvery  = time.Minute      // between attempts to begin with updates
)

// Run sets the machine up and looks after it until ctx ends. It tells the service manager that it is ready once the
// configuration is rendered, before there is a network. What goes wrong with the machine is told to people and tried again;
// the error is nil.
func (a *Agent) Run(ctx context.Context) error {
	r := newRunner(a)
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	wg.Go(func() { r.led.run(ctx) })
	r.boot(ctx)
	say := notify.Notifier{Logger: r.log}
	say.Ready("the configuration is rendered")
	wg.Go(func() {
		if err := say.Watchdog(ctx, r.alive); err != nil {
			r.log.Error("no watchdog", "err", err)
		}
	})
	wg.Go(func() { r.joining(ctx) })
	wg.Go(func() { r.updating(ctx) })
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for {
		r.tick(ctx)
		select {
		case <-ctx.Done():
			say.Stopping("the machine or the service manager stops it")
			r.rest()
			return nil
		case <-a.Reload:
			r.log.Info("reading the card again")
			r.reload(ctx)
		case <-r.look:
		case <-tick.C:
		}
	}
}

// boot does what comes before the network.
func (r *runner) boot(ctx context.Context) {
	h := &r.Host
	was := h.Now()
	switch moved, err := h.advanceClock(); {
	case err != nil:
		r.log.Error("the clock cannot be set", "err", err)
	case moved:
		r.log.Warn("the clock stood before the image was built or the device ran last; it was set to that until a time server answers", "was", was)
	}
	for _, step := range []struct {
		name string
		do   func() error
	}{{"identity", r.enrol.recover}, {"machine-id", h.keepMachineID}, {"random seed", h.stirRandomness}} {
		if err := step.do(); err != nil {
			r.log.Error("cannot keep what belongs to the machine", "op", step.name, "err", err)
		}
	}
	_, err := os.Stat(h.path(runDir, statusFile))
	r.started = err == nil // the agent alone was started again
	r.load()
	r.apply(ctx)
	r.started = true
}

// reload reads the card again.
func (r *runner) reload(ctx context.Context) {
	r.load()
	r.apply(ctx)
	r.unitsAt = time.Time{}
	nudge(r.wake)
}

// rest keeps what the next start needs.
func (r *runner) rest() {
	if err := errors.Join(r.Host.saveClock(), r.Host.stirRandomness()); err != nil {
		r.log.Error("cannot keep what belongs to the machine", "err", err)
	}
}

// alive says whether the agent works.
func (r *runner) alive(context.Context) error {
	if time.Since(time.Unix(0, r.beat.Load())) > aliveWithin {
		return errors.New("the agent hangs")
	}
	return nil
}

// tick looks at everything that is due, and tells how it is.
func (r *runner) tick(ctx context.Context) {
	now := time.Now()
	if r.news.Swap(false) {
		r.reportAt = time.Time{}
	}
	for _, job := range []struct {
		at    *time.Time
		every time.Duration
		do    func(context.Context)
	}{{&r.cameraAt, cameraEvery, r.lookAtCamera}, {&r.wifiAt, wifiEvery, r.lookAtWiFi}, {&r.unitsAt, unitsEvery, r.startUnits}, {&r.askAt, askEvery, r.askConnector},
		{&r.reportAt, reportEvery, r.exchange}, {&r.clockAt, clockEvery, r.keepClock}} {
		if ctx.Err() == nil && (job.at.IsZero() || now.Sub(*job.at) >= job.every) {
			*job.at = now
			job.do(ctx)
			r.lives()
		}
	}
	r.tell()
	r.lives()
}

// lives notes that the agent works.
func (r *runner) lives() { r.beat.Store(time.Now().UnixNano()) }

func (r *runner) keepClock(context.Context) {
	if err := r.Host.saveClock(); err != nil {
		r.log.Debug("the time is not kept", "err", err)
	}
}
