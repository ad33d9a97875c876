package reliability

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
)

// Loss is how many requests a failure may cost.
type Loss int

const (
	None     Loss = iota // no request
	InFlight             // those that were in flight when it happened
	Outage               // those that were sent before the key server recovered
)

// A Row is one failure.
type Row struct {
	Name    string // unique, for the command line
	Failure string // what happens, for people
	Homes   int    // tokens that hold the key; the failure is that of the first
	Workers int    // of each token; 2 in Rows if not set
	Scheme  tls.SignatureScheme
	Token   string             // further lines of the configuration of the first token
	Second  string             // the same for the second
	Config  string             // further lines of the configuration
	Before  func(*Trial) error // what is so before the server starts
	Fault   func(*Trial) error // inflicts the failure, and returns when it is over
	Loss    Loss
	Says    string             // regular expression that the log has a line for, while the failure lasts or after it
	Metric  string             // of the first token, with a label perhaps ("name reason=\"x\""), that is above 0 in the end
	Also    func(*Trial) error // what else must be so in the end
	Absent  Absence            // whether the first token has no workers
}

// Absence says when the first token has no workers.
type Absence int

const (
	Never     Absence = iota
	AtFirst           // until the failure is over
	AllTheWay         // up to the end
)

// A Trial is a row that runs.
type Trial struct {
	Row
	ctx    context.Context
	dir    string
	bench  *Bench
	Homes  []*Home
	server *server
	Load   *Load

	inflicted, healed time.Time
	calm              int // samples that had ended when all was well before the failure
	recovered         int // samples that had ended when all was well again
}

// Run does a row. The error says why nothing could be measured; whether the result is right is [Result.Check]'s to say.
func (b *Bench) Run(ctx context.Context, row Row) (*Result, error) {
	t := &Trial{Row: row, ctx: ctx, bench: b, dir: b.path("row-" + row.Name)}
	if t.Row.Scheme == 0 {
		t.Row.Scheme = tls.ECDSAWithP256AndSHA256
	}
	defer os.RemoveAll(t.dir)
	defer func() {
		for _, h := range t.Homes {
			h.Close()
		}
	}()
	if err := t.start(); err != nil {
		return nil, err
	}
	defer t.server.kill()
	defer t.Load.stop()
	if err := t.run(); err != nil {
		return nil, fmt.Errorf("%w; the client saw %v; the key server said:\n%s", err, t.errors(), t.server.story())
	}
	return t.result()
}

func (t *Trial) start() error {
	for i := range t.Row.Homes {
		h, err := t.bench.home(filepath.Join(t.dir, fmt.Sprintf("home%d", i)), i)
		if err != nil {
			return err
		}
		t.Homes = append(t.Homes, h)
		if err := h.Set(faultmodule.Faults{Count: true}); err != nil {
			return err
		}
	}
	if t.Before != nil {
		if err := t.Before(t); err != nil {
			return err
		}
	}
	config := filepath.Join(t.dir, "keyserver.yaml")
	if err := os.WriteFile(config, []byte(t.config()), 0o600); err != nil {
		return fmt.Errorf("reliability: %w", err)
	}
	var err error
	if t.server, err = startServer(t.ctx, t.bench.program, config); err != nil {
		return err
	}
	if t.Load, err = t.bench.startLoad(t.ctx, t.server.address("serving"), t.Row.Scheme); err != nil {
		t.server.kill()
		return err
	}
	return nil
}

func (t *Trial) config() string {
	var b strings.Builder
	fmt.Fprintf(&b, "listen: 127.0.0.1:0\nops: {listen: 127.0.0.1:0}\nca_dir: %[1]s\ntls: {cert: %[2]s/cert.pem, key: %[2]s/key.pem, ca: %[2]s/ca.pem}\n", t.bench.path("ca"), t.bench.path("tls"))
	fmt.Fprintf(&b, "control: %s/control.sock\n%s", t.dir, t.Config)
	fmt.Fprintf(&b, "clients:\n  - {id: \"spiffe://%s/edge/%s\", keys: [\"*\"], operations: [tls-sign], schemes: [\"*\"], snis: [\"*\"]}\ntokens:\n", domain, client)
	for i, h := range t.Homes {
		fmt.Fprintf(&b, "  - uri: \"pkcs11:token=%s?pin-source=%s\"\n    module: %s\n    workers: %d\n", h.Token.Label, h.PINFile, h.module, t.Row.Workers)
		extra := cmp.Or([]string{t.Token, t.Second}[i], "deadline: 500ms")
		for line := range strings.Lines(extra) {
			fmt.Fprintf(&b, "    %s\n", strings.TrimSpace(line))
		}
	}
	return b.String()
}

// Numbers of requests in a row that show that all is well.
const (
	enough = 40
)

func (t *Trial) run() error {
	if err := t.well(0, t.Absent != Never); err != nil {
		return fmt.Errorf("before the failure: %w", err)
	}
	_, t.calm = t.Load.good()
	t.inflicted = time.Now()
	if err := t.Fault(t); err != nil {
		return fmt.Errorf("during the failure: %w", err)
	}
	if t.healed.IsZero() {
		t.healed = time.Now()
	}
	_, all := t.Load.good()
	if err := t.well(all, t.Absent == AllTheWay); err != nil {
		return fmt.Errorf("after the failure: %w", err)
	}
	_, t.recovered = t.Load.good()
	if err := t.well(t.recovered, t.Absent == AllTheWay); err != nil {
		return fmt.Errorf("after the recovery: %w", err)
	}
	if t.Says != "" {
		says := regexp.MustCompile(t.Says)
		if err := poll(t.ctx, "a line of the log that fits "+t.Says, func() bool { return says.MatchString(t.server.text()) }); err != nil {
			return err
		}
	}
	if t.Metric != "" {
		if err := t.measured(t.Metric); err != nil {
			return err
		}
	}
	if t.Also != nil {
		return t.Also(t)
	}
	return nil
}

// measured checks that a metric of the first token is above 0.
func (t *Trial) measured(metric string) error {
	_, text, err := t.server.get(t.ctx, "/metrics")
	if err != nil {
		return err
	}
	name, label, _ := strings.Cut(metric, " ")
	for line := range strings.Lines(text) {
		series, value, _ := strings.Cut(strings.TrimSpace(line), "} ")
		if strings.HasPrefix(series, name+"{") && strings.Contains(series, label) && strings.Contains(series, t.Homes[0].Token.Label) && value != "0" {
			return nil
		}
	}
	return fmt.Errorf("the metric %s is 0 or missing", metric)
}

// well waits until requests go well, enough of them after the first skip, and all workers are there, but for an absent first token.
func (t *Trial) well(skip int, absent bool) error {
	err := poll(t.ctx, "requests that go well", func() bool {
		inRow, all := t.Load.good()
		return min(inRow, all-skip) >= enough || t.server.ended()
	})
	if err != nil {
		return err
	}
	if t.server.ended() {
		return errors.New("the key server ended")
	}
	for i, h := range t.Homes {
		if i == 0 && absent {
			continue
		}
		if err := poll(t.ctx, fmt.Sprintf("%d workers of home %d", t.Row.Workers, i), func() bool { return len(h.Counters().PIDs) == t.Row.Workers }); err != nil {
			return err
		}
	}
	return nil
}

// Set changes the faults of the first token.
func (t *Trial) Set(f faultmodule.Faults) error {
	f.Count = true
	return t.Homes[0].Set(f)
}

// Heal ends the failure of the first token.
func (t *Trial) Heal() error {
	t.healed = time.Now()
	return t.Set(faultmodule.Faults{})
}

// Counters returns what the processes of the first token counted.
func (t *Trial) Counters() faultmodule.Counters { return t.Homes[0].Counters() }

// Until waits until ok.
func (t *Trial) Until(what string, ok func() bool) error { return poll(t.ctx, what, ok) }

// Answered waits until n more requests have ended, well or not.
func (t *Trial) Answered(n int) error {
	_, all := t.Load.good()
	return t.Until("requests that end", func() bool {
		_, now := t.Load.good()
		return now >= all+n
	})
}

// Kill sends SIGKILL to a worker of the first token.
func (t *Trial) Kill() error {
	pids := t.Counters().PIDs
	if len(pids) == 0 {
		return errors.New("no worker")
	}
	return syscall.Kill(pids[0], syscall.SIGKILL)
}

// errors counts what the client saw, by text.
func (t *Trial) errors() map[string]int {
	t.Load.mu.Lock()
	defer t.Load.mu.Unlock()
	seen := map[string]int{}
	for _, s := range t.Load.samples {
		if s.err != nil {
			seen[shorten(s.err)]++
		}
	}
	return seen
}

var address = regexp.MustCompile(`keyless: keyhaven/tls-sign( by [0-9.:]+)?: `)

func shorten(err error) string {
	return strings.TrimPrefix(address.ReplaceAllString(err.Error(), ""), "keyless: ")
}

// tree checks that the module is in workers alone, all of them children of the server.
func (t *Trial) tree() error {
	main := t.server.cmd.Process.Pid
	for i, h := range t.Homes {
		c := h.Counters()
		if slices.Contains(c.PIDs, main) {
			return fmt.Errorf("the key server's own process has the module of home %d", i)
		}
		for _, pid := range c.PIDs {
			if parent(pid) != strconv.Itoa(main) {
				return fmt.Errorf("process %d with the module of home %d is no child of the key server", pid, i)
			}
		}
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", main))
	if err != nil && (os.Geteuid() == 0 || !errors.Is(err, fs.ErrPermission)) { // the server shows its memory to root alone
		return err
	}
	for _, h := range t.Homes {
		if strings.Contains(string(maps), h.module) || strings.Contains(string(maps), h.Token.Module) {
			return errors.New("the key server's own process maps a PKCS#11 module")
		}
	}
	return nil
}
