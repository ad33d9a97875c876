package faultmodule

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"
)

// The page, as shim/page.h has it: offsets and sizes in words of 64 bits, unless said otherwise.
const (
	pageMagic = 0x6b68666175740001
	pageBytes = 16384

	wArmed       = 1
	wGeneration  = 2
	wDelay       = 3
	wServe       = 4
	wThrottle    = 5
	wMaxSessions = 6
	wLoginIdle   = 7
	wTokenFlags  = 8
	wHidden      = 9
	wDown        = 10
	wPINTries    = 11
	wECDSA       = 12
	wRefused     = 13
	wMechanisms  = 14
	wCounters    = 24
	wRules       = 64
	wProcesses   = 384
	wModule      = 1408
	wEnvironment = 1664

	maxRules     = 8
	ruleWords    = 8
	maxRefused   = 8
	maxServe     = 256
	maxProcesses = 64
	processWords = 16
	textBytes    = 2048
)

// The bits of wArmed.
const (
	onRules = 1 << iota
	onServe
	onCount
	onEvents
	onState
)

// The words of a process.
const (
	qPID = iota
	qSessions
	qInFlight
	qDropped
	qForgotten
	qStale
	_ // calls inside the module
	_ // logins now
	qHanging
)

// The values of qStale.
const (
	staleInit    = 1 // until the module is initialised again
	staleProcess = 2 // for good
)

// A Control commands the processes that have the module loaded, and reads what they counted. It is safe for concurrent use;
// the methods that change faults take effect on calls that begin afterwards, except that they release hanging ones.
type Control struct {
	path string

	mu     sync.Mutex // guards what follows, and lets one change the faults at a time
	words  []uint64
	closed bool
}

// New makes the control file in dir and has the module hand its calls to realModule. setenv, if any, is one "NAME=value" that
// the module sets in its process before it loads realModule, so that tokens of several configurations fit into one program.
func New(dir, realModule string, setenv ...string) (*Control, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("faultmodule: %w", err)
	}
	if len(setenv) > 1 {
		return nil, errors.New("faultmodule: one variable at most")
	}
	c := &Control{path: filepath.Join(dir, "control")}
	f, err := os.OpenFile(c.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("faultmodule: %w", err)
	}
	defer f.Close()
	if err := f.Truncate(pageBytes); err != nil {
		return nil, fmt.Errorf("faultmodule: %w", err)
	}
	b, err := syscall.Mmap(int(f.Fd()), 0, pageBytes, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("faultmodule: map %s: %w", c.path, err)
	}
	c.words = unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(b))), pageBytes/8)
	if len(realModule) >= textBytes || len(strings.Join(setenv, "")) >= textBytes {
		return nil, errors.Join(errors.New("faultmodule: path or variable too long"), c.Close())
	}
	copy(b[wModule*8:], realModule)
	copy(b[wEnvironment*8:], strings.Join(setenv, ""))
	c.words[0] = pageMagic
	return c, nil
}

// Env returns the environment entry that a process needs if the module is not in the directory of the control file.
func (c *Control) Env() []string { return []string{"KH_FAULT_CONTROL=" + c.path} }

// Close releases hanging calls, takes the faults back and unmaps the page. No other method may run beside it or be called
// afterwards, except Close.
func (c *Control) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.setLocked(Faults{})
	c.closed = true
	if err := syscall.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(c.words))), pageBytes)); err != nil {
		return fmt.Errorf("faultmodule: %w", err)
	}
	return nil
}

func (c *Control) load(w int) uint64     { return atomic.LoadUint64(&c.words[w]) }
func (c *Control) store(w int, v uint64) { atomic.StoreUint64(&c.words[w], v) }

// Set replaces all faults. Calls that hang come back.
func (c *Control) Set(f Faults) error {
	if err := f.check(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setLocked(f)
	return nil
}

// Clear takes all faults back, and releases calls that hang. What was dropped, forgotten or broken stays so.
func (c *Control) Clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setLocked(Faults{})
}

func (c *Control) setLocked(f Faults) {
	// Disarmed while it changes; only what happened to the processes remains.
	events := c.load(wArmed) & onEvents
	c.store(wArmed, events)
	for i := range maxRules {
		c.store(wRules+i*ruleWords, 0)
	}
	on := events
	for i, r := range f.Rules {
		at := wRules + i*ruleWords
		for j, v := range []uint64{functionNumbers[r.Function], uint64(r.After), uint64(r.Count), uint64(r.Code), flag(r.Leave), uint64(r.PID), 0} {
			c.store(at+1+j, v)
		}
		c.store(at, uint64(r.Do))
		on |= onRules
	}
	for w, v := range f.state() {
		c.store(w, v)
		if v != 0 {
			on |= onState
		}
	}
	c.store(wDelay, uint64(f.Delay))
	c.store(wServe, uint64(f.Serve))
	if f.Delay > 0 {
		on |= onServe
	}
	if f.Count {
		on |= onCount
	}
	if f.Down {
		on |= onEvents
		for at := range c.processes() {
			c.store(at+qStale, staleProcess)
		}
	}
	c.store(wGeneration, c.load(wGeneration)+1)
	// A process may have forgotten its login meanwhile.
	for {
		now := atomic.LoadUint64(&c.words[wArmed])
		if atomic.CompareAndSwapUint64(&c.words[wArmed], now, on|now&onEvents) {
			return
		}
	}
}

// DropSessions ends all sessions, the login and all handles of the processes named, or of all.
func (c *Control) DropSessions(pids ...int) { c.event(qDropped, pids) }

// ForgetLogin ends the login and the handles of the processes named, or of all. Their sessions stay.
func (c *Control) ForgetLogin(pids ...int) { c.event(qForgotten, pids) }

// Break makes every call fail with CKR_DEVICE_ERROR in the processes named, or in all that run, until they end: C_Finalize
// and C_Initialize in the same process do not help.
func (c *Control) Break(pids ...int) { c.stale(staleProcess, pids) }

// Stale is like Break, but C_Finalize and C_Initialize help.
func (c *Control) Stale(pids ...int) { c.stale(staleInit, pids) }

func (c *Control) stale(how uint64, pids []int) {
	c.each(pids, func(at int) { c.store(at+qStale, how) })
}

func (c *Control) event(word int, pids []int) {
	c.each(pids, func(at int) { atomic.AddUint64(&c.words[at+word], 1) })
}

func (c *Control) each(pids []int, do func(at int)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	atomic.OrUint64(&c.words[wArmed], onEvents)
	for at := range c.processes() {
		pid := int(c.load(at + qPID))
		if len(pids) == 0 || slices.Contains(pids, pid) {
			do(at)
		}
	}
}

// processes yields the offsets of the processes that run.
func (c *Control) processes() func(func(int) bool) {
	return func(yield func(int) bool) {
		for i := range maxProcesses {
			at := wProcesses + i*processWords
			pid := int(c.load(at + qPID))
			if pid == 0 || syscall.Kill(pid, 0) == syscall.ESRCH {
				continue
			}
			if !yield(at) {
				return
			}
		}
	}
}

// Counters is what the processes counted since New. Calls, Operations, MaxInFlight and what can only be seen in every call
// (Overlaps, FinalizedBusy, Forked) are counted while any fault but Delay is set, or Faults.Count; the rest always.
type Counters struct {
	Calls         uint64 // of the functions that the module replaces
	Faults        uint64 // calls that a fault changed
	Logins        uint64 // C_Login
	LoginsFailed  uint64
	Operations    uint64 // C_Sign and C_Decrypt
	Overlaps      uint64 // calls on a session while another ran on it, which PKCS#11 forbids
	FinalizedBusy uint64 // C_Finalize beside other calls, which PKCS#11 forbids
	Forked        uint64 // calls in a process that was forked after the module was loaded, which PKCS#11 forbids
	MaxInFlight   uint64 // most operations at one time
	Hanging       uint64 // calls that hang now
	Crashes       uint64
	SessionsPeak  uint64 // most sessions open at one time
	LoginsPeak    uint64 // most C_Login at one time
	PINFailures   uint64 // wrong PINs since the latest right one
	Short         uint64 // ECDSA signatures with a short r or s
	Processes     uint64 // that ever initialised the module
	InFlight      uint64 // operations now
	Sessions      uint64 // open now
	PIDs          []int  // processes that have the module initialised, or had and still run
}

// Counters reads the counters.
func (c *Control) Counters() Counters {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := func(i int) uint64 { return c.load(wCounters + i) }
	got := Counters{
		Calls: n(0), Faults: n(1), Logins: n(2), LoginsFailed: n(3), Operations: n(4), Overlaps: n(5), FinalizedBusy: n(6), Forked: n(7),
		MaxInFlight: n(8), Crashes: n(9), SessionsPeak: n(10), LoginsPeak: n(11), PINFailures: n(12), Short: n(13), Processes: n(14),
	}
	for at := range c.processes() {
		got.Hanging += c.load(at + qHanging)
		got.InFlight += c.load(at + qInFlight)
		got.Sessions += c.load(at + qSessions)
		got.PIDs = append(got.PIDs, int(c.load(at+qPID)))
	}
	return got
}
