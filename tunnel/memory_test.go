package tunnel

import (
	"context"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// idleEnv makes the test's program the connectors of BenchmarkIdle: carrier, address and directory of identities.
const idleEnv = "TUNNEL_TEST_IDLE"

// BenchmarkIdle reports the memory at the edge of each of 2,000 idle sessions, which a process of its own holds: heap and
// stacks after a collection, without the QUIC library's shared buffers.
func BenchmarkIdle(b *testing.B) {
	for _, via := range []Carrier{CarrierQUIC, CarrierTCP} {
		b.Run(string(via), func(b *testing.B) { benchIdle(b, via) })
	}
}

const idleSessions = 2000

func benchIdle(b *testing.B, via Carrier) {
	p := newPKI(b)
	p.source(mtls.KindConnector, "c1", 0)
	e := startEdge(b, ListenConfig{Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll,
		Handle: func(ctx context.Context, s *Session) {
			if c, err := s.Open(ctx, testFlow); err == nil { // a session that has been used
				c.Write(make([]byte, 1000))
				c.Close()
			}
			<-ctx.Done()
		}})
	before := memoryInUse()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, os.Args[0])
	cmd.Env = append(os.Environ(), idleEnv+"="+string(via)+" "+e.ln.Addr().String()+" "+p.dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	for end := time.Now().Add(3 * time.Minute); e.ln.Sessions() < idleSessions; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatalf("%d sessions", e.ln.Sessions())
		}
	}
	time.Sleep(7 * time.Second) // a ping each
	b.ReportMetric(float64(memoryInUse()-before)/idleSessions/1024, "KiB/session")
	b.ReportMetric(0, "ns/op")
	if n := e.ln.Sessions(); n != idleSessions {
		b.Errorf("%d sessions are left", n)
	}
	cancel()
	cmd.Wait() //nolint:errcheck // it was killed
	for e.ln.Sessions() > 0 {
		time.Sleep(50 * time.Millisecond)
	}
}

func memoryInUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// idleConnectors is the other process of BenchmarkIdle.
func idleConnectors(how string) {
	via, rest, _ := strings.Cut(how, " ")
	addr, dir, _ := strings.Cut(rest, " ")
	src, err := mtls.OpenDir(dir+"/connector-c1", nil)
	if err != nil {
		panic(err)
	}
	gate := make(chan struct{}, 16)
	var wg sync.WaitGroup
	for i := range idleSessions {
		gate <- struct{}{}
		wg.Go(func() {
			c, err := Dial(context.Background(), DialConfig{Addr: addr, Carrier: Carrier(via), Identity: src, Handle: accept(echo),
				Registration: Registration{Instance: "i" + strconv.Itoa(i/256), Index: i % 256}})
			if <-gate; err != nil {
				panic(err)
			}
			c.Run(context.Background()) //nolint:errcheck // until killed
		})
	}
	wg.Wait()
}
