package connector

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/windows"

	"github.com/keyhaven/keyhaven/tunnel"
)

// echoRemedy is what to do about errEchoForbidden.
const echoRemedy = "permit ICMP to the connector's user"

// maxEchoes bounds the requests of one flow that wait for their answers. More are dropped.
const maxEchoes = 32

var (
	iphlpapi         = windows.NewLazySystemDLL("iphlpapi.dll")
	procCreateFile   = iphlpapi.NewProc("IcmpCreateFile")
	procCreateFile6  = iphlpapi.NewProc("Icmp6CreateFile")
	procCloseHandle  = iphlpapi.NewProc("IcmpCloseHandle")
	procSendEcho2    = iphlpapi.NewProc("IcmpSendEcho2")
	procSendEcho2IP6 = iphlpapi.NewProc("Icmp6SendEcho2")
)

// ipOptions is an IP_OPTION_INFORMATION.
type ipOptions struct {
	ttl, tos, flags, size uint8
	data                  uintptr
}

// echoCaller sends echoes by Windows' own calls, each of which waits for its answer.
type echoCaller struct {
	to      netip.Addr
	handle  uintptr
	slots   chan struct{}
	answers chan tunnel.EchoReply
	done    chan struct{}
	closing sync.Once
	mu      sync.Mutex // guards the field below
	closed  bool
	calls   sync.WaitGroup
}

func openEcho(to netip.Addr) (echoSocket, error) {
	create := procCreateFile6
	if to.Is4() {
		create = procCreateFile
	}
	for _, p := range []*windows.LazyProc{create, procCloseHandle, procSendEcho2, procSendEcho2IP6} {
		if err := p.Find(); err != nil {
			return nil, err
		}
	}
	h, _, err := create.Call()
	switch {
	case windows.Handle(h) != windows.InvalidHandle:
	case errors.Is(err, windows.ERROR_ACCESS_DENIED):
		return nil, errEchoForbidden
	default:
		return nil, err
	}
	return &echoCaller{to: to, handle: h, slots: make(chan struct{}, maxEchoes), answers: make(chan tunnel.EchoReply, maxEchoes),
		done: make(chan struct{})}, nil
}

// close implements echoSocket. The calls that wait end with their time-outs; the handle goes after the last.
func (s *echoCaller) close() error {
	s.closing.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.mu.Unlock()
		close(s.done)
		s.calls.Wait()
		procCloseHandle.Call(s.handle) //nolint:errcheck // nothing to lose
	})
	return nil
}

// send implements echoSocket.
func (s *echoCaller) send(r tunnel.EchoRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return net.ErrClosed
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return nil // full: dropped, as a network would
	}
	r.Payload = append([]byte(nil), r.Payload...)
	s.calls.Go(func() {
		defer func() { <-s.slots }()
		if reply, ok := s.call(r); ok {
			select {
			case s.answers <- reply:
			case <-s.done:
			}
		}
	})
	return nil
}

// receive implements echoSocket.
func (s *echoCaller) receive() (tunnel.EchoReply, error) {
	select {
	case r := <-s.answers:
		return r, nil
	case <-s.done:
		return tunnel.EchoReply{}, net.ErrClosed
	}
}

// call sends one request and waits for its answer.
func (s *echoCaller) call(r tunnel.EchoRequest) (reply tunnel.EchoReply, ok bool) {
	options := ipOptions{ttl: r.TTL}
	if options.ttl == 0 {
		options.ttl = 64
	}
	var data unsafe.Pointer
	if len(r.Payload) > 0 {
		data = unsafe.Pointer(&r.Payload[0])
	}
	buf := make([]byte, reply6Len+64+len(r.Payload))
	out := echoBuffer{b: buf, base: uint64(uintptr(unsafe.Pointer(&buf[0]))), pointer: int(unsafe.Sizeof(uintptr(0)))}
	timeout := uintptr(r.Timeout / time.Millisecond)
	sent := time.Now()
	var n uintptr
	if s.to.Is4() {
		a := s.to.As4()
		n, _, _ = procSendEcho2.Call(s.handle, 0, 0, 0, uintptr(*(*uint32)(unsafe.Pointer(&a[0]))), uintptr(data), uintptr(len(r.Payload)),
			uintptr(unsafe.Pointer(&options)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), timeout)
	} else {
		from := windows.RawSockaddrInet6{Family: windows.AF_INET6}
		to := windows.RawSockaddrInet6{Family: windows.AF_INET6, Addr: s.to.As16()}
		n, _, _ = procSendEcho2IP6.Call(s.handle, 0, 0, 0, uintptr(unsafe.Pointer(&from)), uintptr(unsafe.Pointer(&to)), uintptr(data), uintptr(len(r.Payload)),
			uintptr(unsafe.Pointer(&options)), uintptr(unsafe.Pointer(&buf[0])), uintptr(len(buf)), timeout)
	}
	if n == 0 {
		return reply, false // no answer in time, or a failure: nobody answered
	}
	if s.to.Is4() {
		reply, ok = out.reply4()
	} else {
		reply, ok = out.reply6(len(r.Payload))
	}
	reply.Seq, reply.HostRTT = r.Seq, time.Since(sent)
	return reply, ok
}
