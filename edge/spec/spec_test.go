package spec

import (
	"encoding/json"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

func ptr(w float64) *float64 { return &w }

// fields returns the fields at fault.
func fields(errs []error) []string {
	var list []string
	for _, err := range errs {
		if f, ok := errors.AsType[*FieldError](err); ok {
			list = append(list, f.Field)
		} else {
			list = append(list, err.Error())
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func TestPoolFaults(t *testing.T) {
	good := Endpoint{Host: "10.0.0.1", Port: 80}
	for _, tt := range []struct {
		name string
		p    PoolConfig
		want string
	}{
		{"good", PoolConfig{Name: "p", Endpoints: []Endpoint{good, {VNet: "other", Host: "10.0.0.1", Port: 80}}}, ""},
		{"full", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Steering: SteerHash, Minimum: 1, ProxyProtocol: ProxyV2,
			Monitor:  &Monitor{Type: "https", Path: "/x?y", Expect: "200,301-302", Headers: map[string]string{"A": "b"}, Interval: Duration(time.Minute), Retries: 2},
			Affinity: &Affinity{Type: AffinityHeader, Name: "X-Id", TTL: Duration(time.Hour)}}, ""},
		{"members", PoolConfig{Name: "p", Members: []string{"q"}, PoolSteering: SteerLatency}, ""},
		{"empty", PoolConfig{}, "endpoints name"},
		{"name", PoolConfig{Name: "a b", Endpoints: []Endpoint{good}}, "name"},
		{"both", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Members: []string{"q"}}, "members"},
		{"twice", PoolConfig{Name: "p", Endpoints: []Endpoint{good, good}}, "endpoints[1].host"},
		{"names twice", PoolConfig{Name: "p", Endpoints: []Endpoint{{Name: "x", Host: "a", Port: 1}, {Name: "x", Host: "b", Port: 1}}}, "endpoints[1].name"},
		{"endpoint", PoolConfig{Name: "p", Endpoints: []Endpoint{{Host: "a b", Weight: ptr(2), HostHeader: "x/y"}}}, "endpoints[0].host endpoints[0].host_header endpoints[0].port endpoints[0].weight"},
		{"words", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Steering: "x", PoolSteering: "y", ProxyProtocol: "v3"}, "pool_steering proxy_protocol steering"},
		{"minimum", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Minimum: 2}, "minimum"},
		{"monitor", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Monitor: &Monitor{Type: "http", Path: "x", Method: "PATCH", Expect: "99", Interval: Duration(time.Millisecond), Timeout: Duration(time.Second), Retries: 9, Up: -1, Down: 1000, Headers: map[string]string{"A": "b\nc"}}},
			"monitor.down monitor.expect monitor.headers monitor.interval monitor.method monitor.path monitor.retries monitor.timeout monitor.up"},
		{"monitor more often than probes take by default", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Monitor: &Monitor{Type: "http", Interval: Duration(time.Second)}}, ""},
		{"monitor of tcp", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Monitor: &Monitor{Type: "tcp", Path: "/"}}, "monitor.type"},
		{"affinity", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Affinity: &Affinity{Type: "header", TTL: Duration(time.Second)}}, "affinity.name affinity.ttl"},
		{"cookie name", PoolConfig{Name: "p", Endpoints: []Endpoint{good}, Affinity: &Affinity{Type: "cookie", Name: "a;b"}}, "affinity.name"},
	} {
		if got := strings.Join(fields(tt.p.Validate()), " "); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestPortFaults(t *testing.T) {
	good := PortConfig{Name: "p", Protocol: "tcp", Listen: ":22", Host: "10.0.0.1", Port: 22}
	for _, tt := range []struct {
		name   string
		change func(*PortConfig)
		want   string
	}{
		{"good", func(*PortConfig) {}, ""},
		{"pool", func(p *PortConfig) { p.Host, p.Port, p.Pool = "", 0, "q" }, ""},
		{"tunnel", func(p *PortConfig) { p.Host, p.Port, p.Tunnel, p.Service = "", 0, "t", "db.test" }, ""},
		{"tunnel without service", func(p *PortConfig) { p.Host, p.Port, p.Tunnel = "", 0, "t" }, "service"},
		{"two targets", func(p *PortConfig) { p.Pool = "q" }, "host"},
		{"no target", func(p *PortConfig) { p.Host = "" }, "host"},
		{"udp v1", func(p *PortConfig) { p.Protocol, p.ProxyProtocol = "udp", "v1" }, "proxy_protocol"},
		{"udp ingress", func(p *PortConfig) {
			p.Protocol, p.Host, p.Port, p.Tunnel, p.Service = "udp", "", 0, "t", "s"
		}, ""},
		{"the tunnels' port", func(p *PortConfig) { p.Listen = ":7844" }, "listen"},
		{"words", func(p *PortConfig) {
			p.Protocol, p.Listen, p.Allow, p.IdleTimeout, p.MaxConnections = "sctp", "x", []string{"10.0.0.1"}, Duration(time.Millisecond), -1
		}, "allow[0] idle_timeout listen max_connections protocol"},
	} {
		p := good
		tt.change(&p)
		if got := strings.Join(fields(p.Validate()), " "); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}

func TestCheckPools(t *testing.T) {
	ends := []Endpoint{{Host: "a", Port: 1}}
	bad := CheckPools([]PoolConfig{
		{Name: "good", Endpoints: ends, Next: "other"},
		{Name: "other", Endpoints: ends},
		{Name: "good", Endpoints: ends},
		{Name: "lost", Endpoints: ends, Next: "nowhere"},
		{Name: "x", Members: []string{"good", "y"}},
		{Name: "y", Endpoints: ends, Next: "x"},
		{Name: "self", Endpoints: ends, Next: "self"},
		{Name: "leads to a circle", Members: []string{"x"}},
	})
	want := map[int]string{2: "name", 3: "next", 4: "members", 5: "members", 6: "members", 7: "name"}
	for i := range 8 {
		if got := strings.Join(fields(bad[i]), " "); got != want[i] {
			t.Errorf("pool %d: %q, want %q", i, got, want[i])
		}
	}
	if !strings.Contains(errors.Join(bad[4]...).Error(), "x → y → x") {
		t.Errorf("the circle is not shown: %v", bad[4])
	}
}

func TestJSON(t *testing.T) {
	in := `{"name":"p","endpoints":[{"vnet":"v","host":"10.0.0.1","port":80,"weight":0.5,"drain":true}],"monitor":{"type":"tcp","interval":"1m30s"},"affinity":{"type":"cookie","ttl":"1h0m0s"}}`
	var p PoolConfig
	if err := json.Unmarshal([]byte(in), &p); err != nil {
		t.Fatal(err)
	}
	if p.Monitor.Interval.D(0) != 90*time.Second || p.Monitor.Timeout.D(5) != 5 || p.Endpoints[0].Share() != 0.5 || (&Endpoint{}).Share() != 1 {
		t.Errorf("got %+v", p)
	}
	out, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != in {
		t.Errorf("got  %s\nwant %s", out, in)
	}
	if err := json.Unmarshal([]byte(`{"monitor":{"interval":"ten"}}`), &p); err == nil {
		t.Error("a word was taken for a duration")
	}
}

func TestCodes(t *testing.T) {
	c, err := ParseCodes("200, 301-302")
	if err != nil || !c.Has(200) || !c.Has(302) || c.Has(201) || c.Has(303) {
		t.Errorf("%v, %v", c, err)
	}
	if c, err := ParseCodes(""); err != nil || !c.Has(204) || c.Has(404) {
		t.Errorf("%v, %v", c, err)
	}
	for _, s := range []string{"x", "1-", "600", "300-200", "200,,201", "-"} {
		if _, err := ParseCodes(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}

// The texts come from whoever may use the admin API.
func FuzzPool(f *testing.F) {
	f.Add([]byte(`{"name":"p","endpoints":[{"host":"a","port":80}],"monitor":{"type":"http","expect":"200-399"}}`))
	f.Add([]byte(`{"name":"p","members":["p"],"next":"p"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p PoolConfig
		if json.Unmarshal(b, &p) != nil {
			return
		}
		if len(CheckPools([]PoolConfig{p})) > 0 {
			return
		}
		out, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var q PoolConfig
		if err := json.Unmarshal(out, &q); err != nil {
			t.Fatalf("a good pool cannot be read again: %v", err)
		}
	})
}

// The configuration's types are for everybody: they lean on nothing of the project.
func TestLeaf(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		if strings.Contains(dep, "keyhaven") && strings.TrimSpace(dep) != "github.com/keyhaven/keyhaven/edge/spec" {
			t.Errorf("edge/spec depends on %s", dep)
		}
	}
}
