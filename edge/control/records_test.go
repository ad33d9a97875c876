package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/state"
)

func TestFirstStart(t *testing.T) {
	c := only(t)
	list := c.VNets()
	if len(list) != 1 || list[0].Name != "default" || !list[0].Default {
		t.Fatalf("networks at first start: %+v, want one, named default, the default", list)
	}
	if list[0].ID != "default" {
		t.Errorf("id %q, want the one that connectors know", list[0].ID)
	}
	// The id is not used again, not even for a network of the same name.
	_, err := c.AddVNet(t.Context(), "red", "", true)
	must(t, err)
	must(t, c.DeleteVNet(t.Context(), "default", false))
	v, err := c.AddVNet(t.Context(), "default", "", false)
	must(t, err)
	if !strings.HasPrefix(string(v.ID), "vn_") {
		t.Errorf("a later network has the id %q, want a random one", v.ID)
	}
}

func TestOneDefaultAlways(t *testing.T) {
	c, ctx := only(t), t.Context()
	defaults := func() (names []string) {
		for _, v := range c.VNets() {
			if v.Default {
				names = append(names, v.Name)
			}
		}
		return names
	}
	_, err := c.AddVNet(ctx, "red", "", true)
	must(t, err)
	if got := defaults(); len(got) != 1 || got[0] != "red" {
		t.Errorf("after adding red as default: default is %v, want red alone", got)
	}
	_, err = c.SetVNet(ctx, "default", VNetChange{Default: true})
	must(t, err)
	if got := defaults(); len(got) != 1 || got[0] != "default" {
		t.Errorf("after moving it back: default is %v", got)
	}
	wantErr(t, c.DeleteVNet(ctx, "default", true), ErrDefaultVNet, "vnet set NAME --default")
	must(t, c.DeleteVNet(ctx, "red", false))
	if d, err := c.VNet(""); err != nil || d.Name != "default" {
		t.Errorf(`VNet("") = %q, %v, want the default network`, d.Name, err)
	}
}

func TestNames(t *testing.T) {
	c, ctx := only(t), t.Context()
	for _, bad := range []string{"", "A", "-a", "a-", "a.b", "a_b", "a b", "ü", "a/b", strings.Repeat("a", 64), "a\n"} {
		if _, err := c.AddVNet(ctx, bad, "", false); !errors.Is(err, ErrInvalid) {
			t.Errorf("AddVNet(%q): %v, want ErrInvalid", bad, err)
		}
		if _, err := c.AddTunnel(ctx, bad, ""); !errors.Is(err, ErrInvalid) {
			t.Errorf("AddTunnel(%q): %v, want ErrInvalid", bad, err)
		}
	}
	for _, good := range []string{"a", "0", "a-b", strings.Repeat("a", 63)} {
		if _, err := c.AddVNet(ctx, good, "", false); err != nil {
			t.Errorf("AddVNet(%q): %v", good, err)
		}
	}
	_, err := c.AddVNet(ctx, "a", "", false)
	wantErr(t, err, ErrExists, `"a"`)
	_, err = c.AddTunnel(ctx, "t", "two\nlines")
	wantErr(t, err, ErrInvalid, "comment")
	_, err = c.AddTunnel(ctx, "t", strings.Repeat("x", 257))
	wantErr(t, err, ErrInvalid, "comment")
	tn, err := c.AddTunnel(ctx, "t", "fine")
	must(t, err)
	if d, err := c.Tunnel(tn.ID); err != nil || d.Name != "t" {
		t.Errorf("Tunnel by id: %+v, %v", d, err)
	}
	if d, err := c.Tunnel("nope"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Tunnel(nope) = %+v, %v, want ErrNotFound", d, err)
	}
}

func TestRoutes(t *testing.T) {
	c, ctx := only(t), t.Context()
	for _, n := range []string{"plant", "office"} {
		_, err := c.AddTunnel(ctx, n, "")
		must(t, err)
	}
	_, err := c.AddVNet(ctx, "red", "", false)
	must(t, err)
	add := func(s RouteSpec) error { _, err := c.AddRoute(ctx, s); return err }
	tests := []struct {
		name string
		spec RouteSpec
		want error
		says string
	}{
		{"prefix", RouteSpec{Prefix: "10.0.0.0/8", Tunnel: "plant", Comment: "hall"}, nil, ""},
		{"same prefix again", RouteSpec{Prefix: "10.0.0.0/8", Tunnel: "office"}, ErrExists, `10.0.0.0/8 to tunnel "plant" (hall)`},
		{"same prefix, mapped form", RouteSpec{Prefix: "::ffff:10.0.0.0/104", Tunnel: "office"}, ErrExists, "plant"},
		{"same prefix elsewhere", RouteSpec{VNet: "red", Prefix: "10.0.0.0/8", Tunnel: "office"}, nil, ""},
		{"nested prefix", RouteSpec{Prefix: "10.1.0.0/16", Tunnel: "office"}, nil, ""},
		{"address", RouteSpec{Prefix: "10.1.2.3", Tunnel: "plant"}, nil, ""},
		{"IPv6", RouteSpec{Prefix: "fd00::/8", Tunnel: "plant"}, nil, ""},
		{"everything", RouteSpec{VNet: "red", Prefix: "0.0.0.0/0", Tunnel: "plant"}, nil, ""},
		{"host", RouteSpec{Host: "DB.Corp.Example.", Tunnel: "plant"}, nil, ""},
		{"same host again", RouteSpec{Host: "db.corp.example", Tunnel: "plant"}, ErrExists, "db.corp.example"},
		{"wildcard", RouteSpec{Host: "*.corp.example", Tunnel: "office"}, nil, ""},
		{"bits beyond", RouteSpec{Prefix: "10.0.0.1/8", Tunnel: "plant"}, ErrInvalid, "10.0.0.0/8"},
		{"nonsense", RouteSpec{Prefix: "ten/8", Tunnel: "plant"}, ErrInvalid, "ten/8"},
		{"zone", RouteSpec{Prefix: "fe80::1%eth0", Tunnel: "plant"}, ErrInvalid, "zone"},
		{"neither", RouteSpec{Tunnel: "plant"}, ErrInvalid, "either"},
		{"both", RouteSpec{Prefix: "10.9.0.0/16", Host: "x.example", Tunnel: "plant"}, ErrInvalid, "either"},
		{"bad host", RouteSpec{Host: "a..b", Tunnel: "plant"}, ErrInvalid, "a..b"},
		{"address as host", RouteSpec{Host: "10.0.0.1", Tunnel: "plant"}, ErrInvalid, "prefix"},
		{"no tunnel", RouteSpec{Prefix: "10.9.0.0/16"}, ErrInvalid, "tunnel"},
		{"unknown tunnel", RouteSpec{Prefix: "10.9.0.0/16", Tunnel: "nope"}, ErrNotFound, "nope"},
		{"unknown network", RouteSpec{VNet: "nope", Prefix: "10.9.0.0/16", Tunnel: "plant"}, ErrNotFound, "nope"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := add(tt.spec)
			if tt.want == nil {
				must(t, err)
				return
			}
			wantErr(t, err, tt.want, tt.says)
		})
	}
	all, err := c.Routes("")
	must(t, err)
	var got []string
	for _, r := range all {
		got = append(got, r.VNetName+" "+r.Target()+" "+r.TunnelName)
	}
	want := []string{"default 10.0.0.0/8 plant", "default 10.1.0.0/16 office", "default 10.1.2.3/32 plant", "default fd00::/8 plant",
		"default *.corp.example office", "default db.corp.example plant", "red 0.0.0.0/0 plant", "red 10.0.0.0/8 office"}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("routes:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	testFindHost(t, c)

	_, err = c.DeleteRoute(ctx, RouteSpec{VNet: "red", Prefix: "10.1.0.0/16"})
	wantErr(t, err, ErrNotFound, "red", "10.1.0.0/16")
	_, err = c.DeleteRoute(ctx, RouteSpec{Prefix: "10.1.0.0/16"})
	must(t, err)
	if a, err := c.FindHost("10.1.9.9", ""); err != nil || a.Chosen == nil || a.Chosen.Prefix != "10.0.0.0/8" {
		t.Errorf("after deleting the nested prefix: %+v, %v, want 10.0.0.0/8", a.Chosen, err)
	}
}

func testFindHost(t *testing.T, c *Control) {
	join := func(vs []RouteView) string {
		var s []string
		for _, v := range vs {
			s = append(s, v.VNetName+":"+v.Target()+">"+v.TunnelName)
		}
		return strings.Join(s, " ")
	}
	tests := []struct{ host, network, chosen, everywhere, overlaps string }{
		{"10.1.2.3", "", "10.1.2.3/32>plant", "default:10.1.2.3/32>plant red:10.0.0.0/8>office",
			"default:10.0.0.0/8>plant default:10.1.0.0/16>office red:0.0.0.0/0>plant red:10.0.0.0/8>office"},
		{"10.1.2.3", "red", "10.0.0.0/8>office", "default:10.1.2.3/32>plant red:10.0.0.0/8>office",
			"default:10.0.0.0/8>plant default:10.1.0.0/16>office default:10.1.2.3/32>plant red:0.0.0.0/0>plant"},
		{"192.168.0.1", "", "", "red:0.0.0.0/0>plant", "red:0.0.0.0/0>plant"},
		{"10.1.128.0/17", "", "10.1.0.0/16>office", "default:10.1.0.0/16>office red:10.0.0.0/8>office",
			"default:10.0.0.0/8>plant red:0.0.0.0/0>plant red:10.0.0.0/8>office"},
		{"10.1.0.0/16", "", "10.1.0.0/16>office", "default:10.1.0.0/16>office red:10.0.0.0/8>office",
			"default:10.0.0.0/8>plant default:10.1.2.3/32>plant red:0.0.0.0/0>plant red:10.0.0.0/8>office"},
		{"db.corp.example", "", "db.corp.example>plant", "default:db.corp.example>plant", ""},
		{"WEB.corp.example.", "", "*.corp.example>office", "default:*.corp.example>office", ""},
		{"web.corp.example", "red", "", "default:*.corp.example>office", ""},
	}
	for _, tt := range tests {
		t.Run(tt.host+" in "+tt.network, func(t *testing.T) {
			a, err := c.FindHost(tt.host, tt.network)
			must(t, err)
			chosen := ""
			if a.Chosen != nil {
				chosen = a.Chosen.Target() + ">" + a.Chosen.TunnelName
			}
			if chosen != tt.chosen {
				t.Errorf("chosen %q, want %q", chosen, tt.chosen)
			}
			if tt.everywhere != "" || len(a.Everywhere) > 0 {
				if got := join(a.Everywhere); got != tt.everywhere {
					t.Errorf("everywhere %q, want %q", got, tt.everywhere)
				}
			}
			if got := join(a.Overlaps); got != tt.overlaps {
				t.Errorf("overlaps %q, want %q", got, tt.overlaps)
			}
		})
	}
	for _, bad := range []string{"", "10.0.0.1/8", "a..b"} {
		if _, err := c.FindHost(bad, ""); !errors.Is(err, ErrInvalid) {
			t.Errorf("FindHost(%q): %v, want ErrInvalid", bad, err)
		}
	}
}

func TestInUse(t *testing.T) {
	c, ctx := only(t), t.Context()
	_, err := c.AddTunnel(ctx, "plant", "")
	must(t, err)
	_, err = c.AddVNet(ctx, "red", "", false)
	must(t, err)
	_, err = c.AddRoute(ctx, RouteSpec{VNet: "red", Prefix: "10.0.0.0/8", Tunnel: "plant", Comment: "hall"})
	must(t, err)
	_, err = c.CreateToken(ctx, "plant", 0)
	must(t, err)

	wantErr(t, c.DeleteVNet(ctx, "red", false), ErrInUse, "10.0.0.0/8", "plant", "hall", "--force")
	err = c.DeleteTunnel(ctx, "plant", false)
	wantErr(t, err, ErrInUse, `"red"`, "1 join token", "--force")
	if e, ok := errors.AsType[*Error](err); !ok || len(e.Users) != 2 {
		t.Errorf("users %v, want the route and the token", e)
	}

	c.SetLocal(Local{Users: func(thing Thing, name, _ string) []string {
		if thing == ThingVNet && name == "red" || thing == ThingTunnel && name == "plant" {
			return []string{`zone "www" of the configuration file`}
		}
		return nil
	}})
	wantErr(t, c.DeleteVNet(ctx, "red", true), ErrInUse, `zone "www" of the configuration`, "does not override")
	wantErr(t, c.DeleteTunnel(ctx, "plant", true), ErrInUse, `zone "www" of the configuration`, "does not override")
	c.SetLocal(Local{})

	must(t, c.DeleteVNet(ctx, "red", true))
	if rs, _ := c.Routes(""); len(rs) != 0 {
		t.Errorf("routes after a forced deletion: %v", rs)
	}
	must(t, c.DeleteTunnel(ctx, "plant", true))
	if _, err := c.CreateToken(ctx, "plant", 0); !errors.Is(err, ErrNotFound) {
		t.Errorf("token for a deleted tunnel: %v", err)
	}
}

// More users than one transaction can delete.
func TestDeleteMany(t *testing.T) {
	c, ctx := only(t), t.Context()
	_, err := c.AddTunnel(ctx, "plant", "")
	must(t, err)
	for i := range maxOps*2 + 7 {
		_, err := c.AddRoute(ctx, RouteSpec{Prefix: fmt.Sprintf("10.%d.%d.0/24", i/256, i%256), Tunnel: "plant"})
		must(t, err)
	}
	err = c.DeleteTunnel(ctx, "plant", false)
	wantErr(t, err, ErrInUse, "more")
	must(t, c.DeleteTunnel(ctx, "plant", true))
	if s := c.Status(); s.Routes != 0 || len(s.Tunnels) != 0 {
		t.Errorf("left over: %+v", s)
	}
	if _, ok := c.model.table.Load().LookupHost("x", "y"); ok || c.model.table.Load().Len() != 0 {
		t.Errorf("the table has %d routes, want none", c.model.table.Load().Len())
	}
}

// Two edges over one store: each sees what the other does, and checks hold across both.
func TestTwoEdgesOneStore(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	one, two := b.control(s), b.control(s)
	defer s.Close()
	defer one.Close()
	defer two.Close()
	ctx := t.Context()
	_, err := one.AddTunnel(ctx, "plant", "")
	must(t, err)
	_, err = two.AddRoute(ctx, RouteSpec{Prefix: "10.0.0.0/8", Tunnel: "plant"})
	must(t, err) // two knows the tunnel although it was made at one
	wantErr(t, one.DeleteTunnel(ctx, "plant", false), ErrInUse)

	// Both add the same prefixes at once: each prefix has one winner.
	const n = 20
	var wins, losses int
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		for _, c := range []*Control{one, two} {
			wg.Go(func() {
				_, err := c.AddRoute(ctx, RouteSpec{Prefix: fmt.Sprintf("10.%d.0.0/16", i), Tunnel: "plant"})
				mu.Lock()
				defer mu.Unlock()
				switch {
				case err == nil:
					wins++
				case errors.Is(err, ErrExists):
					losses++
				default:
					t.Errorf("AddRoute: %v", err)
				}
			})
		}
	}
	wg.Wait()
	if wins != n || losses != n {
		t.Errorf("%d won and %d lost, want %d each", wins, losses, n)
	}
	must(t, one.await(ctx, generation(t, s)))
	must(t, two.await(ctx, generation(t, s)))
	r1, _ := one.Routes("")
	r2, _ := two.Routes("")
	if len(r1) != n+1 || len(r2) != n+1 {
		t.Errorf("the edges see %d and %d routes, want %d", len(r1), len(r2), n+1)
	}
}

func generation(t *testing.T, s state.Store) state.Revision {
	e, err := s.Get(t.Context(), keyGeneration)
	must(t, err)
	return e.Revision
}

func TestRestartKeepsRecords(t *testing.T) {
	b := newBed(t)
	ctx := t.Context()
	s := b.openStore()
	c := b.control(s)
	_, err := c.AddTunnel(ctx, "plant", "")
	must(t, err)
	_, err = c.AddVNet(ctx, "red", "", true)
	must(t, err)
	_, err = c.AddRoute(ctx, RouteSpec{Prefix: "10.0.0.0/8", Tunnel: "plant"})
	must(t, err)
	before := fmt.Sprint(c.VNets(), c.Tunnels())
	must(t, c.Close())
	must(t, s.Close())

	s = b.openStore()
	c = b.control(s)
	defer s.Close()
	defer c.Close()
	if after := fmt.Sprint(c.VNets(), c.Tunnels()); after != before {
		t.Errorf("after a restart:\n%s\nbefore:\n%s", after, before)
	}
	if a, err := c.FindHost("10.1.1.1", ""); err != nil || a.Chosen == nil || a.Chosen.VNetName != "red" {
		t.Errorf("route after a restart: %+v, %v", a.Chosen, err)
	}
}

func TestOpenRefusesWhatItCannotRead(t *testing.T) {
	for name, ops := range map[string][]state.Op{
		"other schema":   {state.Put(keyGeneration, []byte(`{"schema":2}`))},
		"broken record":  {state.Put(keyGeneration, []byte(schema)), state.Put(prefixVNet+"vn_x", []byte(`{"id":`))},
		"foreign route":  {state.Put(keyGeneration, []byte(schema)), state.Put(prefixRoute+"a/prefix/10.0.0.0/8", []byte(`{"vnet":"b","prefix":"10.0.0.0/8","tunnel":"t"}`))},
		"broken prefix":  {state.Put(keyGeneration, []byte(schema)), state.Put(prefixRoute+"a/prefix/10", []byte(`{"vnet":"a","prefix":"10","tunnel":"t"}`))},
		"host not canon": {state.Put(keyGeneration, []byte(schema)), state.Put(prefixRoute+"a/host/A..b", []byte(`{"vnet":"a","host":"A..b","tunnel":"t"}`))},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			s := b.openStore()
			defer s.Close()
			_, err := s.Txn(t.Context(), nil, ops)
			must(t, err)
			c, err := Open(t.Context(), Config{Store: s, Authority: b.authority})
			if err == nil {
				c.Close()
				t.Fatal("Open succeeded")
			}
		})
	}
}

// What cannot be read while running is left out, and the rest goes on.
func TestBrokenRecordWhileRunning(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	c := b.control(s)
	defer s.Close()
	defer c.Close()
	ctx := t.Context()
	tn, err := c.AddTunnel(ctx, "plant", "")
	must(t, err)
	rev, err := s.Txn(ctx, nil, []state.Op{state.Put(prefixTunnel+tn.ID, []byte("{")), state.Put(keyGeneration, []byte(schema))})
	must(t, err)
	must(t, c.await(ctx, rev))
	if list := c.Tunnels(); len(list) != 0 {
		t.Errorf("a broken record is shown: %+v", list)
	}
	_, err = c.AddTunnel(ctx, "office", "")
	must(t, err)
}

func TestTokenBounds(t *testing.T) {
	b := newBed(t)
	s := b.openStore()
	defer s.Close()
	c, err := Open(t.Context(), Config{Store: s, Authority: b.authority})
	must(t, err)
	defer c.Close()
	_, err = c.AddTunnel(t.Context(), "plant", "")
	must(t, err)
	_, err = c.CreateToken(t.Context(), "plant", 0)
	wantErr(t, err, ErrInvalid, "advertise")
	c.cfg.Edges = []string{"edge.test:7844"}
	_, err = c.CreateToken(t.Context(), "plant", MaxTokenTTL+1)
	wantErr(t, err, ErrInvalid, "cannot live")

	g, err := c.CreateToken(t.Context(), "plant", 0)
	must(t, err)
	tok, err := mtls.ParseJoinToken(g.Token)
	must(t, err)
	// The secret is not in the store, under any key.
	entries, _, err := s.List(t.Context(), "")
	must(t, err)
	for _, e := range entries {
		if strings.Contains(string(e.Value), string(tok.Secret.Reveal())) || strings.Contains(string(e.Value), g.Token) {
			t.Errorf("key %q holds the token's secret", e.Key)
		}
	}
}

func TestChangeEndsWithItsContext(t *testing.T) {
	c := only(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.AddTunnel(ctx, "plant", ""); !errors.Is(err, context.Canceled) {
		t.Errorf("AddTunnel with an ended context: %v", err)
	}
}
