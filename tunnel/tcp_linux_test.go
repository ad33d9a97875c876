package tunnel

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/mtls"
)

// What connects and then says nothing is told from what does not answer.
func TestStalled(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	src := newPKI(t).source(mtls.KindConnector, "c1", 0)
	_, err = Dial(ctx, DialConfig{Addr: ln.Addr().String(), Carrier: CarrierTCP, Identity: src, Registration: testRegistration, Handle: accept(echo)})
	if !errors.Is(err, ErrStalled) || !errors.Is(err, ErrNoAnswer) {
		t.Errorf("Dial: got %v, want ErrStalled, which is an ErrNoAnswer", err)
	}
}

// Small segments hold for both directions.
func TestSmallSegments(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d := dialer{DialConfig: DialConfig{Addr: ln.Addr().String(), SmallSegments: true}}
	near, err := d.dialThrough(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer near.Close()
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	for side, conn := range map[string]net.Conn{"connector": near, "edge": far} {
		raw, err := conn.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		size := 0
		if err := raw.Control(func(fd uintptr) { size, _ = unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_MAXSEG) }); err != nil {
			t.Fatal(err)
		}
		if size < 500 || size > smallSegment {
			t.Errorf("%s: segments of %d bytes, want at most %d", side, size, smallSegment)
		}
	}
}
