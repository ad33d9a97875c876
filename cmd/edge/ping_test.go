package main

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/edge/admin"
)

func TestPingOutput(t *testing.T) {
	answers := []admin.Echo{
		{Type: admin.EchoReply, From: "10.0.0.7", TTL: 63, Size: 56, RTTUS: 2000, HostRTTUS: 300},
		{Type: admin.EchoTimedOut},
		{Type: admin.EchoTimeExceeded, From: "10.0.0.1"},
		{Type: admin.EchoUnreachable, From: "10.0.0.1", Text: "tunnel: host unreachable"},
		{Type: admin.EchoFailed, Text: "the connector's host forbids it"},
		{Type: admin.EchoReply, From: "10.0.0.7", TTL: 63, Size: 56, RTTUS: 4000, HostRTTUS: 300},
	}
	var out bytes.Buffer
	p := pinger{w: &out, host: "10.0.0.7"}
	err := p.run(t.Context(), len(answers), time.Millisecond, func(_ context.Context, seq int) (admin.Echo, error) {
		e := answers[seq]
		e.Seq = uint16(seq)
		return e, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p.summary()
	for _, want := range []string{
		"64 bytes from 10.0.0.7: icmp_seq=0 ttl=63 time=2.000 ms (0.300 ms from the connector)\n",
		"no answer for icmp_seq=1\n",
		"from 10.0.0.1: icmp_seq=2 time to live exceeded\n",
		"from 10.0.0.1: icmp_seq=3 host unreachable\n",
		"icmp_seq=4 failed: the connector's host forbids it\n",
		"6 packets transmitted, 2 received, 66.67% packet loss",
		"rtt min/avg/max/mdev = 2.000/3.000/4.000/1.000 ms\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output lacks %q:\n%s", want, &out)
		}
	}
}

func TestTraceOutput(t *testing.T) {
	hops := func(_ context.Context, seq, ttl int) (admin.Echo, error) {
		switch {
		case ttl == 1:
			return admin.Echo{Type: admin.EchoTimeExceeded, From: "10.0.0.1", HostRTTUS: 500}, nil
		case ttl == 2 && seq%2 == 0:
			return admin.Echo{Type: admin.EchoTimedOut}, nil
		case ttl == 2:
			return admin.Echo{Type: admin.EchoTimeExceeded, From: "10.1.0.1", HostRTTUS: 700}, nil
		}
		return admin.Echo{Type: admin.EchoReply, From: "10.9.0.7", HostRTTUS: 900}, nil
	}
	var out bytes.Buffer
	if err := trace(t.Context(), &out, 30, 2, hops); err != nil {
		t.Fatal(err)
	}
	want := " 1  10.0.0.1  0.500 ms  0.500 ms\n 2  * 10.1.0.1  0.700 ms\n 3  10.9.0.7  0.900 ms  0.900 ms\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", &out, want)
	}
	out.Reset()
	if err := trace(t.Context(), &out, 2, 1, hops); !errors.Is(err, errNoReply) {
		t.Errorf("too few hops: got %v, want errNoReply", err)
	}
	refused := func(context.Context, int, int) (admin.Echo, error) {
		return admin.Echo{Type: admin.EchoUnreachable, Code: 13, From: "10.0.0.1"}, nil
	}
	out.Reset()
	if err := trace(t.Context(), &out, 30, 1, refused); !errors.Is(err, errNoReply) || !strings.Contains(out.String(), " 1  10.0.0.1  0.000 ms !X\n") {
		t.Errorf("refused: got %v and\n%s", err, &out)
	}
	nobody := func(context.Context, int, int) (admin.Echo, error) { return admin.Echo{}, errNoReply }
	out.Reset()
	if err := trace(t.Context(), &out, 30, 3, nobody); !errors.Is(err, errNoReply) || out.Len() > 0 {
		t.Errorf("no edge: got %v and %q", err, &out)
	}
	p := pinger{w: &out}
	if err := p.run(t.Context(), 3, 1, func(context.Context, int) (admin.Echo, error) { return admin.Echo{}, errNoReply }); err == nil || p.sent != 0 {
		t.Errorf("no edge: got %v and %d packets sent", err, p.sent)
	}
}
