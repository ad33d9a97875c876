package tunnel

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestDevice(t *testing.T) { overBoth(t, testDevice) }

func testDevice(t *testing.T, via Carrier) {
	var report atomic.Pointer[string]
	say := func(s string) { report.Store(&s) }
	got := make(chan string, 1)
	_, c, s := pairOver(t, via, accept(echo), func(_ *ListenConfig, dc *DialConfig) {
		dc.OnDevice = func(directive []byte) []byte {
			got <- string(directive)
			return []byte(*report.Load())
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	long := strings.Repeat("x", maxDeviceLen)
	for _, tt := range []struct{ directive, report string }{{"", ""}, {"hold", "idle"}, {long, long}} {
		say(tt.report)
		answer, err := s.Device(ctx, []byte(tt.directive))
		if err != nil {
			t.Fatalf("Device: %v", err)
		}
		if d := <-got; d != tt.directive || string(answer) != tt.report {
			t.Errorf("%d bytes were told and %d answered, want %d and %d", len(d), len(answer), len(tt.directive), len(tt.report))
		}
	}
	if _, err := s.Device(ctx, make([]byte, maxDeviceLen+1)); err == nil {
		t.Error("a directive above the limit was sent")
	}
	say(long + "x")
	if _, err := s.Device(ctx, nil); !errors.Is(err, ErrInternal) && !errors.Is(err, ErrReset) {
		t.Errorf("a report above the limit: %v, want the flow to be cut", err)
	}
	<-got
	eventually(t, "no flows", func() bool { return s.Flows() == 0 && c.Flows() == 0 })

	_, _, plain := pairOver(t, via, accept(echo))
	if _, err := plain.Device(ctx, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("Device of a connector without OnDevice: %v, want ErrUnsupported", err)
	}
}

// A connector that keeps an edge waiting costs it the flow, for as long as the edge's context lasts.
func TestDeviceSilent(t *testing.T) { overBoth(t, testDeviceSilent) }

func testDeviceSilent(t *testing.T, via Carrier) {
	stuck := make(chan struct{})
	_, _, s := pairOver(t, via, accept(echo), func(_ *ListenConfig, dc *DialConfig) {
		dc.OnDevice = func([]byte) []byte { <-stuck; return nil }
	})
	defer close(stuck)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := s.Device(ctx, []byte("hold")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Device: %v, want the context's end", err)
	}
	if s.Flows() != 0 {
		t.Errorf("%d flows are left", s.Flows())
	}
	checkEcho(t, open(t, s, testFlow), "the session goes on")
}

// FuzzDevice plays an edge that an attacker has taken over, against a connector, and the other way round.
func FuzzDevice(f *testing.F) {
	f.Add(appendDevice(nil))
	f.Add(appendDevice([]byte(`{"policy":"hold"}`)))
	f.Add([]byte("\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := readDevice(bytes.NewReader(b))
		if err != nil {
			return
		}
		if again := appendDevice(got); len(got) > maxDeviceLen || !bytes.Equal(again, b) {
			t.Fatalf("%x was read from %x", got, b)
		}
	})
}
