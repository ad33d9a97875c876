package update

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"aead.dev/minisign"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/slot"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// errPower ends everything once the power is gone.
var errPower = errors.New("the power is gone")

// A machine is a computer in memory: its slots, and the directory for the record. The power goes in its cut-th step.
type machine struct {
	mu       sync.Mutex
	slots    map[int]slot.Info // whole systems
	current  int
	def      int // 0: autoboot.txt is damaged
	restarts []string
	tryboot  bool // a restart for a trial was asked for

	steps, cut int
	late       bool // the step that the power goes in is done
	dead       bool
	files      map[string][]byte
	renamed    map[string][]byte // what a rename that is not synced would make of files

	writeErr, commitErr error
}

func newMachine(version string) *machine {
	return &machine{slots: map[int]slot.Info{slot.PartA: system(version)}, current: slot.PartA, def: slot.PartA, files: map[string][]byte{}}
}

func system(version string) slot.Info {
	return slot.Info{Version: version, Arch: "arm64", Boards: []string{"pc"}, Built: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), Format: 1}
}

// step does one thing that lasts, unless the power went before.
func (m *machine) step(do func()) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return errPower
	}
	m.steps++
	if m.steps == m.cut {
		m.dead = true
		if m.late {
			do()
		}
		return errPower
	}
	do()
	return nil
}

// start starts the machine as the firmware would, and returns which version runs.
func (m *machine) start() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = m.def
	if m.tryboot {
		m.current = slot.Other(m.def)
	}
	m.tryboot, m.dead, m.cut, m.renamed = false, false, 0, nil
	return m.slots[m.current].Version
}

func (m *machine) State() (slot.State, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	st := slot.State{Current: m.current, Default: m.def, Trial: m.def != 0 && m.def != m.current}
	if st.Default == st.Current {
		st.Idle = slot.Other(st.Current)
	}
	return st, nil
}

func (m *machine) Info(part int) (slot.Info, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i, ok := m.slots[part]; ok {
		return i, nil
	}
	return slot.Info{}, slot.ErrEmpty
}

func (m *machine) Size() (int64, error) { return 1 << 20, nil }
func (m *machine) Boards() []string     { return []string{"pc"} }
func (m *machine) Model() string        { return "Test 1" }

// WriteIdle takes an image that is slot.json and zeros.
func (m *machine) WriteIdle(ctx context.Context, r io.Reader, size int64, progress func(int64)) error {
	st, err := m.State()
	if err != nil || st.Idle == 0 {
		return errors.Join(err, slot.ErrTrial)
	}
	if err := m.step(func() { delete(m.slots, st.Idle) }); err != nil {
		return err
	}
	if m.writeErr != nil {
		return m.writeErr
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	progress(int64(len(b)))
	var i slot.Info
	if err := json.Unmarshal(bytes.TrimRight(b, "\x00"), &i); err != nil || int64(len(b)) != size {
		return fmt.Errorf("%d bytes: %w", len(b), err)
	}
	return m.step(func() { m.slots[st.Idle] = i })
}

func (m *machine) Commit() error {
	if m.commitErr != nil {
		return m.commitErr
	}
	return m.step(func() { m.def = m.current })
}

func (m *machine) Rollback() (slot.Info, error) {
	i, err := m.Info(slot.Other(m.current))
	if err != nil {
		return i, err
	}
	return i, m.step(func() { m.def = slot.Other(m.current) })
}

func (m *machine) Repair(part int) (bool, error) {
	if m.def != 0 {
		return false, nil
	}
	return true, m.step(func() { m.def = part })
}

func (m *machine) RebootTrial() error {
	return m.step(func() { m.tryboot, m.restarts = true, append(m.restarts, "trial") })
}

func (m *machine) Reboot() error {
	return m.step(func() { m.restarts = append(m.restarts, "default") })
}

// Read, Create, Rename and Sync are the directory of the record.
func (m *machine) Read(name string, most int64) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	files := m.files
	if m.renamed != nil {
		files = m.renamed
	}
	if b, ok := files[name]; ok {
		return b[:min(int64(len(b)), most)], nil
	}
	return nil, fs.ErrNotExist
}

func (m *machine) Create(name string, b []byte) error {
	if err := m.step(func() { m.files[name] = b[:len(b)/2] }); err != nil { // torn
		return err
	}
	return m.step(func() { m.files[name] = b })
}

func (m *machine) Rename(old, name string) error {
	return m.step(func() {
		m.renamed = map[string][]byte{name: m.files[old]}
		if m.late { // it reached the disk by itself
			m.files, m.renamed = m.renamed, nil
		}
	})
}

func (m *machine) Sync() error {
	return m.step(func() {
		if m.renamed != nil {
			m.files, m.renamed = m.renamed, nil
		}
	})
}

// A publisher signs bundles and indexes and serves them without a network.
type publisher struct {
	pub   minisign.PublicKey
	key   minisign.PrivateKey
	mu    sync.Mutex
	files map[string][]byte // by path
	index bundle.Index
	asked []string // paths, in order
	down  bool
}

func newPublisher(t testing.TB) *publisher {
	t.Helper()
	pub, key, err := minisign.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &publisher{pub: pub, key: key, files: map[string][]byte{}, index: bundle.Index{Arch: "arm64", Channel: "stable", Published: time.Date(2026, 1, 2, 0, 0, 0, 0, time.UTC)}}
}

// bundle makes a bundle of a version.
func (p *publisher) bundle(t testing.TB, version string) []byte {
	t.Helper()
	i := system(version)
	text, err := json.Marshal(i)
	if err != nil {
		t.Fatal(err)
	}
	image := append(text, make([]byte, 4096-len(text))...)
	var b bytes.Buffer
	m := bundle.Manifest{Version: version, Arch: i.Arch, Boards: i.Boards, Built: i.Built}
	if _, err := bundle.Write(&b, m, bytes.NewReader(image), bundle.Signer(p.key, "")); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// publish adds a version to the index, or changes its percentage.
func (p *publisher) publish(t testing.TB, version string, percent int) {
	t.Helper()
	b := p.bundle(t, version)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.files["/stable/"+version+".update"] = b
	p.index.Releases = slices.DeleteFunc(p.index.Releases, func(r bundle.Release) bool { return r.Version == version })
	p.index.Releases = append(p.index.Releases, bundle.Release{
		Version: version, URL: version + ".update", Size: int64(len(b)), SHA256: sumOf(b), Percent: percent, Salt: "salt",
	})
	p.index.Published = p.index.Published.Add(time.Hour)
	p.write(t)
}

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// write signs the index.
func (p *publisher) write(t testing.TB) {
	t.Helper()
	var b bytes.Buffer
	if err := bundle.WriteIndex(&b, p.index, bundle.Signer(p.key, "")); err != nil {
		t.Fatal(err)
	}
	p.files["/stable/arm64.json"] = b.Bytes()
}

// RoundTrip serves the files.
func (p *publisher) RoundTrip(req *http.Request) (*http.Response, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.asked = append(p.asked, req.URL.Path)
	if p.down {
		return nil, errors.New("no route to host")
	}
	b, ok := p.files[req.URL.Path]
	resp := &http.Response{StatusCode: 200, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: http.Header{}, Request: req, ContentLength: int64(len(b)), Body: io.NopCloser(bytes.NewReader(b))}
	if !ok {
		resp.StatusCode = 404
	}
	return resp, nil
}

// times returns how often a path that ends so was asked for.
func (p *publisher) times(suffix string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, a := range p.asked {
		if strings.HasSuffix(a, suffix) {
			n++
		}
	}
	return n
}

// engine returns an engine of the machine that updates from p.
func (m *machine) engine(t testing.TB, p *publisher, change func(*Config)) *Engine {
	t.Helper()
	c := Config{
		Slots: m, Keys: []minisign.PublicKey{p.pub}, Dir: t.TempDir(), Source: "https://updates.example.com", Automatic: true,
		Healthy: func() bool { return true }, KernelArgs: "quiet", HTTP: &http.Client{Transport: p}, Location: time.UTC,
	}
	if change != nil {
		change(&c)
	}
	e, err := newEngine(c, m)
	if err != nil {
		t.Fatal(err)
	}
	return e
}
