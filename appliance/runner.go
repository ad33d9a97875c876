package appliance

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
	"github.com/keyhaven/keyhaven/connector"
)

// A runner is an agent at work. What stands before mu belongs to the goroutine of Run.
type runner struct {
	*Agent
	Host  Host // with its defaults
	log   *slog.Logger
	enrol enroller
	led   *led
	wake  chan struct{} // a token may be there
	look  chan struct{} // something changed that people should be told
	news  atomic.Bool   // the fleet's report changed
	beat  atomic.Int64  // when the agent was seen to work last, in nanoseconds of Unix time

	config   *Config
	mistakes []string
	notes    []string
	started  bool // the machine was set up before

	cameraAt, wifiAt, unitsAt, askAt, reportAt, clockAt time.Time // when each was done last

	begin     time.Time
	connector *connector.Status // nil: it does not answer
	camera    string            // how the camera is, for people
	device    string            // the camera's, as it was rendered last
	wifi      string            // why there is no address over Wi-Fi, for people
	shown     shown

	mu        sync.Mutex // guards what follows
	health    Health
	trouble   *trouble  // of joining
	joined    time.Time // when that was done last
	directive fleet.Directive
	updater   Updater
	updateErr string
	settings  Update
	proxy     Proxy
	zone      *time.Location     // the machine's
	restart   context.CancelFunc // ends the updater, which then begins with new settings
}

func newRunner(a *Agent) *runner {
	r := &runner{Agent: a, Host: a.Host.withDefaults(), log: a.Log, wake: make(chan struct{}, 1), look: make(chan struct{}, 1), config: &Config{}, begin: time.Now(), zone: time.UTC}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.enrol = enroller{&r.Host}
	r.led = findLED(&r.Host)
	r.lives()
	return r
}

// Waits between attempts to join.
const (
	firstWait = 2 * time.Second
	mostWait  = time.Minute
)

// joining uses up tokens, as they come, until ctx ends.
func (r *runner) joining(ctx context.Context) {
	wait := firstWait
	for ctx.Err() == nil {
		token, ok := r.enrol.pending()
		switch {
		case !ok || r.Join == nil:
			r.setTrouble(nil)
			wait = firstWait
			r.pause(ctx, 0)
			continue
		case len(r.Host.Addresses()) == 0:
			r.pause(ctx, time.Second)
			continue
		}
		r.log.Info("joining", "token", token.ID)
		err := r.enrol.join(ctx, r.Join, token, r.proposal(), r.via())
		if ctx.Err() != nil {
			return
		}
		if why, refused := errors.AsType[refusal](err); refused {
			r.log.Error("the join token was refused", "token", token.ID, "err", oneLine(why.Error()))
			nudge(r.look)
			continue
		}
		if err != nil {
			t := joinTrouble(err, r.Host.Now())
			r.log.Warn("joining failed; it is tried again", "token", token.ID, "err", oneLine(err.Error()), "wait", wait)
			r.setTrouble(&t)
			r.pause(ctx, wait/2+rand.N(wait))
			wait = min(2*wait, mostWait)
			continue
		}
		r.log.Info("joined", "token", token.ID)
		r.mu.Lock()
		r.trouble, r.joined = nil, time.Now()
		r.mu.Unlock()
		if err := r.systemctl(ctx, "--no-block", "restart", unitConnector); err != nil {
			r.log.Error("the connector does not start", "err", err)
		}
		nudge(r.look)
	}
}

// nudge leaves a message for who waits for c, once.
func nudge(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// pause waits for d, or without one until a token may be there.
func (r *runner) pause(ctx context.Context, d time.Duration) {
	var after <-chan time.Time
	if d > 0 {
		after = time.After(d)
	}
	select {
	case <-ctx.Done():
	case <-r.wake:
	case <-after:
	}
}

func (r *runner) setTrouble(t *trouble) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.trouble = t
	nudge(r.look)
}

// proposal is the name for the connector: the machine's and a part of its id, so that many machines may have one name. Machines
// without a name leave it to the edge.
func (r *runner) proposal() string {
	accepted := readCard(r.Host.path(configDir)).config
	id, err := readSmall(r.Host.path(systemDir, machineIDFile))
	if accepted == nil || accepted.Hostname == "" || err != nil || len(id) < 6 {
		return ""
	}
	return string(accepted.Hostname)[:min(len(accepted.Hostname), 57)] + "-" + string(id[:6])
}

// updating runs the updater until ctx ends.
func (r *runner) updating(ctx context.Context) {
	for r.Updates != nil && ctx.Err() == nil {
		err := r.updateOnce(ctx)
		if ctx.Err() == nil && err != nil {
			r.log.Error("updates stopped; they are begun again", "err", err)
			r.sleep(ctx, updaterEvery)
		}
	}
}

// updateOnce runs the updater until ctx or the settings end.
func (r *runner) updateOnce(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	r.mu.Lock()
	r.restart = stop
	settings, proxy, zone := r.settings, r.proxy, r.zone
	r.mu.Unlock()
	u, err := r.Updates(UpdateHooks{Settings: settings, Proxy: proxy.Address(), Location: zone, Healthy: r.healthy, Directive: r.wanted, Stop: r.stopServices,
		Changed: func() { r.news.Store(true) }})
	r.mu.Lock()
	if r.updater, r.updateErr = u, ""; err != nil {
		r.updater, r.updateErr = nil, "not possible: "+oneLine(err.Error())
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if err = u.Run(ctx); ctx.Err() != nil {
		return nil
	}
	return errors.Join(errors.New("the updater ended"), err)
}

// configure gives the updater new settings. While a version is on trial it is left alone.
func (r *runner) configure(c *Config) {
	zone, err := time.LoadLocation(orElse(c.TimeZone, "UTC"))
	if err != nil {
		zone = time.UTC
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	same := reflect.DeepEqual(c.Update, r.settings) && c.Proxy == r.proxy && r.zone.String() == zone.String()
	if r.settings, r.proxy, r.zone = c.Update, c.Proxy, zone; r.restart != nil && !same && (r.updater == nil || !r.updater.Report().Trial) {
		r.restart()
	}
}

func (r *runner) sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (r *runner) healthy() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.health.Tunnel
}

func (r *runner) wanted() fleet.Directive {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.directive
}

// stopServices lets open connections end before the machine restarts.
func (r *runner) stopServices(ctx context.Context) {
	if err := r.systemctl(ctx, "stop", unitConnector); err != nil {
		r.log.Warn("the connector did not stop", "err", err)
	}
}

// askConnector asks the connector how it is.
func (r *runner) askConnector(ctx context.Context) {
	st, err := askStatus(ctx, r.Host.path(controlPath))
	if err != nil {
		r.log.Debug("the connector does not answer", "err", err)
	}
	r.connector = st
	h := Health{Tunnel: st != nil && !st.Up.IsZero(), Text: connectorText(st)}
	r.mu.Lock()
	defer r.mu.Unlock()
	h.Since = r.health.Since
	if h.Tunnel != r.health.Tunnel || h.Since.IsZero() {
		h.Since = r.Host.Now()
	}
	r.health = h
}

// exchange gives the fleet's report to the connector and takes the directive.
func (r *runner) exchange(ctx context.Context) {
	r.mu.Lock()
	u := r.updater
	r.mu.Unlock()
	if u == nil || r.connector == nil {
		r.reportAt = time.Time{} // as soon as there is something to tell
		return
	}
	report := u.Report()
	report.Camera = r.camera
	d, err := fleet.Exchange(ctx, r.Host.path(controlPath), report)
	if err != nil {
		r.log.Warn("the fleet's report was not taken", "err", err)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.directive = d
}

// startUnits starts what should run and does not: a start that failed, or a device that came later.
func (r *runner) startUnits(ctx context.Context) {
	var units []string
	if r.enrol.hasIdentity() {
		units = append(units, unitConnector)
	}
	if len(r.config.SSH.Keys) > 0 {
		units = append(units, unitSSH)
	}
	if r.device != "" {
		units = append(units, unitCamera)
	}
	if len(r.config.WiFi.Networks) > 0 && r.exists("/sys/class/net/"+r.wireless()) {
		units = append(units, unitWiFi(r.wireless()))
	}
	if len(units) == 0 {
		return
	}
	if err := r.systemctl(ctx, append([]string{"--no-block", "start"}, units...)...); err != nil {
		r.log.Error("services do not start", "op", strings.Join(units, " "), "err", err)
	}
}
