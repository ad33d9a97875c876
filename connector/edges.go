package connector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/tunnel"
)

const (
	// maxDialled is how many edges are dialled at a time.
	maxDialled = 8
	// maxEdges is how many edges may be configured, and how many of those that an edge tells are kept.
	maxEdges = 64
	// maxSlots bounds the endpoints that there are at a time, those that are being left included.
	maxSlots = 2 * maxDialled
	// maxEdgesFile bounds the file of edges, in bytes.
	maxEdgesFile = 64 << 10

	// forgetEdge is how long an edge is still dialled when no edge tells of it any more: one that is restarted comes back
	// before.
	forgetEdge = 30 * time.Second
	// seedDelay is how long the edges that were told have for a first session before the configured ones are dialled too.
	seedDelay = 3 * time.Second
	// arrangeEvery is how often the sessions are brought in accord with the edges when nothing seems to happen.
	arrangeEvery = 2 * time.Second
)

// perEdge is how many sessions are kept to each of n edges: four in all, over two edges where there are two.
func perEdge(n int) int {
	switch {
	case n <= 1:
		return 4
	case n <= 3:
		return 2
	}
	return 1
}

// ParseEdge reads an edge's address: a host name or an IP address, with or without a port.
func ParseEdge(s string) (host string, port uint16, err error) {
	if a, err := netip.ParseAddr(s); err == nil { // an IPv6 address without a port has colons of its own
		return a.String(), tunnel.DefaultPort, nil
	}
	host, text, err := net.SplitHostPort(s)
	if addrErr, ok := errors.AsType[*net.AddrError](err); ok && addrErr.Err == "missing port in address" {
		host, text, err = s, strconv.Itoa(tunnel.DefaultPort), nil
	}
	if err != nil || host == "" {
		return "", 0, fmt.Errorf("edge %q: write host:port, such as edge.example.com:%d", s, tunnel.DefaultPort)
	}
	n, err := strconv.ParseUint(text, 10, 16)
	if err != nil || n == 0 {
		return "", 0, fmt.Errorf("edge %q: the port must be a number from 1 to 65535", s)
	}
	return host, uint16(n), nil
}

// edgeKey returns the one form of an edge's address by which two of them are compared.
func edgeKey(s string) (string, error) {
	host, port, err := ParseEdge(s)
	return net.JoinHostPort(host, strconv.Itoa(int(port))), err
}

// An endpoint is one edge address that is dialled, with the sessions to it. Its fields but mu's are written by arrange
// alone, under Connector.mu.
type endpoint struct {
	c    *Connector
	name string // as configured, or as told
	key  string
	host string
	port uint16
	slot int // numbers the sessions' indexes

	per    int // how many main sessions are kept
	lines  []*line
	ending int                  // lines that are being left
	turn   [SessionsPerEdge]int // which of its two indexes each line uses
	bulk   bulkSet

	mu     sync.Mutex           // guards the fields below
	addrs  []string             // of the last resolution that succeeded, as host:port
	failed map[string]time.Time // when addresses failed last
	narrow bool                 // the path loses large segments of TCP
}

// connected reports whether a session is up.
func (e *endpoint) connected() bool {
	return slices.ContainsFunc(e.lines, func(l *line) bool { return l.state() == StateConnected })
}

// edgeSet is what is known of the installation's edges.
type edgeSet struct {
	seeds []string // configured, as written

	mu      sync.Mutex          // guards the field below
	told    map[string][]string // keys, by the key of the endpoint whose edge told them
	changed chan struct{}       // holds a value when sessions may have to be arranged anew

	// The rest belongs to arrange.
	known   []string             // keys, those told in the past and not forgotten
	missing map[string]time.Time // when known keys were told last
	dark    time.Time            // since when no session has been up; zero: one is
	seeding bool                 // the seeds are dialled beside the known
}

func (s *edgeSet) kick() { signal(s.changed) }

// tell takes what an edge says of all edges.
func (s *edgeSet) tell(from string, addrs []string) {
	var keys []string
	for _, a := range addrs {
		if key, err := edgeKey(a); err == nil && !slices.Contains(keys, key) && len(keys) < maxEdges {
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return // an installation has at least the edge that speaks
	}
	s.mu.Lock()
	s.told[from] = keys
	s.mu.Unlock()
	s.kick()
}

// learn brings known in accord with what the connected edges tell, and reports whether it changed.
func (s *edgeSet) learn(connected func(key string) bool, now time.Time) bool {
	s.mu.Lock()
	union := map[string]bool{}
	for from, keys := range s.told {
		if connected(from) {
			for _, k := range keys {
				union[k] = true
			}
		}
	}
	s.mu.Unlock()
	if len(union) == 0 {
		return false
	}
	changed := false
	s.known = slices.DeleteFunc(s.known, func(k string) bool {
		if union[k] {
			delete(s.missing, k)
			return false
		}
		since, ok := s.missing[k]
		if !ok {
			since = now
			s.missing[k] = now
		}
		if now.Sub(since) < forgetEdge {
			return false
		}
		delete(s.missing, k)
		changed = true
		return true
	})
	for k := range union {
		if !slices.Contains(s.known, k) && len(s.known) < maxEdges {
			s.known = append(s.known, k)
			changed = true
		}
	}
	slices.Sort(s.known)
	return changed
}

// wanted returns the addresses to dial: those that edges told, or the seeds while there are none or none of them answers.
// Where there are more than maxDialled, each connector has a choice of its own, which it keeps.
func (s *edgeSet) wanted(instance string) []string {
	names := slices.Clone(s.known)
	seedKeys := map[string]string{}
	for _, seed := range s.seeds {
		key, err := edgeKey(seed)
		if err != nil {
			continue // New has looked
		}
		seedKeys[key] = seed
		if i := slices.Index(names, key); i >= 0 {
			names[i] = seed
		} else if len(s.known) == 0 || s.seeding {
			names = append(names, seed)
		}
	}
	if len(names) > maxDialled {
		rank := func(name string) uint64 {
			h := fnv.New64a()
			io.WriteString(h, instance+" "+name) //nolint:errcheck // it never fails
			return h.Sum64()
		}
		slices.SortFunc(names, func(a, b string) int {
			if rank(a) < rank(b) {
				return -1
			}
			return 1
		})
		names = names[:maxDialled]
	}
	return names
}

// keepEdges keeps the sessions until ctx ends, and returns when nothing dials any more.
func (c *Connector) keepEdges(ctx, lives context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	tick := time.NewTicker(arrangeEvery)
	defer tick.Stop()
	for {
		c.arrange(ctx, lives, &wg)
		c.beat.Store(int64(time.Since(began)))
		select {
		case <-ctx.Done():
			c.beat.Store(0) // it ends, which is no fault
			return
		case <-c.edges.changed:
		case <-tick.C:
		}
	}
}

// arrange starts and leaves sessions so that they are spread over the edges that there are. A session is left only when
// others are up.
func (c *Connector) arrange(ctx, lives context.Context, wg *sync.WaitGroup) {
	now := time.Now()
	up := map[string]bool{}
	for _, e := range c.endpoints {
		up[e.key] = e.connected()
	}
	if c.edges.learn(func(key string) bool { return up[key] }, now) {
		c.saveEdges()
		c.log.Info("edges of the installation", "edges", c.edges.known)
	}
	c.seed(up, now)
	names := c.edges.wanted(c.cfg.Identity.Identity().String())
	c.mu.Lock()
	defer c.mu.Unlock()
	want := map[string]bool{}
	per := perEdge(len(names))
	for _, name := range names {
		e := c.endpointLocked(name)
		if e == nil {
			continue // all slots are taken by endpoints that are being left
		}
		want[e.key] = true
		e.per = per
		for i := len(e.lines); i < per && e.ending == 0; i++ { // those that are being left may still use their indexes
			e.lines = append(e.lines, c.startLineLocked(ctx, lives, wg, e, i))
		}
	}
	for _, e := range slices.Clone(c.endpoints) {
		keep := 0
		if want[e.key] {
			keep = e.per
		}
		if len(e.lines) > keep && c.othersUpLocked(e, want) {
			for _, l := range e.lines[keep:] {
				e.ending++
				l.leave()
			}
			e.lines = e.lines[:keep]
		}
		if !want[e.key] && len(e.lines) == 0 && e.ending == 0 {
			e.bulk.set(0)
			c.metrics.forget(e.name)
			c.endpoints = slices.DeleteFunc(c.endpoints, func(o *endpoint) bool { return o == e })
		}
		if len(e.lines) == e.per {
			for _, l := range e.lines {
				l.reannounce(e.per)
			}
		}
		e.bulk.start(ctx, lives, wg)
	}
}

// seed decides whether the configured edges are dialled beside those that edges told.
func (c *Connector) seed(up map[string]bool, now time.Time) {
	s := &c.edges
	anyUp, knownUp := false, false
	for key, is := range up {
		anyUp = anyUp || is
		knownUp = knownUp || is && slices.Contains(s.known, key)
	}
	switch {
	case knownUp:
		s.seeding = false
	case !anyUp && !s.dark.IsZero() && now.Sub(s.dark) >= seedDelay:
		s.seeding = true
	}
	switch {
	case anyUp:
		s.dark = time.Time{}
	case s.dark.IsZero():
		s.dark = now
	}
}

// othersUpLocked reports whether lines of e can be left: another edge that is wanted has a session, all of them if e is
// wanted itself and would only become smaller.
func (c *Connector) othersUpLocked(e *endpoint, want map[string]bool) bool {
	up, n := 0, 0
	for _, o := range c.endpoints {
		if o == e || !want[o.key] {
			continue
		}
		n++
		if o.connected() {
			up++
		}
	}
	if want[e.key] {
		return up == n
	}
	return up > 0
}

// endpointLocked returns the endpoint of an address, made anew if need be, or nil if there is no room for it yet.
func (c *Connector) endpointLocked(name string) *endpoint {
	host, port, err := ParseEdge(name)
	if err != nil {
		return nil
	}
	key := net.JoinHostPort(host, strconv.Itoa(int(port)))
	taken := map[int]bool{}
	for _, e := range c.endpoints {
		if e.key == key {
			return e
		}
		taken[e.slot] = true
	}
	for slot := range maxSlots {
		if !taken[slot] {
			e := &endpoint{c: c, name: name, key: key, host: host, port: port, slot: slot, failed: map[string]time.Time{}}
			e.bulk.e = e
			c.metrics.remember(name)
			c.endpoints = append(c.endpoints, e)
			return e
		}
	}
	return nil
}

func (c *Connector) startLineLocked(ctx, lives context.Context, wg *sync.WaitGroup, e *endpoint, i int) *line {
	ctx, cancel := context.WithCancel(ctx)
	l := &line{c: c, e: e, i: i, leave: cancel, wake: make(chan struct{}, 1), announce: make(chan struct{}, 1), turn: e.turn[i], per: e.per, path: path{first: c.quicFirst}}
	wg.Go(func() {
		defer cancel()
		l.keep(ctx, lives)
		c.mu.Lock()
		defer c.mu.Unlock()
		e.turn[i] = 1 - l.turn // the sessions that drain keep their index
		if !slices.Contains(e.lines, l) {
			e.ending--
			c.edges.kick()
		}
	})
	return l
}

// edgesFile is what Config.EdgesFile holds.
type edgesFile struct {
	Edges []string `json:"edges"`
}

// loadEdges reads the edges that edges told before this start. What cannot be read is told and forgotten.
func (c *Connector) loadEdges() {
	path := c.cfg.EdgesFile
	if path == "" {
		return
	}
	keys, err := readEdges(path)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.log.Warn("remembered edges cannot be read, the configured ones are used", "err", err)
		}
		return
	}
	c.edges.known = keys
}

func readEdges(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxEdgesFile+1))
	if err != nil {
		return nil, err
	}
	keys, err := parseEdges(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return keys, nil
}

// parseEdges reads the content of an edges file.
func parseEdges(b []byte) ([]string, error) {
	if len(b) > maxEdgesFile {
		return nil, fmt.Errorf("longer than %d bytes", maxEdgesFile)
	}
	var f edgesFile
	if err := json.Unmarshal(b, &f); err != nil {
		return nil, err
	}
	var keys []string
	for _, e := range f.Edges {
		key, err := edgeKey(e)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(keys, key) && len(keys) < maxEdges {
			keys = append(keys, key)
		}
	}
	slices.Sort(keys)
	return keys, nil
}

// saveEdges writes the known edges for the next start.
func (c *Connector) saveEdges() {
	path := c.cfg.EdgesFile
	if path == "" {
		return
	}
	b, err := json.MarshalIndent(edgesFile{c.edges.known}, "", "  ")
	if err == nil {
		err = replaceFile(path, append(b, '\n'))
	}
	if err != nil {
		c.log.Warn("edges cannot be remembered for the next start", "err", err)
	}
}

// replaceFile writes a file of mode 0600 as a whole or not at all.
func replaceFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".edges-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
