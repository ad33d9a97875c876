package fleet

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	someReport = Report{Product: "keyhaven-appliance", Arch: "arm64", Board: "Raspberry Pi 4 Model B Rev 1.4 · «µ»", Version: "0.5.0-dev.3+gabc",
		Previous: "0.4.9", State: Trial, Target: "0.5.0", Error: "<none> & \"all\" is well", Trial: true, Checked: time.Unix(1700000000, 5).UTC(),
		Since: time.Unix(1700000001, 0).In(time.FixedZone("", 3600)), Camera: "no camera"}
	someDirective = Directive{Policy: Update, Version: "0.5.0", Channel: "stable", Rollout: "spring"}
)

func TestRoundTrip(t *testing.T) {
	b, err := someReport.Encode()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ParseReport(b)
	if err != nil {
		t.Fatal(err)
	}
	if !r.Since.Equal(someReport.Since) || !r.Checked.Equal(someReport.Checked) {
		t.Errorf("times %v, %v; want %v, %v", r.Since, r.Checked, someReport.Since, someReport.Checked)
	}
	want := someReport
	r.Since, r.Checked, want.Since, want.Checked = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	if r != want {
		t.Errorf("got %+v, want %+v", r, want)
	}
	for _, d := range []Directive{someDirective, {Policy: Free}, {Policy: Hold, Rollout: "spring"}, {}} {
		b, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := ParseDirective(b); err != nil || got != d {
			t.Errorf("got %+v, %v; want %+v", got, err, d)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	const ok = `{"product":"p","version":"1","state":"idle"`
	for name, in := range map[string]string{
		"nothing":        ``,
		"no object":      `[]`,
		"null":           `null`,
		"cut":            ok,
		"unknown name":   ok + `,"url":"https://example.com/x"}`,
		"other letters":  `{"Product":"p","version":"1","state":"idle"}`,
		"given twice":    ok + `,"version":"2"}`,
		"a type":         ok + `,"trial":"yes"}`,
		"an object":      ok + `,"error":{}}`,
		"a list":         ok + `,"error":["a"]}`,
		"more":           ok + `}{}`,
		"no state":       `{"product":"p","version":"1"}`,
		"no version":     `{"product":"p","state":"idle"}`,
		"a long version": `{"product":"p","state":"idle","version":"` + strings.Repeat("1", maxWord+1) + `"}`,
		"a path":         `{"product":"p","state":"idle","version":"../1"}`,
		"a terminal":     ok + `,"error":"\u001b[2J"}`,
		"reversed":       ok + `,"error":"\u202egpj"}`,
		"a long text":    ok + `,"error":"` + strings.Repeat("x", maxText+1) + `"}`,
		"a bad time":     ok + `,"since":"yesterday"}`,
		"huge":           ok + `,"error":"` + strings.Repeat("x", MaxSize) + `"}`,
	} {
		if r, err := ParseReport([]byte(in)); err == nil {
			t.Errorf("%s: got %+v, want an error", name, r)
		}
	}
	for name, in := range map[string]string{
		"no version":       `{"policy":"update"}`,
		"unknown policy":   `{"policy":"wipe"}`,
		"hold and version": `{"policy":"hold","version":"1"}`,
		"free and channel": `{"policy":"free","channel":"x"}`,
		"no policy":        `{"policy":"","rollout":"x"}`,
		"a URL":            `{"policy":"update","version":"https://example.com/1"}`,
		"a url field":      `{"policy":"update","version":"1","url":"x"}`,
	} {
		if d, err := ParseDirective([]byte(in)); err == nil {
			t.Errorf("%s: got %+v, want an error", name, d)
		}
	}
}

// What an agent has to say of itself never keeps it from saying it.
func TestEncodeMakesTextsFit(t *testing.T) {
	r := Report{Product: "p", Version: "1", State: Failed, Error: "\x1b[31m" + strings.Repeat("ü\n", 4000), Camera: "\xff", Board: strings.Repeat("<", 4000)}
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseReport(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) > MaxSize || len(got.Error) > maxText || strings.ContainsAny(got.Error, "\x1b\n") || got.Camera != "?" {
		t.Errorf("%d bytes: %+v", len(b), got)
	}
	for name, r := range map[string]Report{
		"empty":         {},
		"a bad version": {Product: "p", Version: "a b", State: Idle},
		"a far time":    {Product: "p", Version: "1", State: Idle, Since: time.Unix(1<<40, 0)},
	} {
		if _, err := r.Encode(); err == nil {
			t.Errorf("%s: encoded", name)
		}
	}
	if _, err := (Directive{Policy: Update}).Encode(); err == nil {
		t.Error("a directive without a version was encoded")
	}
}

func TestExchange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	answers := make(chan string, 1)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		if _, err := ParseReport(b); err != nil || r.Method != http.MethodPut || r.URL.Path != Path || r.Host != Host {
			t.Errorf("%s %s of %s with %q: %v", r.Method, r.URL, r.Host, b, err)
		}
		if a := <-answers; a != "" {
			io.WriteString(w, a) //nolint:errcheck // the client sees it
		} else {
			http.Error(w, "not\x1bnow", http.StatusForbidden)
		}
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }() //nolint:errcheck // ends with Close
	t.Cleanup(func() { srv.Close(); <-done })
	answers <- `{"policy":"hold"}`
	if d, err := Exchange(t.Context(), path, someReport); err != nil || d != (Directive{Policy: Hold}) {
		t.Errorf("got %+v, %v", d, err)
	}
	answers <- ""
	if _, err := Exchange(t.Context(), path, someReport); err == nil || !strings.Contains(err.Error(), "not?now") {
		t.Errorf("refused: %v", err)
	}
	answers <- strings.Repeat(" ", MaxSize) + `{"policy":"hold"}`
	if _, err := Exchange(t.Context(), path, someReport); err == nil {
		t.Error("a huge answer was taken")
	}
	if _, err := Exchange(t.Context(), path, Report{}); err == nil {
		t.Error("an empty report was sent")
	}
	if _, err := Exchange(context.Background(), path+"x", someReport); err == nil {
		t.Error("nobody was there and answered")
	}
}

// FuzzReport plays a connector's host against its connector and against an edge.
func FuzzReport(f *testing.F) {
	b, err := someReport.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"product":"p","version":"1","state":"idle","trial":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ParseReport(b)
		if err != nil {
			return
		}
		again, err := r.Encode()
		if err != nil || len(again) > MaxSize {
			t.Fatalf("%+v, read from %q, encodes to %d bytes: %v", r, b, len(again), err)
		}
		if twice, err := ParseReport(again); err != nil || !same(twice, r) {
			t.Fatalf("%+v was read from %q, but %+v (%v) from %q", r, b, twice, err, again)
		}
	})
}

func same(a, b Report) bool {
	ok := a.Since.Equal(b.Since) && a.Checked.Equal(b.Checked)
	a.Since, a.Checked, b.Since, b.Checked = time.Time{}, time.Time{}, time.Time{}, time.Time{}
	return ok && a == b
}

// FuzzDirective plays an edge that an attacker has taken over, against a device.
func FuzzDirective(f *testing.F) {
	b, err := someDirective.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := ParseDirective(b)
		if err != nil {
			return
		}
		again, err := d.Encode()
		if err != nil || len(again) > MaxSize {
			t.Fatalf("%+v, read from %q, encodes to %d bytes: %v", d, b, len(again), err)
		}
		if twice, err := ParseDirective(again); err != nil || twice != d {
			t.Fatalf("%+v was read from %q, but %+v (%v) from %q", d, b, twice, err, again)
		}
	})
}
