package control

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

// Keys of what edges tell one another. They change without anybody's decision, and so without the generation.
const (
	prefixEdge    = "edges/"   // + name
	prefixPresent = "present/" // + tunnel id + "/" + edge name
)

const (
	// defaultBeat is how often an edge says that it lives; the others believe it for beatsMissed times as long.
	defaultBeat = 2 * time.Second
	beatsMissed = 4
	// forgetAfter is how long connectors are still told the addresses of an edge that is gone, which most often is being
	// restarted.
	forgetAfter = time.Minute
	// presencePause collects changes for one transaction, and presenceRate is how many bytes a second they may make, about.
	presencePause = 50 * time.Millisecond
	presenceRate  = 1 << 20
	// maxPresence bounds the processes in one record, which must fit into a value of the store. More are not told of.
	maxPresence = 4096
	// presenceBatch is the size of a transaction from which on the rest goes into the next one: etcd takes 1.5 MiB.
	presenceBatch = 256 << 10
)

// Volatile returns the prefixes of the store's keys that change all the time, and are not worth keeping.
func Volatile() []string { return []string{prefixEdge, prefixPresent, prefixSeen, prefixDevice} }

// An edgeRecord is what an edge says of itself.
type edgeRecord struct {
	Instance  string    `json:"instance"` // random, of the process
	Advertise []string  `json:"advertise"`
	Listen    string    `json:"listen,omitempty"`
	Version   string    `json:"version,omitempty"`
	Started   time.Time `json:"started"`
	Beat      uint64    `json:"beat"`
}

// A presence is what an edge has of a tunnel's sessions.
type presence struct {
	Since     time.Time        `json:"since"` // since when the installation has had a session, as far as the edge knows
	Processes []presentProcess `json:"processes"`
}

// A presentProcess is a connector's process with its main sessions to one edge.
type presentProcess struct {
	Connector string `json:"connector"`
	Instance  string `json:"instance"`
	Sessions  int    `json:"sessions"`           // that take flows
	Draining  int    `json:"draining,omitempty"` // that do not
	Want      int    `json:"want"`               // sessions that it announced for this edge
	Complete  bool   `json:"complete"`           // it has them
}

// peers is what this edge knows of the others, and tells them. Without a name it is alone and tells nothing.
type peers struct {
	name     string
	instance string
	identity *mtls.Source
	own      edgeRecord
	log      *slog.Logger
	c        *Control
	every    time.Duration // between beats

	wake chan struct{} // holds a value while dirty is not empty
	mute atomic.Bool   // others could not be told, and that was logged
	tell sync.Mutex    // held while the own record is written, so that nothing comes after the farewell

	running  context.Context // sessions with other edges end with it
	stop     context.CancelFunc
	tasks    sync.WaitGroup
	spawning sync.Mutex // guards stopped; nothing is locked under it
	stopped  bool

	mu      sync.RWMutex // guards the fields below
	leaving bool
	clock   time.Duration // runs only while the store delivers: what counts the silence of others
	beatAt  time.Time     // when the own beat was seen last
	double  double        // another process with the name of this edge
	edges   map[string]*knownEdge
	present map[string]map[string]presence // by tunnel id and edge name
	dirty   set                            // tunnels whose presence here is to be written
	told    []string                       // addresses that connectors were told last
	removed map[string]removedEdge         // by name
	leashes map[string]*leash              // by name, of edges that have forwarded something
}

// A knownEdge is an edge of the store, this one included.
type knownEdge struct {
	peerEdge
	rec    edgeRecord
	seen   time.Duration // by the clock, when its beat last changed
	alive  bool
	goneAt time.Time // if not alive
}

func newPeers(c *Control) *peers {
	p := &peers{name: c.cfg.Name, instance: rand.Text(), identity: c.cfg.Identity, log: c.log, c: c, every: c.cfg.beat, wake: make(chan struct{}, 1),
		edges: map[string]*knownEdge{}, present: map[string]map[string]presence{}, dirty: set{}, leashes: map[string]*leash{}}
	p.own = edgeRecord{Instance: p.instance, Advertise: c.cfg.Edges, Listen: c.cfg.Listen, Version: c.cfg.Version, Started: c.now()}
	p.running, p.stop = context.WithCancel(context.Background())
	return p
}

func (p *peers) alone() bool { return p.name == "" }

// spawn runs f unless the edge is stopping.
func (p *peers) spawn(f func(context.Context)) bool {
	p.spawning.Lock()
	defer p.spawning.Unlock()
	if p.stopped {
		return false
	}
	p.tasks.Go(func() { f(p.running) })
	return true
}

// close ends the sessions with other edges and waits for them.
func (p *peers) close() {
	p.spawning.Lock()
	p.stopped = true
	p.spawning.Unlock()
	p.stop()
	p.tasks.Wait()
}

// reset takes over a whole listing of the store.
func (p *peers) reset(entries []state.Entry) {
	if p.alone() {
		return
	}
	p.mu.Lock()
	had := p.edges
	p.edges, p.present = map[string]*knownEdge{}, map[string]map[string]presence{}
	var bad []error
	for _, e := range entries {
		if name, ok := strings.CutPrefix(e.Key, prefixEdge); ok && had[name] != nil {
			p.edges[name] = had[name] // keeps its sessions
		}
		bad = append(bad, p.applyLocked(delta{key: e.Key, value: e.Value}))
	}
	for id, by := range p.present {
		if _, ok := by[p.name]; ok { // of an earlier life, perhaps
			p.markLocked(id)
		}
	}
	p.mu.Unlock()
	p.c.complain(slices.DeleteFunc(bad, func(err error) bool { return err == nil }))
	p.judge()
}

// apply takes one change.
func (p *peers) apply(d delta) {
	if p.alone() {
		return
	}
	p.mu.Lock()
	err := p.applyLocked(d)
	p.mu.Unlock()
	if err != nil {
		p.c.complain([]error{err})
	}
	if rest, ok := strings.CutPrefix(d.key, prefixPresent); ok {
		id, _, _ := strings.Cut(rest, "/")
		p.c.status.mark(id) // without mu, which who settles the statuses takes
	}
	if strings.HasPrefix(d.key, prefixEdge) {
		p.judge()
	}
}

func (p *peers) applyLocked(d delta) error {
	if name, ok := strings.CutPrefix(d.key, prefixEdge); ok {
		return p.applyEdgeLocked(name, d)
	}
	rest, ok := strings.CutPrefix(d.key, prefixPresent)
	if !ok {
		return nil
	}
	id, edge, _ := strings.Cut(rest, "/")
	before := p.present[id][edge].draining()
	delete(p.present[id], edge)
	if len(p.present[id]) == 0 {
		delete(p.present, id)
	}
	if d.value == nil {
		return nil
	}
	v, err := decode[presence](d)
	if err != nil {
		return err
	}
	if p.present[id] == nil {
		p.present[id] = map[string]presence{}
	}
	p.present[id][edge] = v
	if e := p.edges[edge]; e != nil && v.draining() > before {
		// Which of the flows over that edge it is about is not known here. One that asks to leave in vain is opened anew.
		p.c.flows.expelWhere(func(r *record) bool {
			k := r.via.Load()
			return k != nil && k.e == &e.peerEdge && r.plan.tunnel == id
		})
	}
	return nil
}

// draining is how many sessions take no flows any more.
func (v presence) draining() (n int) {
	for _, p := range v.Processes {
		n += p.Draining
	}
	return n
}

func (p *peers) applyEdgeLocked(name string, d delta) error {
	e := p.edges[name]
	if d.value == nil {
		if e != nil {
			e.seen = -beatsMissed*p.every - 1 // it said good-bye; its address is kept for a while
		}
		return nil
	}
	rec, err := decode[edgeRecord](d)
	if err != nil {
		return err
	}
	if e == nil {
		e = &knownEdge{peerEdge: peerEdge{name: name, peers: p}, seen: p.clock}
		p.edges[name] = e
	}
	if rec.Beat != e.rec.Beat || rec.Instance != e.rec.Instance {
		e.seen = p.clock
	}
	e.rec = rec
	e.setAddrs(rec.Advertise, rec.Instance)
	if name == p.name {
		p.tickLocked(rec)
		e.seen = p.clock
	}
	return nil
}

// setAddrs notes where the edge is; an edge that was started anew is tried at once.
func (e *peerEdge) setAddrs(addrs []string, instance string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.instance != instance {
		e.instance, e.failures, e.restedAt = instance, 0, time.Time{}
	}
	e.addrs = addrs
}

// tickLocked lets the clock run on: the store has delivered this edge's own beat. While it delivers nothing, nobody is
// taken for gone.
func (p *peers) tickLocked(rec edgeRecord) {
	now := time.Now()
	if rec.Instance != p.instance {
		if p.double.seen(rec, now) && !p.leaving {
			p.log.Error(doubleProblem, "edge", p.name, "listen", rec.Listen)
		}
		return
	}
	if !p.beatAt.IsZero() {
		p.clock += min(now.Sub(p.beatAt), p.every+p.every/2)
	}
	p.beatAt = now
}

// judge looks who is gone and who has come, and tells the connectors.
func (p *peers) judge() {
	p.mu.Lock()
	now := time.Now()
	var moved set
	for name, e := range p.edges {
		_, removed := p.removed[name]
		alive := !removed && (name == p.name || p.clock-e.seen <= beatsMissed*p.every)
		if alive == e.alive {
			if !alive && now.Sub(e.goneAt) > forgetAfter && e.seen < 0 {
				delete(p.edges, name)
			}
			continue
		}
		e.alive, e.goneAt = alive, now
		p.log.Info("edge "+map[bool]string{true: "up", false: "gone"}[alive], "edge", name)
		for id, by := range p.present {
			if _, ok := by[name]; ok {
				if moved == nil {
					moved = set{}
				}
				moved[id] = struct{}{}
			}
		}
	}
	addrs := p.addrsLocked(now)
	tell := p.told != nil && !slices.Equal(addrs, p.told)
	p.told = addrs
	p.mu.Unlock()
	for id := range moved {
		p.c.status.mark(id)
	}
	if tell {
		p.c.status.markAll()
		for _, l := range p.c.reg.all() {
			l.tell()
		}
	}
}

// addrsLocked are the addresses of all edges: this one's first, then the others' by name.
func (p *peers) addrsLocked(now time.Time) []string {
	var addrs []string
	if _, removed := p.removed[p.name]; !removed {
		addrs = slices.Clone(p.own.Advertise)
	}
	names := make([]string, 0, len(p.edges))
	for name, e := range p.edges {
		if _, removed := p.removed[name]; name != p.name && !removed && (e.alive || now.Sub(e.goneAt) < forgetAfter) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		for _, a := range p.edges[name].rec.Advertise {
			if !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	return addrs
}

// addrs are the addresses that connectors dial, of all edges.
func (c *Control) addrs() []string {
	if c.peers.alone() {
		return c.cfg.Edges
	}
	c.peers.mu.RLock()
	defer c.peers.mu.RUnlock()
	return c.peers.addrsLocked(time.Now())
}

// maxJoinAddrs is how many addresses a join token holds.
const maxJoinAddrs = 8

// joinAddrs are those of addrs that a join token and the answer to it hold.
func (c *Control) joinAddrs() []string {
	addrs := c.addrs()
	return addrs[:min(len(addrs), maxJoinAddrs)]
}

// mark notes that the presence of a tunnel here has changed.
func (p *peers) mark(tunnelID string) {
	if p.alone() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.markLocked(tunnelID)
}

func (p *peers) markLocked(tunnelID string) {
	p.dirty[tunnelID] = struct{}{}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// run tells the others of this edge until ctx ends.
func (p *peers) run(ctx context.Context) {
	beat := time.NewTicker(p.every)
	defer beat.Stop()
	for first := true; ; first = false {
		if first {
			p.beat(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case now := <-beat.C:
			p.c.tendBulk(now)
			if !p.alone() {
				p.beat(ctx)
				p.flush(ctx)
				p.bury(ctx)
			}
		case <-p.wake:
			sleep(ctx, presencePause)
			written := p.flush(ctx)
			sleep(ctx, min(time.Duration(written)*time.Second/presenceRate, p.every/2))
		}
	}
}

// beat says that this edge lives.
func (p *peers) beat(ctx context.Context) {
	p.tell.Lock()
	defer p.tell.Unlock()
	p.mu.Lock()
	p.own.Beat++
	_, removed := p.removed[p.name]
	rec, leaving := p.own, p.leaving || removed
	p.mu.Unlock()
	if leaving || p.alone() {
		return
	}
	_, err := p.c.cfg.Store.Txn(ctx, nil, []state.Op{put(prefixEdge+p.name, rec)})
	p.notTold(ctx, err)
}

// notTold logs that others could not be told something, once until they can be again.
func (p *peers) notTold(ctx context.Context, err error) {
	if err != nil && ctx.Err() != nil {
		return
	}
	if muted := p.mute.Swap(err != nil); err != nil && !muted {
		p.log.Warn("the other edges are not told of this one", "err", err)
	}
}

// buryAfter is how long an edge is gone before its records are deleted.
const buryAfter = time.Hour

// bury deletes what edges left in the store that are gone for long.
func (p *peers) bury(ctx context.Context) {
	var ops []state.Op
	p.mu.RLock()
	for id, by := range p.present { // of edges that took leave, or were removed, and could not clean up
		for name := range by {
			if p.edges[name] == nil {
				ops = append(ops, state.Delete(prefixPresent+id+"/"+name))
			}
		}
	}
	for name, e := range p.edges {
		if e.alive || e.seen < 0 || time.Since(e.goneAt) < buryAfter {
			continue
		}
		for id, by := range p.present {
			if _, ok := by[name]; ok {
				ops = append(ops, state.Delete(prefixPresent+id+"/"+name))
			}
		}
		ops = append(ops, state.Delete(prefixEdge+name)) // last: what does not fit is found again
	}
	p.mu.RUnlock()
	if len(ops) > 0 {
		_, err := p.c.cfg.Store.Txn(ctx, nil, ops[:min(len(ops), maxOps)])
		p.notTold(ctx, err)
	}
}

// flush writes the presence of the tunnels that changed, and returns how many bytes that took; what cannot be written stays
// for the next time.
func (p *peers) flush(ctx context.Context) (written int) {
	for {
		p.mu.Lock()
		ids := make([]string, 0, min(len(p.dirty), maxOps))
		for id := range p.dirty {
			if len(ids) == maxOps {
				break
			}
			ids = append(ids, id)
			delete(p.dirty, id)
		}
		_, removed := p.removed[p.name]
		silent := p.leaving || removed
		p.mu.Unlock()
		if len(ids) == 0 {
			return written
		}
		ops, size := p.presenceOps(ids, silent, p.c.here)
		p.again(ids[len(ops):])
		if _, err := p.c.cfg.Store.Txn(ctx, nil, ops); err != nil {
			p.again(ids[:len(ops)])
			p.notTold(ctx, err)
			return written
		}
		written += size
	}
}

// presenceOps says what this edge has of the tunnels, as of tells, or of as many as go into one transaction.
func (p *peers) presenceOps(ids []string, silent bool, of func(tunnelID string) presence) (ops []state.Op, size int) {
	for _, id := range ids {
		if size >= presenceBatch {
			break
		}
		key := prefixPresent + id + "/" + p.name
		op := state.Delete(key)
		if v := of(id); len(v.Processes) > 0 && !silent {
			v.Processes = v.Processes[:min(len(v.Processes), maxPresence)]
			op = put(key, v)
		}
		ops = append(ops, op)
		size += len(op.Key) + len(op.Value)
	}
	return ops, size
}

// again keeps tunnels for the next transaction.
func (p *peers) again(ids []string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, id := range ids {
		p.dirty[id] = struct{}{}
	}
}

// Leave takes this edge out of the others' sight, before it drains: they forward nothing more to it, and connectors are
// told to look elsewhere. It is for an edge that is about to stop.
func (c *Control) Leave(ctx context.Context) error {
	p := c.peers
	if p.alone() {
		return nil
	}
	p.mu.Lock()
	p.leaving = true
	for id, by := range p.present {
		if _, ok := by[p.name]; ok {
			p.dirty[id] = struct{}{}
		}
	}
	p.mu.Unlock()
	p.tell.Lock()
	defer p.tell.Unlock()
	if _, err := c.cfg.Store.Txn(ctx, nil, []state.Op{state.Delete(prefixEdge + p.name)}); err != nil {
		return fmt.Errorf("control: take leave of the other edges: %w", err)
	}
	p.flush(ctx)
	return nil
}

// here is the presence of a tunnel on this edge.
func (c *Control) here(tunnelID string) presence {
	since, ls := c.reg.up(tunnelID)
	return presence{Since: since, Processes: processesOf(ls)}
}
