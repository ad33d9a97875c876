package control

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// configTimeout bounds one connector's answer to a configuration.
	configTimeout = 30 * time.Second
	// configRetry is about how long to wait after a configuration could not be delivered, at first and at most.
	configRetry, configRetryMax = time.Second, 30 * time.Second
	// configAgain is how often a configuration that was refused is offered again: its reason may have gone.
	configAgain = 5 * time.Minute
)

// processKey names one run of a connector's program.
type processKey struct{ tunnel, connector, instance string } // ids, but for the instance

// told is how far a process has been told its tunnel's configuration.
type told struct {
	ConnectorConfig
	at    time.Time // of the last refusal
	busy  bool      // somebody is telling it
	again bool      // who tells it has to look again: there was a round meanwhile
}

// A pusher tells processes their configurations.
type pusher struct {
	due chan struct{}

	mu    sync.Mutex                      // guards the fields below
	procs map[string]map[processKey]*told // by connector id
	fresh map[processKey]bool             // that got a session since the last round
	all   bool                            // the next round is about every process
}

func newPusher() pusher {
	return pusher{due: make(chan struct{}, 1), procs: map[string]map[processKey]*told{}, fresh: map[processKey]bool{}}
}

// mark asks for a round over all processes. It never blocks.
func (p *pusher) mark() {
	p.mu.Lock()
	p.all = true
	p.mu.Unlock()
	p.wake()
}

// markProcess asks for a round over one process. It never blocks.
func (p *pusher) markProcess(k processKey) {
	p.mu.Lock()
	p.fresh[k] = true
	p.mu.Unlock()
	p.wake()
}

func (p *pusher) wake() {
	select {
	case p.due <- struct{}{}:
	default:
	}
}

// view returns what is known of a connector that has a session here.
func (p *pusher) view(connectorID string) *ConnectorConfig {
	p.mu.Lock()
	defer p.mu.Unlock()
	var newest *ConnectorConfig
	for _, t := range p.procs[connectorID] {
		if newest == nil || t.Applied > newest.Applied {
			c := t.ConnectorConfig
			newest = &c
		}
	}
	return newest
}

// sessionUp is called when a main session was admitted.
func (c *Control) sessionUp(l *live) {
	c.configs.markProcess(l.processKey())
	c.polls.up(l.processKey())
}

func (l *live) processKey() processKey {
	return processKey{l.connector.Tunnel, l.connector.ID, l.s.Registration().Instance}
}

// runConfigs keeps every process with a session here at its tunnel's configuration, until ctx ends.
func (c *Control) runConfigs(ctx context.Context) {
	var pushes sync.WaitGroup
	defer pushes.Wait()
	tick := time.NewTicker(configAgain / 5)
	defer tick.Stop()
	for {
		for k := range c.configRound() {
			pushes.Go(func() { c.pushConfig(ctx, k) })
		}
		select {
		case <-ctx.Done():
			return
		case <-c.configs.due:
		case <-tick.C:
			c.configs.mark()
		}
	}
}

// configRound returns the processes that somebody must now tell something. A round over all forgets those without a
// session; one over those that have just come costs nothing for the others.
func (c *Control) configRound() map[processKey]bool {
	p := &c.configs
	p.mu.Lock()
	here, all := p.fresh, p.all
	p.fresh, p.all = map[processKey]bool{}, false
	p.mu.Unlock()
	if all {
		for _, l := range c.reg.all() {
			if l.role == tunnel.RoleMain {
				here[l.processKey()] = true
			}
		}
	}
	wanted := map[string]TunnelConfig{} // before mu, which comes after the model's; what changes meanwhile makes a round due
	for k := range here {
		if _, ok := wanted[k.tunnel]; !ok {
			wanted[k.tunnel] = c.wantedConfig(k.tunnel)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if all {
		p.forgetLocked(here)
	}
	for k := range here {
		t := p.procs[k.connector][k]
		if t == nil {
			t = &told{}
			if p.procs[k.connector] == nil {
				p.procs[k.connector] = map[processKey]*told{}
			}
			p.procs[k.connector][k] = t
		}
		if t.busy {
			t.again = true
		}
		if t.busy || t.settled(wanted[k.tunnel], time.Now()) {
			delete(here, k)
			continue
		}
		t.busy = true
	}
	return here
}

// forgetLocked drops processes that are not here, unless somebody is telling them something.
func (p *pusher) forgetLocked(here map[processKey]bool) {
	for id, procs := range p.procs {
		for k, t := range procs {
			if !here[k] && !t.busy {
				delete(procs, k)
			}
		}
		if len(procs) == 0 {
			delete(p.procs, id)
		}
	}
}

func (c *Control) wantedConfig(tunnelID string) TunnelConfig {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return c.model.configLocked(tunnelID)
}

// settled reports whether there is nothing to tell now.
func (t *told) settled(want TunnelConfig, now time.Time) bool {
	return want.Version == 0 || t.Applied == want.Version || t.Refused == want.Version && now.Sub(t.at) < configAgain
}

// over reports whether who tells the process may leave it, and notes that. What is settled by what was wanted before the
// last round is not.
func (t *told) over(settled, gone bool) bool {
	t.busy = !gone && (!settled || t.again)
	t.again = false
	return !t.busy
}

// pushConfig tells a process its configuration, and again what it has become meanwhile.
func (c *Control) pushConfig(ctx context.Context, k processKey) {
	wait := configRetry
	for try := 0; ; try++ {
		want, s := c.wantedConfig(k.tunnel), c.sessionOf(k, try)
		c.configs.mu.Lock()
		t := c.configs.procs[k.connector][k]
		settled := t.settled(want, time.Now())
		over := t.over(settled, s == nil || ctx.Err() != nil)
		c.configs.mu.Unlock()
		if over {
			return
		}
		if settled {
			continue
		}
		limited, cancel := context.WithTimeout(ctx, configTimeout)
		err := s.Configure(limited, want.Version, want.Body)
		cancel()
		if c.tookConfig(t, want.Version, s, err) {
			wait = configRetry
			continue
		}
		sleep(ctx, wait/2+rand.N(wait))
		wait = min(2*wait, configRetryMax)
	}
}

// tookConfig notes a process's answer, and reports whether it was one.
func (c *Control) tookConfig(t *told, version uint64, s *tunnel.Session, err error) bool {
	text := ""
	refused, isRefusal := errors.AsType[*tunnel.ConfigError](err)
	switch {
	case err == nil:
	case isRefusal:
		text = refused.Text
	case errors.Is(err, tunnel.ErrUnsupported):
		text = "the connector takes no configuration from edges; it runs an older program, or was told so"
	default:
		c.log.Debug("configuration not delivered, will try again", "peer", s.Peer().String(), "version", version, "err", err)
		return false
	}
	c.configs.mu.Lock()
	defer c.configs.mu.Unlock()
	if text == "" {
		t.ConnectorConfig = ConnectorConfig{Applied: version}
		c.log.Info("configuration applied by a connector", "peer", s.Peer().String(), "version", version)
		return true
	}
	if t.Refused != version || t.Error != text {
		c.log.Warn("configuration refused by a connector", "peer", s.Peer().String(), "version", version, "err", text)
	}
	t.Refused, t.Error, t.at = version, text, time.Now()
	return true
}

// sessionOf returns a main session of the process, another one at each try, and rather one that does not drain.
func (c *Control) sessionOf(k processKey, try int) *tunnel.Session {
	var have, draining []*tunnel.Session
	for _, l := range c.reg.of(k.tunnel) {
		reg := l.s.Registration()
		switch {
		case l.connector.ID != k.connector || reg.Instance != k.instance || reg.Role != tunnel.RoleMain:
		case l.s.Draining():
			draining = append(draining, l.s)
		default:
			have = append(have, l.s)
		}
	}
	if len(have) == 0 {
		have = draining
	}
	if len(have) == 0 {
		return nil
	}
	return have[try%len(have)]
}
