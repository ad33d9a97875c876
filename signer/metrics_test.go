package signer

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/keyhaven/keyhaven/keyless"
)

// series returns the value of each series, named "name label=value …" without the namespace; of histograms, the count.
func series(t testing.TB, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "keyhaven_signer_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetName() + "=" + l.GetValue()
			}
			got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return got
}

// TestMetricsAreBounded has strangers ask for whatever they like: that makes no series.
func TestMetricsAreBounded(t *testing.T) {
	reg, keys := prometheus.NewRegistry(), testRegistry(t, false)
	s := NewService(ServiceConfig{Registry: keys, Policy: mustPolicy(t, everything(edgeOne)), Recorder: NewMetrics(reg, keys)})
	flood := func(n int) {
		for i := range n {
			id := fmt.Sprintf("spiffe://x/%d", i)
			for _, op := range []keyless.Operation{
				{Opcode: 0x99, CustomFunc: id},
				{Opcode: keyless.OpECDSASignSHA256, SKI: keyless.SKI{byte(i), 1}, Payload: make([]byte, 32), SNI: id},
				{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32), CustomFunc: id},
				{Opcode: keyless.OpCustom, CustomFunc: id, CertID: id},
			} {
				for _, peer := range []string{id, edgeOne} {
					_, _ = s.Handle(t.Context(), &keyless.Request{Operation: op, Peer: keyless.Peer{ID: peer}})
				}
			}
		}
	}
	flood(256)
	before := series(t, reg)
	flood(1000)
	after := series(t, reg)
	if len(after) != len(before) || len(after) > 100 {
		t.Errorf("got %d series after %d: %v", len(after), len(before), after)
	}
	for name, want := range map[string]float64{
		"client_operations_total client=other result=refused":              4 * 1256,
		"client_operations_total client=" + edgeOne + " result=ok":         1256,
		"key_operations_total key=p256 result=ok":                          1256,
		"key_operations_total key=p256 result=refused":                     1256, // the strangers
		"refusals_total reason=not_found":                                  2 * 1256,
		"refusals_total reason=client":                                     1256,
		"operations_total op=sign result=ok scheme=ecdsa_secp256r1_sha256": 1256,
		"home_seconds home=memory":                                         1256,
	} {
		if after[name] != want {
			t.Errorf("%s: got %v, want %v", name, after[name], want)
		}
	}
	// A client that loses its rules counts as any stranger.
	s.SetPolicy(mustPolicy(t, everything(edgeTwo)))
	_, _ = ask(t, s, keyless.Operation{Opcode: keyless.OpSeal})
	if got := series(t, reg)["client_operations_total client=other result=refused"]; got != 4*1256+1 {
		t.Errorf("got %v", got)
	}
}

// TestLaneMetrics shows each lane once, whatever number of keys goes through it.
func TestLaneMetrics(t *testing.T) {
	lanes := []*Lane{NewLane(LaneConfig{Name: "hsm-a", Capacity: 4}), NewLane(LaneConfig{Name: "hsm-b", Capacity: 2}), NewLane(LaneConfig{Name: "hsm-b", Capacity: 9})}
	keys := NewRegistry()
	if err := keys.Replace([]Home{
		{Key: memoryKey(t, "p256"), Lane: lanes[0]}, {Key: memoryKey(t, "p384"), Lane: lanes[0]},
		{Key: memoryKey(t, "p256"), Lane: lanes[1]}, {Key: memoryKey(t, "rsa"), Lane: lanes[2]}, {Key: memoryKey(t, "ed")},
	}); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	s := NewService(ServiceConfig{Registry: keys, Policy: mustPolicy(t, everything(edgeOne)), Recorder: NewMetrics(reg, keys)})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for range 3 {
		_, err := s.Handle(ctx, &keyless.Request{Peer: keyless.Peer{ID: edgeOne}, Operation: keyless.Operation{Opcode: keyless.OpECDSASignSHA384, SKI: skiOf(t, "p384"), Payload: make([]byte, 48)}})
		wantCode(t, err, 0)
	}
	got := series(t, reg) // fails if a series is there twice
	if n := got["lane_capacity home=hsm-b"]; n != 2 && n != 9 {
		t.Errorf("two lanes of one name: got capacity %v, want that of one of them", n)
	}
	for name, want := range map[string]float64{
		"lane_capacity home=hsm-a":                        4,
		"lane_limit home=hsm-a":                           4,
		"lane_in_flight home=hsm-a":                       0,
		"lane_waiting home=hsm-a":                         0,
		"lane_done_total home=hsm-a":                      3,
		"lane_done_total home=hsm-b":                      0,
		"lane_failed_total home=hsm-a":                    0,
		"lane_throttled_total home=hsm-a":                 0,
		"lane_failovers_total home=hsm-a":                 0,
		"lane_hedges_total home=hsm-a":                    0,
		"lane_hedges_won_total home=hsm-a":                0,
		"lane_breaker_opened_total home=hsm-a":            0,
		"lane_breaker_state home=hsm-a state=closed":      1,
		"lane_breaker_state home=hsm-a state=open":        0,
		"lane_breaker_state home=hsm-a state=half-open":   0,
		"lane_refused_total home=hsm-a reason=overloaded": 0,
		"lane_refused_total home=hsm-a reason=deadline":   0,
		"lane_refused_total home=hsm-a reason=open":       0,
	} {
		if value, ok := got[name]; !ok || value != want {
			t.Errorf("%s: got %v, %v; want %v", name, value, ok, want)
		}
	}
	for _, name := range []string{"lane_latency_seconds", "lane_service_seconds"} {
		for _, q := range []string{"0.5", "0.95", "0.99"} {
			if got[name+" home=hsm-a quantile="+q] <= 0 {
				t.Errorf("%s: no quantile %s after three operations", name, q)
			}
		}
	}
}

// TestCausesAreAList holds every reason of a policy to have a cause, and causes to be fit for labels.
func TestCausesAreAList(t *testing.T) {
	seen := map[Cause]bool{}
	for _, r := range reasons {
		c := causes[r]
		if c == "" || seen[c] || strings.ContainsFunc(string(c), func(b rune) bool { return b != '_' && (b < 'a' || b > 'z') }) {
			t.Errorf("%q: got cause %q", r, c)
		}
		seen[c] = true
	}
	if len(causes) != len(reasons) {
		t.Errorf("got %d causes for %d reasons", len(causes), len(reasons))
	}
}

func BenchmarkMetrics(b *testing.B) {
	keys := testRegistry(b, false)
	m := NewMetrics(prometheus.NewRegistry(), keys)
	rec := Record{Peer: edgeOne, Op: "tls-sign", Scheme: "ecdsa_secp256r1_sha256", Home: "memory", Took: 1, Result: ResultOK, Duration: 1, client: edgeOne, key: keys.BySKI(skiOf(b, "p256"))}
	b.ReportAllocs()
	for b.Loop() {
		m.Record(rec)
	}
}

func TestMetricsOfStrangeLabels(t *testing.T) {
	reg := NewRegistry()
	k := &labelledKey{Key: memoryKey(t, "p256"), label: "cl\xe9", home: "tok\xe9n"}
	if err := reg.Replace([]Home{{Key: k, Lane: NewLane(LaneConfig{Name: "tok\xe9n"})}}); err != nil {
		t.Fatal(err)
	}
	all := prometheus.NewRegistry()
	m := NewMetrics(all, reg)
	s := NewService(ServiceConfig{Registry: reg, Policy: mustPolicy(t, everything(edgeOne)), Recorder: m})
	_, err := ask(t, s, keyless.Operation{Opcode: keyless.OpECDSASignSHA256, SKI: skiOf(t, "p256"), Payload: make([]byte, 32)})
	wantCode(t, err, 0)
	if _, err := all.Gather(); err != nil {
		t.Error(err)
	}
	if e := reg.Entries()[0]; e.Label() != "cl\ufffd" {
		t.Errorf("got label %q", e.Label())
	}
}

// labelledKey is a Key with another name.
type labelledKey struct {
	Key
	label, home string
}

func (k *labelledKey) Info() KeyInfo { return KeyInfo{Label: k.label, Home: k.home} }
