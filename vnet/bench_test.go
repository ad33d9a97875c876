package vnet

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"slices"
	"testing"
)

// benchRoutes returns n distinct routes spread over 16 networks: IPv4 prefixes of 16 to 32 bits and IPv6 prefixes of
// 32 to 128 bits in fd00::/8, three to one.
func benchRoutes(n int) []Route {
	rng := rand.New(rand.NewPCG(1, uint64(n)))
	type id struct {
		v ID
		p netip.Prefix
	}
	seen := make(map[id]bool, n)
	routes := make([]Route, 0, n)
	vnets := make([]ID, 16) // whoever asks has few identifiers too, not a text of its own for each question
	for i := range vnets {
		vnets[i] = ID(fmt.Sprintf("vnet-%02d", i))
	}
	for len(routes) < n {
		var p netip.Prefix
		if len(routes)%4 != 3 {
			a := rng.Uint32()
			p = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(a >> 16), byte(a >> 8), byte(a)}), 16+rng.IntN(17)).Masked()
			if n > 100_000 { // 10.0.0.0/8 alone would soon be full
				p = netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(a >> 24), byte(a >> 16), byte(a >> 8), byte(a)}), 16+rng.IntN(17)).Masked()
			}
		} else {
			var b [16]byte
			for i := range b {
				b[i] = byte(rng.Uint32())
			}
			b[0] = 0xfd
			p = netip.PrefixFrom(netip.AddrFrom16(b), 32+rng.IntN(97)).Masked()
		}
		k := id{vnets[rng.IntN(len(vnets))], p}
		if seen[k] {
			continue
		}
		seen[k] = true
		routes = append(routes, Route{VNet: k.v, Prefix: p, Tunnel: fmt.Sprintf("tunnel-%04d", rng.IntN(5000))})
	}
	return routes
}

var sizes = []int{1_000, 10_000, 100_000, 1_000_000}

func name(n int) string { return fmt.Sprintf("routes=%d", n) }

// A question is what a look-up is given. It is kept small, so that reading the questions disturbs the caches little.
type question struct {
	addr netip.Addr
	vnet ID
}

// questions asks for an address inside each route, in an order that no cache foresees.
func questions(routes []Route) []question {
	asked := make([]question, len(routes))
	for i, r := range routes {
		asked[i] = question{r.Prefix.Addr(), r.VNet}
	}
	rand.Shuffle(len(asked), func(i, j int) { asked[i], asked[j] = asked[j], asked[i] })
	return asked
}

// benchLookup asks table all questions in turn, and reports what the table weighs beside the routes' own texts.
func benchLookup(b *testing.B, routes []Route) {
	asked := questions(routes)
	before := heap()
	table := mustBuild(b, routes...)
	perRoute := float64(heap()-before) / float64(len(routes))
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		q := &asked[i]
		if _, ok := table.LookupTunnel(q.vnet, q.addr); !ok {
			b.Fatalf("no route for %v", q)
		}
		if i++; i == len(asked) {
			i = 0
		}
	}
	runtime.KeepAlive(routes) // or its texts would count as given back
	b.ReportMetric(perRoute, "B/route")
}

func BenchmarkLookup(b *testing.B) {
	for _, family := range []string{"IPv4", "IPv6", "both"} {
		for _, n := range sizes {
			b.Run(family+"/"+name(n), func(b *testing.B) { benchLookup(b, benchFamily(family, n)) })
		}
	}
}

// benchFamily returns n routes of one family, or of both.
func benchFamily(family string, n int) []Route {
	if family == "both" {
		return benchRoutes(n)
	}
	routes := slices.DeleteFunc(benchRoutes(n*5), func(r Route) bool { return r.Prefix.Addr().Is4() != (family == "IPv4") })
	return slices.Clone(routes[:n])
}

// BenchmarkLookupCommented gives each route a comment of its own, whose place is one more that a look-up fetches.
func BenchmarkLookupCommented(b *testing.B) {
	for _, n := range sizes {
		b.Run(name(n), func(b *testing.B) {
			routes := benchRoutes(n)
			for i := range routes {
				routes[i].Comment = fmt.Sprintf("comment %07d", i)
			}
			benchLookup(b, routes)
		})
	}
}

// BenchmarkLookupHot asks a table of a million routes for a thousand destinations only, as visitors do: what a look-up
// costs when the memory it touches is in a cache. The difference to BenchmarkLookup is the machine's memory.
func BenchmarkLookupHot(b *testing.B) {
	routes := benchRoutes(1_000_000)
	table := mustBuild(b, routes...)
	hot := questions(routes)[:1000]
	b.ReportAllocs()
	i := 0
	for b.Loop() {
		if _, ok := table.Lookup(hot[i].vnet, hot[i].addr); !ok {
			b.Fatalf("no route for %v", hot[i])
		}
		if i++; i == len(hot) {
			i = 0
		}
	}
}

// BenchmarkLookupParallel shows that look-ups do not hinder one another.
func BenchmarkLookupParallel(b *testing.B) {
	routes := benchRoutes(1_000_000)
	asked, table := questions(routes), mustBuild(b, routes...)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for i := rand.IntN(len(asked)); pb.Next(); i = (i + 1) % len(asked) {
			if _, ok := table.Lookup(asked[i].vnet, asked[i].addr); !ok {
				b.Errorf("no route for %v", asked[i])
			}
		}
	})
}

// BenchmarkChange takes one route out and puts it back: two changes an iteration.
func BenchmarkChange(b *testing.B) {
	for _, n := range sizes {
		b.Run(name(n), func(b *testing.B) {
			routes := benchRoutes(n)
			table := mustBuild(b, routes...)
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				var err error
				if table, err = table.Without(routes[i]); err != nil {
					b.Fatal(err)
				}
				if table, err = table.With(routes[i]); err != nil {
					b.Fatal(err)
				}
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}

func BenchmarkLookupHost(b *testing.B) {
	for _, n := range sizes {
		b.Run(name(n), func(b *testing.B) {
			routes := make([]Route, n)
			hosts := make([]string, n)
			for i := range routes {
				hosts[i] = fmt.Sprintf("host-%07d.site-%03d.corp.example", i, i%1000)
				routes[i] = Route{VNet: "default", Host: hosts[i], Tunnel: "t"}
				if i%4 == 0 {
					routes[i].Host = "*." + hosts[i]
					hosts[i] = "www." + hosts[i]
				}
			}
			table := mustBuild(b, routes...)
			rand.Shuffle(n, func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
			b.ReportAllocs()
			i := 0
			for b.Loop() {
				if _, ok := table.LookupHost("default", hosts[i]); !ok {
					b.Fatalf("no route for %s", hosts[i])
				}
				if i++; i == n {
					i = 0
				}
			}
		})
	}
}

// BenchmarkWho asks all networks at once.
func BenchmarkWho(b *testing.B) {
	routes := benchRoutes(100_000)
	table := mustBuild(b, routes...)
	i := 0
	for b.Loop() {
		table.Who(routes[i%len(routes)].Prefix.Addr())
		i++
	}
}

// BenchmarkBuild makes the table that an edge makes at its start.
func BenchmarkBuild(b *testing.B) {
	for _, n := range sizes {
		b.Run(name(n), func(b *testing.B) {
			routes := benchRoutes(n)
			for b.Loop() {
				mustBuild(b, routes...)
			}
		})
	}
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
