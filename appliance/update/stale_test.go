package update

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyhaven/keyhaven/appliance/bundle"
	"github.com/keyhaven/keyhaven/appliance/fleet"
)

// An edge that sends a device to another channel for once does not cut it off from its own, whose index may be older; and
// neither index can be played again after that.
func TestEachChannelHasItsIndex(t *testing.T) {
	m, p := newMachine("1.0.0"), newPublisher(t)
	p.publish(t, "1.0.0", 100)
	stable := bytes.Clone(p.files["/stable/arm64.json"])
	p.index.Channel, p.index.Published = "beta", p.index.Published.Add(1000*time.Hour)
	oldBeta, newBeta := p.index.Published, p.index.Published.Add(time.Hour)
	for _, at := range []time.Time{oldBeta, newBeta} {
		p.index.Published = at
		p.write(t)
		p.files["/beta/arm64.json"] = p.files["/stable/arm64.json"]
		p.files["/stable/arm64.json"] = stable
		if at.Equal(oldBeta) {
			p.files["/old"] = p.files["/beta/arm64.json"]
		}
	}
	beta := Request{Directive: fleet.Directive{Policy: fleet.Update, Version: "9.9.9", Channel: "beta"}}
	for _, q := range []Request{{}, beta, {}, beta, {}} {
		if err := m.engine(t, p, nil).Update(t.Context(), q); !errors.Is(err, ErrNothing) {
			t.Fatalf("%+v: got %v", q.Directive, err)
		}
	}
	p.files["/beta/arm64.json"] = p.files["/old"]
	if err := m.engine(t, p, nil).Update(t.Context(), beta); !errors.Is(err, bundle.ErrOlder) {
		t.Errorf("the older index of beta: got %v", err)
	}
}

// However many channels there were, the record stays one that can be read, and the channels used last are remembered.
func TestChannelsAreBounded(t *testing.T) {
	r := newRecord()
	for i := range 3 * maxChannels {
		r.saw(strings.Repeat("x", i+1), time.Unix(int64(i), 0).UTC())
	}
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseRecord(b)
	if err != nil || len(got.Published) != maxChannels || got.Published[strings.Repeat("x", 3*maxChannels)].IsZero() {
		t.Errorf("got %d channels, %v", len(got.Published), err)
	}
}

// Whoever keeps newer indexes away is found out when the last one expires, also by the answer that nothing has changed.
func TestExpiredIndexIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, p := newMachine("1.0.0"), newPublisher(t)
		inThe2030s()
		p.index.Published = time.Now()
		p.index.Expires = time.Now().AddDate(0, 1, 0)
		p.publish(t, "1.0.0", 100)
		e := m.engine(t, p, nil)
		if err := e.Update(t.Context(), Request{}); !errors.Is(err, ErrNothing) {
			t.Fatal(err)
		}
		time.Sleep(32 * 24 * time.Hour)
		p.publish(t, "1.1.0", 100)
		err := e.Update(t.Context(), Request{})
		if !errors.Is(err, bundle.ErrExpired) || !strings.Contains(err.Error(), "publish it again") {
			t.Fatalf("got %v", err)
		}
		if r := e.Report(); !strings.Contains(r.Error, "expired") {
			t.Errorf("the fleet is told %q", r.Error)
		}
		if err := current(e.source.base, p.index); !errors.Is(err, bundle.ErrExpired) {
			t.Errorf("got %v", err)
		}
		p.index.Expires = time.Now().AddDate(0, 1, 0)
		p.publish(t, "1.1.0", 100)
		if err := e.Update(t.Context(), Request{}); !errors.Is(err, ErrRestart) {
			t.Errorf("got %v", err)
		}
	})
}

// A bundle for one channel cannot be slipped into another, not even by who signs indexes.
func TestBundleOfAnotherChannel(t *testing.T) {
	for channel, want := range map[string]error{"": ErrRestart, "stable": ErrRestart, "beta": bundle.ErrChannel} {
		m, p := newMachine("1.0.0"), newPublisher(t)
		p.publish(t, "1.1.0", 100)
		i := system("1.1.0")
		text, err := json.Marshal(i)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		manifest := bundle.Manifest{Version: i.Version, Arch: i.Arch, Boards: i.Boards, Built: i.Built, Channel: channel}
		if _, err := bundle.Write(&b, manifest, bytes.NewReader(append(text, make([]byte, 4096-len(text))...)), bundle.Signer(p.key, "")); err != nil {
			t.Fatal(err)
		}
		p.files["/stable/1.1.0.update"] = b.Bytes()
		p.index.Releases[0].Size, p.index.Releases[0].SHA256 = int64(b.Len()), sumOf(b.Bytes())
		p.write(t)
		if err := m.engine(t, p, nil).Update(t.Context(), Request{}); !errors.Is(err, want) {
			t.Errorf("for %q: got %v, want %v", channel, err, want)
		}
	}
}
