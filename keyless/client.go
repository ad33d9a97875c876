package keyless

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// ErrUnavailable says that no server can be reached. While all are known to be down it comes at once.
var ErrUnavailable = errors.New("keyless: no key server can be reached")

// ErrOverloaded says that every connection has as many requests in flight as it may have.
var ErrOverloaded = errors.New("keyless: too many requests in flight")

// ErrClosed says that the client was closed.
var ErrClosed = errors.New("keyless: client is closed")

// A ClientConfig says where the servers are and how to reach them. Servers, and TLS, must be set; each other zero value
// stands for the default named beside it.
type ClientConfig struct {
	// Servers are the addresses (host:port) of servers that hold the same keys. All are equal: a request goes to the
	// least loaded connection. [Client.SetServers] changes them.
	Servers []string
	// MayBeEmpty permits no Servers, where they are set later.
	MayBeEmpty bool
	// Dial opens a byte stream to one address. If nil, TCP.
	Dial func(ctx context.Context, addr string) (net.Conn, error)
	// TLS returns the configuration for one address; it must authenticate the server and present a certificate.
	TLS func(addr string) *tls.Config

	ConnsPerServer int           // 2
	MaxInFlight    int           // 512 requests of one connection; beyond it requests fail with ErrOverloaded
	Heartbeat      time.Duration // 15s between pings; must be below 30s, after which servers close
	DialTimeout    time.Duration // 3s for dialling, handshake and the first ping; also for each later ping
	Timeout        time.Duration // 2s for one request with all its attempts; a caller's earlier deadline wins

	Logger   *slog.Logger       // nil discards
	OnResult func(ClientResult) // may be nil; called from many goroutines, must not block
}

// A ClientResult is one finished Do, for metrics.
type ClientResult struct {
	Server   string // the last server tried; "" if none could be
	Opcode   Opcode
	Func     string
	Attempts int
	Duration time.Duration
	Err      error
}

// Stats is a snapshot of a client.
type Stats struct {
	Servers []ServerStats
}

// ServerStats is a snapshot of one server of a client.
type ServerStats struct {
	Addr     string
	Conns    int // usable connections
	InFlight int
	Dials    uint64 // connection attempts
	Failures uint64 // connection attempts that failed, and connections that broke
	LastErr  error  // of the latest failure
}

// A Client sends operations to a group of servers over pipelined connections that it keeps open. It is safe for
// concurrent use. Close it.
type Client struct {
	cfg    ClientConfig
	log    *slog.Logger
	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	links  sync.WaitGroup
	timers sync.Pool // stopped *time.Timers

	mu      sync.Mutex // guards the rest
	servers []*remote
	live    []*link // links with a usable connection
	trying  int     // links in a first attempt, so that waiting for them is worth it
	changed chan struct{}
	turn    int // where the next search in live begins
}

// A remote is one server of a client.
type remote struct {
	addr     string
	dials    atomic.Uint64
	failures atomic.Uint64
	ailing   atomic.Int64 // until when, in Unix nanoseconds, other servers are better
	last     atomic.Bool  // every other server is better

	ctx    context.Context // ends when the server is taken out, or with Close
	cancel context.CancelFunc

	mu      sync.Mutex // guards lastErr
	lastErr error
}

// A Drainer is a connection, as [ClientConfig.Dial] returns it, that knows when whatever carries it wants to end. The
// client then opens another connection, and closes this one when its requests have been answered.
type Drainer interface {
	// Draining is closed when the connection should be given up.
	Draining() <-chan struct{}
}

// A Suspecter is a connection, as [ClientConfig.Dial] returns it, that can tell that whatever carries it has most likely died:
// something is owed, and nothing is heard. The client asks every 100 ms; when the answer is yes it gives the connection up,
// sends what can be repeated over another, and connects again. A request without a reply for 300 ms has it ping over all its
// connections, so that something is owed over each. Suspect is called by one goroutine at a time.
type Suspecter interface{ Suspect() bool }

// NewClient checks cfg and starts connecting in the background; it does not wait for a connection.
func NewClient(cfg ClientConfig) (*Client, error) {
	switch {
	case len(cfg.Servers) == 0 && !cfg.MayBeEmpty:
		return nil, errors.New("keyless: client has no Servers")
	case cfg.TLS == nil:
		return nil, errors.New("keyless: client has no TLS configuration")
	case cfg.Heartbeat >= serverIdle:
		return nil, fmt.Errorf("keyless: Heartbeat of %v must be below %v, after which servers close", cfg.Heartbeat, serverIdle)
	}
	cfg.Servers = slices.Clone(cfg.Servers)
	cfg.ConnsPerServer = orDefault(cfg.ConnsPerServer, 2)
	cfg.MaxInFlight = orDefault(cfg.MaxInFlight, 512)
	cfg.Heartbeat = orDefault(cfg.Heartbeat, 15*time.Second)
	cfg.DialTimeout = orDefault(cfg.DialTimeout, 3*time.Second)
	cfg.Timeout = orDefault(cfg.Timeout, 2*time.Second)
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, addr string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", addr)
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	c := &Client{cfg: cfg, log: cfg.Logger, changed: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.SetServers(cfg.Servers, nil)
	return c, nil
}

// SetServers makes servers the ones in use, and those of them that are also in last the ones that are used only when no other
// is left. Connections to servers that stay are kept. A server that is new is connected to in the background; one that is
// taken out gets no more requests, and those in flight may end. After Close it does nothing.
func (c *Client) SetServers(servers, last []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return
	}
	var next []*remote
	for _, addr := range servers {
		i := slices.IndexFunc(c.servers, func(r *remote) bool { return r.addr == addr })
		switch {
		case slices.ContainsFunc(next, func(r *remote) bool { return r.addr == addr }):
			continue // twice
		case i >= 0:
			next = append(next, c.servers[i])
		default:
			next = append(next, c.addLocked(addr))
		}
		next[len(next)-1].last.Store(slices.Contains(last, addr))
	}
	for _, r := range c.servers {
		if !slices.Contains(next, r) {
			r.cancel()
			// From here on no request is given to it, though its links have not noticed yet.
			c.live = slices.DeleteFunc(slices.Clone(c.live), func(l *link) bool { return l.remote == r })
		}
	}
	c.servers = next
}

// addLocked starts the links to a server.
func (c *Client) addLocked(addr string) *remote {
	r := &remote{addr: addr}
	r.ctx, r.cancel = context.WithCancel(c.ctx)
	c.trying += c.cfg.ConnsPerServer
	for range c.cfg.ConnsPerServer {
		c.links.Go((&link{client: c, remote: r}).run)
	}
	return r
}

// alternatives is the number of servers.
func (c *Client) alternatives() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.servers)
}

// serverIdle is after how long existing servers close an idle connection.
const serverIdle = 30 * time.Second

// Close ends all connections; requests in flight fail with ErrClosed. It waits until nothing is left running, and may
// be called more than once.
func (c *Client) Close() error {
	c.mu.Lock()
	c.cancel() // SetServers starts nothing from here on
	c.mu.Unlock()
	c.links.Wait()
	return nil
}

// Bounds of one Do.
const (
	// maxAttempts is how often one operation is sent at most.
	maxAttempts = 3
	// ailingTime is for how long a server that answered with an internal error is used only if there is no other.
	ailingTime = time.Second
)

// Do sends op and returns the payload of the reply, which is the caller's. A refusal by the server is an *Error.
//
// An operation that never left is sent again over another connection. One that may have left is sent again only if
// doing it twice does no harm: pings, signatures (FuncTLSSign too) and decryptions; never other custom functions, nor
// sealing. Such an operation also moves on to another server when one answers CodeInternal or CodeKeyNotFound. Do fails with
// ErrUnavailable when no server can be reached, at once while all are known to be down; with ErrOverloaded when all
// connections are full; with context.DeadlineExceeded when ctx or ClientConfig.Timeout ends first.
//
// An OpenTelemetry span context in ctx, and a request id (see [WithRequestID]), are sent along, unless op carries others.
func (c *Client) Do(ctx context.Context, op *Operation) ([]byte, error) {
	return c.do(ctx, op, c.cfg.Timeout)
}

func (c *Client) do(ctx context.Context, op *Operation, timeout time.Duration) ([]byte, error) {
	start := time.Now()
	timer, ok := c.timers.Get().(*time.Timer)
	if ok {
		timer.Reset(timeout) // since Go 1.23 this leaves no old tick in the channel
	} else {
		timer = time.NewTimer(timeout)
	}
	defer func() {
		timer.Stop()
		c.timers.Put(timer)
	}()
	res := ClientResult{Opcode: op.Opcode, Func: funcLabel(op)}
	payload, err := c.attempts(ctx, timer.C, traced(ctx, op), &res)
	if c.cfg.OnResult != nil {
		res.Duration, res.Err = time.Since(start), err
		c.cfg.OnResult(res)
	}
	return payload, err
}

// attempts tries op on one connection after the other.
func (c *Client) attempts(ctx context.Context, timeout <-chan time.Time, op *Operation, res *ClientResult) ([]byte, error) {
	var avoid *remote
	without := 0 // answers that there is no such key
	for {
		l, s, err := c.acquire(ctx, timeout, avoid)
		if err != nil {
			return nil, c.describe(op, res, err)
		}
		res.Attempts++
		res.Server = l.remote.addr
		payload, err := s.roundTrip(ctx, timeout, op)
		if err == nil {
			return payload, nil
		}
		again := false
		switch {
		case errors.Is(err, errNotSent):
			again = true
		case errors.Is(err, errBroken):
			again = repeatable(op)
		case errors.Is(err, ErrInternal):
			l.remote.ailing.Store(time.Now().Add(ailingTime).UnixNano())
			again = repeatable(op) && c.alternatives() > 1
		case errors.Is(err, ErrKeyNotFound):
			// A server whose token is away does not know the token's keys.
			without++
			again = repeatable(op) && without < c.alternatives()
		}
		if !again || res.Attempts >= maxAttempts {
			return nil, c.describe(op, res, err)
		}
		avoid = l.remote
	}
}

// repeatable reports whether doing op twice does no harm.
func repeatable(op *Operation) bool {
	return op.Opcode == OpPing || op.Opcode.IsSign() || op.Opcode.IsDecrypt() ||
		op.Opcode == OpCustom && op.CustomFunc == FuncTLSSign
}

func (c *Client) describe(op *Operation, res *ClientResult, err error) error {
	if c.ctx.Err() != nil {
		err = ErrClosed
	}
	name := res.Func
	if name == "" {
		name = op.Opcode.String()
	}
	if res.Server == "" {
		return fmt.Errorf("keyless: %s: %w", name, err)
	}
	return fmt.Errorf("keyless: %s by %s: %w", name, res.Server, err)
}

// acquire picks a connection and reserves a place on it. Without a usable one it waits for those in their first
// attempt; if there are none of these either, it fails at once.
func (c *Client) acquire(ctx context.Context, timeout <-chan time.Time, avoid *remote) (*link, *session, error) {
	for {
		l, s, changed, err := c.pick(avoid)
		if err != nil || s != nil {
			return l, s, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("%w: %w", ErrUnavailable, context.Cause(ctx))
		case <-timeout:
			return nil, nil, fmt.Errorf("%w: %w", ErrUnavailable, context.DeadlineExceeded)
		case <-c.ctx.Done():
			return nil, nil, ErrClosed
		}
	}
}

// pick chooses the best of the live links: first by rank, then by requests in flight. If nothing is live but something
// may soon be, it returns the channel to wait on.
func (c *Client) pick(avoid *remote) (*link, *session, <-chan struct{}, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, nil, nil, ErrClosed
	}
	if len(c.live) == 0 {
		if c.trying == 0 {
			return nil, nil, nil, ErrUnavailable
		}
		return nil, nil, c.changed, nil
	}
	var best *link
	bestRank, bestLoad, full := 0, 0, false
	c.turn++
	for i := range c.live {
		l := c.live[(c.turn+i)%len(c.live)]
		if l.session.dead.Load() {
			continue // its goroutine is about to take it out and to connect again
		}
		load := int(l.session.inFlight.Load())
		if load >= c.cfg.MaxInFlight {
			full = true
			continue
		}
		rank := l.rank(avoid)
		if best == nil || rank < bestRank || rank == bestRank && load < bestLoad {
			best, bestRank, bestLoad = l, rank, load
		}
	}
	switch {
	case best == nil && full:
		return nil, nil, nil, ErrOverloaded
	case best == nil:
		return nil, nil, c.changed, nil
	}
	best.session.inFlight.Add(1)
	return best, best.session, nil, nil
}

// rank is 0 for a link that nothing speaks against.
func (l *link) rank(avoid *remote) int {
	rank := 0
	if l.remote == avoid {
		rank += 1
	}
	if until := l.remote.ailing.Load(); until != 0 && time.Now().UnixNano() < until {
		rank += 2
	}
	if l.session.suspect.Load() {
		rank += 4
	}
	if l.remote.last.Load() {
		rank += 8
	}
	return rank
}

// Healthy reports whether at least one server has a usable connection.
func (c *Client) Healthy() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.live) > 0
}

// Stats returns a snapshot, servers in the order of the configuration.
func (c *Client) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	st := Stats{Servers: make([]ServerStats, len(c.servers))}
	for i, r := range c.servers {
		r.mu.Lock()
		st.Servers[i] = ServerStats{Addr: r.addr, Dials: r.dials.Load(), Failures: r.failures.Load(), LastErr: r.lastErr}
		r.mu.Unlock()
	}
	for _, l := range c.live {
		i := slices.Index(c.servers, l.remote)
		st.Servers[i].Conns++
		st.Servers[i].InFlight += int(l.session.inFlight.Load())
	}
	return st
}

func (r *remote) failed(err error) {
	r.failures.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lastErr = err
}
