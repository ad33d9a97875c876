package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/keyhaven/keyhaven/mtls"
	"github.com/keyhaven/keyhaven/tunnel"
)

const someRules = `{"ingress":[{"service":"hello_world"}]}`

func TestTunnelConfig(t *testing.T) {
	c := only(t)
	ctx := t.Context()
	site, err := c.AddTunnel(ctx, "site", "")
	must(t, err)
	v, err := c.TunnelConfig("site")
	if err != nil || v.Version != 0 || string(v.Body) != "{}" || v.TunnelName != "site" || len(v.Connectors) != 0 {
		t.Fatalf("before: got %+v, %v", v, err)
	}
	zero, one := uint64(0), uint64(1)
	for _, tt := range []struct {
		ref, body string
		version   *uint64
		err       error
		says      []string
		now       uint64
	}{
		{"", someRules, nil, ErrInvalid, nil, 0},
		{"other", someRules, nil, ErrNotFound, nil, 0},
		{"site", "ingress:\n  - service: ftp://a\n", nil, ErrInvalid, []string{"line 2", "ingress[0].service"}, 0},
		{"site", "ingress:\n  - service: unix:/a\n", nil, ErrInvalid, []string{"own file"}, 0},
		{"site", "allow: []", nil, ErrInvalid, []string{"allow", "unknown key"}, 0},
		{"site", strings.Repeat(" ", 300<<10) + someRules, nil, ErrInvalid, []string{"bytes"}, 0},
		{"site", someRules, &one, ErrStale, []string{"has version 0, not 1"}, 0},
		{"site", someRules, &zero, nil, nil, 1},
		{"site", "ingress: [{service: hello_world}]", nil, nil, nil, 1}, // the same in YAML
		{"site", "ingress: [{service: 'http_status:404'}]", &zero, ErrStale, []string{"has version 1, not 0"}, 1},
		{site.ID, "ingress: [{service: 'http_status:404'}]", &one, nil, nil, 2},
		{"site", "", nil, nil, nil, 3},
	} {
		v, err := c.SetTunnelConfig(ctx, tt.ref, []byte(tt.body), tt.version)
		if tt.err != nil {
			wantErr(t, err, tt.err, tt.says...)
		} else if err != nil || v.Version != tt.now {
			t.Errorf("%s: got version %d, %v, want %d", tt.body, v.Version, err, tt.now)
		}
		if now, err := c.TunnelConfig("site"); err != nil || now.Version != tt.now {
			t.Errorf("%.40s: version %d, %v, want %d", tt.body, now.Version, err, tt.now)
		}
	}
	// A tunnel of the same name begins anew.
	must(t, c.DeleteTunnel(ctx, "site", false))
	_, err = c.AddTunnel(ctx, "site", "")
	must(t, err)
	if v, err := c.TunnelConfig("site"); err != nil || v.Version != 0 {
		t.Errorf("after a deletion: got version %d, %v", v.Version, err)
	}
	if _, err := c.cfg.Store.Get(ctx, prefixConfig+site.ID); err == nil {
		t.Error("the record of a deleted tunnel is still there")
	}
}

// A taker is a connector's process that takes configurations, or refuses them.
type taker struct {
	mu     sync.Mutex
	refuse error
	took   []uint64
	body   string
}

func (k *taker) configure(_ context.Context, version uint64, body []byte) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.took, k.body = append(k.took, version), string(body)
	return k.refuse
}

func (k *taker) last() (n int, version uint64, body string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.took) == 0 {
		return 0, 0, ""
	}
	return len(k.took), k.took[len(k.took)-1], k.body
}

func (e *edge) takes(src *mtls.Source, instance string, index int, k *taker) *link {
	e.b.t.Helper()
	cfg := tunnel.DialConfig{Identity: src, Handle: saying("taker"),
		Registration: tunnel.Registration{Instance: instance, Index: index, Version: "1", Hostname: "host"}}
	if k != nil {
		cfg.OnConfig = k.configure
	}
	l, err := e.dialWith(cfg)
	must(e.b.t, err)
	return l
}

func TestConfigIsPushed(t *testing.T) {
	b := newBed(t)
	e := b.edge()
	ctx := t.Context()
	_, err := e.AddTunnel(ctx, "site", "")
	must(t, err)
	_, err = e.SetTunnelConfig(ctx, "site", []byte(someRules), nil)
	must(t, err)
	a, refuses := &taker{}, &taker{refuse: errors.New("not here")}
	srcA, srcB, srcC := e.enrol("site", "a"), e.enrol("site", "b"), e.enrol("site", "c")
	first := e.takes(srcA, "i1", 0, a)
	e.takes(srcA, "i1", 1, a)
	e.takes(srcB, "i2", 0, refuses)
	e.takes(srcC, "i3", 0, nil)
	state := func(name string) ConnectorConfig {
		v, err := e.TunnelConfig("site")
		must(t, err)
		for _, k := range v.Connectors {
			if k.Connector == name {
				return k.ConnectorConfig
			}
		}
		return ConnectorConfig{}
	}
	eventually(t, "a has version 1", func() bool { return state("a").Applied == 1 })
	eventually(t, "b has refused", func() bool { return state("b").Refused == 1 })
	eventually(t, "c cannot", func() bool { return state("c").Refused == 1 })
	if s := state("b"); s.Error != "not here" || s.Applied != 0 {
		t.Errorf("b: got %+v", s)
	}
	if s := state("c"); !strings.Contains(s.Error, "takes no configuration") {
		t.Errorf("c: got %+v", s)
	}
	if n, _, body := a.last(); n != 1 || body != someRules {
		t.Errorf("a was told %d times, %s; want once for its two sessions", n, body)
	}
	first.cut() // the other session does as well
	_, err = e.SetTunnelConfig(ctx, "site", []byte(`{"ingress":[{"service":"http_status:404"}]}`), nil)
	must(t, err)
	eventually(t, "a has version 2", func() bool { return state("a") == ConnectorConfig{Applied: 2} })
	eventually(t, "b has refused again", func() bool { return state("b").Refused == 2 })
	refuses.mu.Lock()
	refuses.refuse = nil
	refuses.mu.Unlock()
	_, err = e.SetTunnelConfig(ctx, "site", nil, nil)
	must(t, err)
	eventually(t, "b has version 3", func() bool { return state("b") == ConnectorConfig{Applied: 3} })
	if _, version, body := refuses.last(); version != 3 || body != "{}" {
		t.Errorf("b: got version %d, %s", version, body)
	}
	// A new process of a is told at once.
	fresh := &taker{}
	e.takes(srcA, "i4", 0, fresh)
	eventually(t, "the new process has version 3", func() bool { _, v, _ := fresh.last(); return v == 3 })
	views, err := e.Connectors("site")
	must(t, err)
	for _, v := range views {
		if v.Config == nil {
			t.Errorf("%s: the view shows no configuration", v.Name)
		}
	}
}

// Many changes end with everybody at the last.
func TestConfigsSettle(t *testing.T) {
	b := newBed(t)
	e := b.edge()
	ctx := t.Context()
	_, err := e.AddTunnel(ctx, "site", "")
	must(t, err)
	var ks []*taker
	for i := range 4 {
		k := &taker{}
		ks = append(ks, k)
		e.takes(e.enrol("site", fmt.Sprintf("c%d", i)), fmt.Sprintf("i%d", i), 0, k)
	}
	for i := range 20 {
		_, err := e.SetTunnelConfig(ctx, "site", fmt.Appendf(nil, `{"ingress":[{"service":"http_status:%d"}]}`, 200+i), nil)
		must(t, err)
	}
	for i, k := range ks {
		eventually(t, fmt.Sprintf("connector %d has the last", i), func() bool { _, v, body := k.last(); return v == 20 && strings.Contains(body, "219") })
	}
}

// A configuration that changes after somebody has looked what to tell a process, and before they say that this is done, is
// told too.
func TestConfigThatChangesMeanwhile(t *testing.T) {
	e := newBed(t).edge()
	_, err := e.AddTunnel(t.Context(), "site", "")
	must(t, err)
	e.takes(e.enrol("site", "c"), "i", 0, &taker{})
	k := e.reg.all()[0].processKey()
	state := func() told {
		e.configs.mu.Lock()
		defer e.configs.mu.Unlock()
		if p := e.configs.procs[k.connector][k]; p != nil {
			return *p
		}
		return told{}
	}
	set := func(service string) {
		t.Helper()
		_, err := e.SetTunnelConfig(t.Context(), "site", []byte(`{"ingress":[{"service":"`+service+`"}]}`), nil)
		must(t, err)
	}
	set("http_status:404")
	eventually(t, "the first is told", func() bool { s := state(); return s.Applied == 1 && !s.busy })
	e.configs.mu.Lock()
	p := e.configs.procs[k.connector][k]
	p.busy = true // somebody has looked and wants the first
	e.configs.mu.Unlock()
	set("http_status:405")
	eventually(t, "they are to look again", func() bool { return state().again })
	e.configs.mu.Lock()
	over, done := p.over(true, false), p.over(true, false)
	p.busy = true
	e.configs.mu.Unlock()
	if over || !done {
		t.Errorf("with a round meanwhile: over %v; looked again: over %v", over, done)
	}
	e.pushConfig(t.Context(), k)
	if s := state(); s.Applied != 2 || s.busy || s.again {
		t.Errorf("got %+v, want the second told", s)
	}
}
