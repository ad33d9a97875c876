package connector

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// unrun is a connector that is not run.
func unrun(t *testing.T, cfg Config) *Connector {
	t.Helper()
	_, _, cfg.Identity = identities(t)
	cfg.Edges = []string{"192.0.2.1"}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestDevice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := unrun(t, Config{Device: true})
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		hold, err := fleet.Directive{Policy: fleet.Hold, Rollout: "spring"}.Encode()
		must(err)
		if r := c.exchangeDevice(hold); r != nil {
			t.Errorf("before any agent: report %q, want none", r)
		}
		if c.Status().Device != nil {
			t.Error("before any agent: the status shows a device")
		}
		report, err := fleet.Report{Product: "keyhaven-appliance", Version: "1.2.3", State: fleet.Idle}.Encode()
		must(err)
		d, err := c.ReportDevice(report)
		if want := (fleet.Directive{Policy: fleet.Hold, Rollout: "spring"}); err != nil || d != want {
			t.Errorf("directive %+v, %v; want %+v", d, err, want)
		}
		for _, bad := range []string{"", "{}", "null", `{"product":"p","version":"2","state":"idle","url":"x"}`, strings.Repeat("x", fleet.MaxSize+1)} {
			if _, err := c.ReportDevice([]byte(bad)); err == nil {
				t.Errorf("report %.40q was taken", bad)
			}
			if got := c.exchangeDevice([]byte(bad)); !bytes.Equal(got, report) {
				t.Errorf("after the bad directive %.40q: report %q, want %q", bad, got, report)
			}
		}
		st := c.Status().Device
		if st == nil || st.Report.Version != "1.2.3" || st.Directive.Policy != fleet.Hold || st.Directed.IsZero() {
			t.Errorf("status %+v", st)
		}
		// An edge that knows of no directive takes none back.
		if empty, err := (fleet.Directive{}).Encode(); err != nil || c.exchangeDevice(empty) == nil || c.Status().Device.Directive.Policy != fleet.Hold {
			t.Errorf("an empty directive: %v, %+v", err, c.Status().Device)
		}
		time.Sleep(deviceFresh + time.Second)
		if r := c.exchangeDevice(hold); r != nil {
			t.Errorf("after the agent stopped: report %q, want none", r)
		}
	})
}

// A connector that is told of no device says so to edges.
func TestNoDevice(t *testing.T) {
	if unrun(t, Config{}).onDevice() != nil {
		t.Error("edges may ask")
	}
}
