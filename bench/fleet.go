package main

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/lab"
	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/tunnel"
)

// A fleet is one edge, which is the real program, and many connectors, which are idle sessions of this process. Its files
// are in memory where the system has a place for that, since what is measured is not the disk.
type fleet struct {
	dir    string
	addr   string
	ops    string
	edge   *contender // for its process
	ids    []*mtls.Source
	up     atomic.Int64  // connectors with a session
	came   atomic.Int64  // registrations so far
	failed atomic.Int64  // attempts
	dials  chan struct{} // bounds dials that are under way
	wg     sync.WaitGroup
}

// fleetDials is how many registrations are under way at a time.
const fleetDials = 64

// edgeConnectors measures an edge with many idle connectors: registration, memory, and the way back after a kill.
func (b *bench) edgeConnectors(ctx context.Context) (err error) {
	place := "/dev/shm"
	if _, err := os.Stat(place); err != nil {
		place = ""
	}
	dir, err := os.MkdirTemp(place, "keyhaven-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	ports, err := freePorts(3)
	if err != nil {
		return err
	}
	f := &fleet{dir: dir, addr: ports[0], ops: ports[1], edge: &contender{name: "edge", dir: dir}, dials: make(chan struct{}, fleetDials)}
	defer func() { err = errors.Join(err, f.edge.stop()) }()
	if err := f.enrol(ctx, b.connectors); err != nil {
		return err
	}
	cfg, err := yaml.Marshal(obj{
		"state": obj{"file": f.file("state.db")}, "admin": obj{"socket": f.file("edge.sock")},
		"identity": obj{"ca_dir": f.file("ca"), "dir": f.file("edge")}, "ops": obj{"listen": f.ops},
		"tunnel": obj{"listen": f.addr, "advertise": []string{f.addr}}, "visitors": obj{"listen": obj{"tls": []string{ports[2]}}},
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(f.file("edge.yaml"), cfg, 0o600); err != nil {
		return err
	}
	return b.fleetRuns(ctx, f)
}

func (f *fleet) file(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

// enrol makes the authority, the edge's identity, and n tunnels with a connector each, by the same calls that joins over
// the network end in.
func (f *fleet) enrol(ctx context.Context, n int) (err error) {
	authority, err := mtls.InitAuthority(f.file("ca"), lab.EdgeDomain)
	if err != nil {
		return err
	}
	key, csr, err := mtls.NewKeyCSR()
	if err != nil {
		return err
	}
	chain, err := authority.IssueCSR(csr, mtls.Identity{TrustDomain: lab.EdgeDomain, Kind: mtls.KindEdge, Name: "edge1"}, 24*time.Hour)
	if err != nil {
		return err
	}
	if err := writeIdentity(f.file("edge"), key, chain, authority.RootPEM()); err != nil {
		return err
	}
	store, err := state.OpenBolt(f.file("state.db"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	c, err := control.Open(ctx, control.Config{Store: store, Authority: authority, Edges: []string{f.addr}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	for i := range n {
		name := fmt.Sprintf("site-%05d", i)
		if _, err := c.AddTunnel(ctx, name, ""); err != nil {
			return err
		}
		grant, err := c.CreateToken(ctx, name, time.Hour)
		if err != nil {
			return err
		}
		tok, err := mtls.ParseJoinToken(grant.Token)
		if err != nil {
			return err
		}
		key, csr, err := mtls.NewKeyCSR()
		if err != nil {
			return err
		}
		reply, err := c.Join(ctx, tunnel.JoinRequest{TokenID: tok.ID, Secret: tok.Secret.Reveal(), CSR: csr, Name: name})
		if err != nil {
			return err
		}
		if err := writeIdentity(f.file(name), key, reply.Chain, reply.Roots); err != nil {
			return err
		}
		id, err := mtls.OpenDir(f.file(name), nil)
		if err != nil {
			return err
		}
		f.ids = append(f.ids, id)
	}
	return nil
}

// writeIdentity writes what mtls.OpenDir reads.
func writeIdentity(dir string, key crypto.Signer, chain [][]byte, roots []byte) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var cert bytes.Buffer
	for _, c := range chain {
		pem.Encode(&cert, &pem.Block{Type: "CERTIFICATE", Bytes: c})
	}
	return errors.Join(os.Mkdir(dir, 0o700),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600),
		os.WriteFile(filepath.Join(dir, "cert.pem"), cert.Bytes(), 0o600), os.WriteFile(filepath.Join(dir, "ca.pem"), roots, 0o600))
}

// startFleetEdge runs the edge and waits until it lets connectors in.
func (b *bench) startFleetEdge(ctx context.Context, f *fleet) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	program := filepath.Join(b.bin, "keyhaven-edge")
	if err := f.edge.spawn(exec.CommandContext(ctx, program, "run", "--config", f.file("edge.yaml"))); err != nil {
		return err
	}
	return f.edge.until(ctx, func() error {
		out, err := exec.CommandContext(ctx, program, "status", "--socket", f.file("edge.sock")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// connect keeps a session of one connector up until ctx ends, with the pauses that connectors make.
func (f *fleet) connect(ctx context.Context, id *mtls.Source) {
	const shortest, longest = 250 * time.Millisecond, 15 * time.Second
	for pause := shortest; ctx.Err() == nil; pause = min(2*pause, longest) {
		f.dials <- struct{}{}
		s, err := f.dial(ctx, id)
		<-f.dials
		if err == nil {
			f.up.Add(1)
			f.came.Add(1)
			s.Run(ctx)
			f.up.Add(-1)
			pause = shortest
		} else if ctx.Err() == nil {
			f.failed.Add(1)
		}
		if sleep(ctx, rand.N(pause)) != nil {
			return
		}
	}
}

func (f *fleet) dial(ctx context.Context, id *mtls.Source) (*tunnel.ClientSession, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return tunnel.Dial(ctx, tunnel.DialConfig{Addr: f.addr, Identity: id, Carrier: tunnel.CarrierQUIC,
		Registration: tunnel.Registration{Instance: id.Identity().Name, Connections: 1},
		Handle:       func(_ context.Context, in *tunnel.Incoming) { in.Reject(tunnel.ResultDenied) }})
}

// await waits until there have been so many registrations and all connectors are up.
func (f *fleet) await(ctx context.Context, came int64) (time.Duration, error) {
	began := time.Now()
	for f.came.Load() < came || f.up.Load() < int64(len(f.ids)) {
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return 0, err
		}
		if time.Since(began) > 3*time.Minute {
			return 0, fmt.Errorf("%d of %d connectors are up after 3 min, %d attempts failed%s", f.up.Load(), len(f.ids), f.failed.Load(), f.edge.lastLines())
		}
	}
	return time.Since(began), nil
}

// fleetRuns measures.
func (b *bench) fleetRuns(ctx context.Context, f *fleet) error {
	if err := b.startFleetEdge(ctx, f); err != nil {
		return err
	}
	n := len(f.ids)
	add := func(what string, value float64, unit string) {
		b.report.rows = append(b.report.rows, row{Group: "edge", Case: what, Callers: n, Rate: value, Unit: unit})
	}
	empty := rss(f.edge.pids())
	add("resident memory with the records of the connectors, none connected", empty, "MiB")
	living, stop := context.WithCancel(ctx)
	defer func() { stop(); f.wg.Wait() }()
	spent := cpuTime(f.edge.pids())
	for _, id := range f.ids {
		f.wg.Go(func() { f.connect(living, id) })
	}
	took, err := f.await(ctx, int64(n))
	if err != nil {
		return err
	}
	add(fmt.Sprintf("registrations, %d at a time", fleetDials), float64(n)/took.Seconds(), "1/s")
	add("edge's processor time of a registration", (cpuTime(f.edge.pids())-spent).Seconds()*1e6/float64(n), "µs")
	if err := sleep(ctx, 10*time.Second); err != nil { // until what the handshakes left behind is collected
		return err
	}
	each := (rss(f.edge.pids()) - empty) * 1024 / float64(n)
	add("resident memory of an idle connection", each, "KiB")
	b.report.atMost(fmt.Sprintf("edge, memory of each of %d idle connections / 100 KiB", n), each, 100, 1)
	spent = cpuTime(f.edge.pids())
	if err := sleep(ctx, 10*time.Second); err != nil {
		return err
	}
	add("processor time of all idle connections", (cpuTime(f.edge.pids())-spent).Seconds()*100/10, "% of a core")
	came, down := f.came.Load(), time.Now()
	if err := f.edge.stop(); err != nil {
		return err
	}
	if err := b.startFleetEdge(ctx, f); err != nil {
		return err
	}
	// Every session has died with the edge, whether its connector has noticed yet or not.
	if took, err = f.await(ctx, came+int64(n)); err != nil {
		return err
	}
	add("time from the edge's kill until all are back", time.Since(down).Seconds(), "s")
	add("of that, after the edge has started again", took.Seconds(), "s")
	b.report.atMost("edge, seconds until all are back / 30 s", time.Since(down).Seconds(), 30, 1)
	return nil
}
