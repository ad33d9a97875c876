package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/vnet"
)

// routes measures look-ups in tables of distinct random routes over 16 networks, for an address inside each route in an
// order that no cache foresees, as an edge does for each flow, and what a table takes beside the routes' own texts.
func (b *bench) routes(ctx context.Context) error {
	runtime.LockOSThread() // whose processor time counts, not what others take of the machine
	defer runtime.UnlockOSThread()
	type question struct {
		addr netip.Addr
		in   vnet.ID
	}
	for _, family := range []string{"IPv4", "IPv6"} {
		for n := 1000; n <= 1_000_000; n *= 10 {
			list := randomRoutes(n, family == "IPv4")
			asked := make([]question, n)
			for i, r := range list {
				asked[i] = question{r.Prefix.Addr(), r.VNet}
			}
			rand.Shuffle(n, func(i, j int) { asked[i], asked[j] = asked[j], asked[i] })
			before := heapInUse()
			table, err := vnet.Build(list)
			if err != nil {
				return err
			}
			size := float64(heapInUse()-before) / float64(n)
			runtime.KeepAlive(list)
			var runs []sample
			for range b.rounds {
				count, began := 0, threadTime()
				for threadTime()-began < b.window/2 && ctx.Err() == nil {
					for range 1000 {
						q := &asked[count%n]
						if _, ok := table.LookupTunnel(q.in, q.addr); !ok {
							return fmt.Errorf("no route for %v in %s", q.addr, q.in)
						}
						count++
					}
				}
				runs = append(runs, sample{ops: count, elapsed: threadTime() - began})
			}
			each := 1e9 / median(runs).rate()
			b.report.rows = append(b.report.rows,
				row{Group: "route table", Key: family, Case: "look-up", Callers: n, Rate: each, Unit: "ns"},
				row{Group: "route table", Key: family, Case: "memory of a route", Callers: n, Rate: size, Unit: "bytes"})
			if n == 1_000_000 {
				b.report.atMost(fmt.Sprintf("route table, %s, %d routes: look-up / 200 ns", family, n), each, 200, 1)
			}
		}
	}
	return ctx.Err()
}

// randomRoutes returns prefixes of 16 to 32 bits, or of 32 to 128 bits in fd00::/8.
func randomRoutes(n int, four bool) []vnet.Route {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	names := make([]vnet.ID, 16)
	for i := range names {
		names[i] = vnet.ID(fmt.Sprintf("vnet-%02d", i))
	}
	type id struct {
		in vnet.ID
		p  netip.Prefix
	}
	seen := make(map[id]bool, n)
	list := make([]vnet.Route, 0, n)
	for len(list) < n {
		var b [16]byte
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		b[0] = 0xfd
		p := netip.PrefixFrom(netip.AddrFrom16(b), 32+rng.IntN(97)).Masked()
		if four {
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte(b[1:5])), 16+rng.IntN(17)).Masked()
		}
		if k := (id{names[rng.IntN(len(names))], p}); !seen[k] {
			seen[k] = true
			list = append(list, vnet.Route{VNet: k.in, Prefix: p, Tunnel: fmt.Sprintf("tunnel-%04d", rng.IntN(5000))})
		}
	}
	return list
}

func heapInUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// threadTime is the processor time of the calling thread.
func threadTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err) // every Linux has this clock
	}
	return time.Duration(ts.Nano())
}
