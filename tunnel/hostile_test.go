package tunnel

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// rawDial opens a carrier and its first stream without speaking the protocol.
func rawDial(tb testing.TB, via Carrier, e *edgeFixture, conf *tls.Config) (stream, carrier, func(), error) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cfg := DialConfig{Addr: e.ln.Addr().String(), Logger: testLogger(tb), Handle: accept(echo), Limits: Limits{}.withDefaults(defaultSessionWindow)}
	d := dialer{DialConfig: cfg, tls: conf}
	connect := d.dialQUIC
	if via == CarrierTCP {
		connect = d.dialTCP
	}
	car, shut, err := connect(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	st, err := car.openStream()
	if err != nil {
		car.close(CloseDone)
		shut()
		return nil, nil, nil, err
	}
	return st, car, shut, nil
}

func connectorTLS(src *mtls.Source) *tls.Config {
	return src.ClientConfig(mtls.ClientOptions{ALPN: []string{ALPN}, Expect: mtls.AcceptKinds(mtls.KindEdge)})
}

func rawFrame(t frameType, flags byte, p ...byte) []byte {
	b := byteFrame(t, p...)
	b[1] = flags
	return b
}

// TestHostileRegistration sends an edge what is no registration; it must refuse or close, and go on serving others.
func TestHostileRegistration(t *testing.T) { overBoth(t, testHostileRegistration) }

func testHostileRegistration(t *testing.T, via Carrier) {
	t.Parallel()
	p := newPKI(t)
	src := p.source(mtls.KindConnector, "c1", 0)
	e := startEdge(t, ListenConfig{
		Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, Limits: Limits{SetupTimeout: 300 * time.Millisecond},
	})
	good, err := appendRegister(nil, testRegistration)
	if err != nil {
		t.Fatal(err)
	}
	wrongVersion := append([]byte(nil), good...)
	wrongVersion[frameHeaderLen] = 2
	for name, tt := range map[string]struct {
		send []byte
		fin  bool
		want RefusalCode
	}{
		"nothing":       {nil, true, RefusalMalformed},
		"garbage":       {[]byte("GET / HTTP/1.1\r\n\r\n"), true, RefusalMalformed},
		"huge length":   {[]byte{1, 0, 0xff, 0xff}, false, RefusalMalformed},
		"reserved flag": {rawFrame(frameRegister, 0x80, good[4:]...), false, RefusalMalformed},
		"cut short":     {good[:len(good)-1], true, RefusalMalformed},
		"never ends":    {good[:len(good)-1], false, RefusalMalformed},
		"other frame":   {byteFrame(frameDrain), false, RefusalMalformed},
		"empty":         {byteFrame(frameRegister), false, RefusalMalformed},
		"version":       {wrongVersion, false, RefusalVersion},
	} {
		t.Run(name, func(t *testing.T) {
			st, car, shut, err := rawDial(t, via, e, connectorTLS(src))
			if err != nil {
				t.Fatal(err)
			}
			defer shut()
			defer car.close(CloseDone)
			st.Write(tt.send)
			if tt.fin {
				st.closeWrite()
			}
			st.SetReadDeadline(time.Now().Add(patience))
			f, err := readFrame(st, 0)
			if err != nil {
				t.Fatalf("no answer: %v", err)
			}
			if f.typ != frameRefused || len(f.payload) != 1 || RefusalCode(f.payload[0]) != tt.want {
				t.Errorf("answer 0x%02x %x, want refused with %v", byte(f.typ), f.payload, tt.want)
			}
		})
	}
	t.Run("no stream", func(t *testing.T) {
		_, car, shut, err := rawDial(t, via, e, connectorTLS(src)) // a stream without bytes does not exist for the edge
		if err != nil {
			t.Fatal(err)
		}
		defer shut()
		select {
		case <-car.done():
			if err := car.err(); !errors.Is(err, &SessionError{Reason: CloseProtocol, Remote: true}) {
				t.Errorf("ended with %v, want a protocol error", err)
			}
		case <-time.After(patience):
			t.Error("the edge waits for ever")
		}
	})
	eventually(t, "no connection pending", func() bool { return e.ln.pending.Load() == 0 })
	startConnector(t, dialOver(e, via, src, accept(echo)))
	e.session()
}

// TestHostileControl sends an edge bad frames after a good registration.
func TestHostileControl(t *testing.T) { overBoth(t, testHostileControl) }

func testHostileControl(t *testing.T, via Carrier) {
	t.Parallel()
	p := newPKI(t)
	src := p.source(mtls.KindConnector, "c1", 0)
	e := startEdge(t, ListenConfig{
		Identity: p.source(mtls.KindEdge, "e1", 0), Admit: admitAll, Limits: Limits{SetupTimeout: 300 * time.Millisecond},
	})
	good, _ := appendRegister(nil, testRegistration)
	for name, tt := range map[string]struct {
		send  []byte
		reset bool
		lives bool
	}{
		"unknown frame":       {rawFrame(0x7f, 0), false, false},
		"skippable frame":     {rawFrame(0x7f, flagSkippable, 1, 2, 3), false, true},
		"second registration": {good, false, false},
		"drain with payload":  {byteFrame(frameDrain, 1), false, false},
		"bad goodbye":         {byteFrame(frameGoodbye), false, false},
		"bad renew":           {byteFrame(frameRenew, 0, 0, 0, 1), false, false},
		"stalled frame":       {byteFrame(frameRenew, 0, 0, 0, 1)[:6], false, false},
		"reset":               {nil, true, false},
		"drain, no goodbye":   {byteFrame(frameDrain), false, true},
		"goodbye, no drain":   {byteFrame(frameGoodbye, 0), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			st, car, shut, err := rawDial(t, via, e, connectorTLS(src))
			if err != nil {
				t.Fatal(err)
			}
			defer shut()
			defer car.close(CloseShutdown)
			if _, err := exchangeRegister(st, good, patience); err != nil {
				t.Fatal(err)
			}
			s := e.session()
			st.Write(tt.send)
			if tt.reset {
				st.abortWrite(ResultReset)
			}
			if tt.lives {
				time.Sleep(50 * time.Millisecond)
				if err := s.Err(); err != nil {
					t.Errorf("the session ended: %v", err)
				}
				return
			}
			select {
			case <-s.Done():
			case <-time.After(patience):
				t.Error("the edge keeps the session")
			}
		})
	}
}

// rawPair is a connector whose edge's streams the test opens by hand.
func rawPair(t *testing.T, via Carrier, limits Limits) (*Session, *connectorFixture) {
	t.Helper()
	_, c, s := pairOver(t, via, accept(echo), func(_ *ListenConfig, dc *DialConfig) { dc.Limits = limits })
	return s, c
}

// TestHostileHeaders sends a connector what is no flow header; it must answer and end the flow, and go on with others.
func TestHostileHeaders(t *testing.T) { overBoth(t, testHostileHeaders) }

func testHostileHeaders(t *testing.T, via Carrier) {
	t.Parallel()
	s, c := rawPair(t, via, Limits{SetupTimeout: 300 * time.Millisecond})
	good, err := appendFlow(nil, testFlow, false)
	if err != nil {
		t.Fatal(err)
	}
	edit := func(at int, to byte) []byte {
		b := append([]byte(nil), good...)
		b[at] = to
		return b
	}
	for name, tt := range map[string]struct {
		send []byte
		fin  bool
		want Result
	}{
		"nothing":     {nil, true, ResultMalformed},
		"version":     {edit(0, 2), false, ResultUnsupported},
		"kind":        {edit(1, 4), false, ResultUnsupported},
		"length":      {edit(2, 0xff), false, ResultMalformed},
		"first item":  {edit(4, 0x7f), false, ResultMalformed},
		"item length": {edit(5, 0x7f), false, ResultMalformed},
		"no items":    {[]byte{1, 1, 0, 0}, false, ResultMalformed},
		"cut short":   {good[:len(good)-1], true, ResultMalformed},
		"never ends":  {good[:len(good)-1], false, ResultMalformed},
	} {
		t.Run(name, func(t *testing.T) {
			st, err := s.car.openStream()
			if err != nil {
				t.Fatal(err)
			}
			st.Write(tt.send)
			if tt.fin {
				st.closeWrite()
			}
			st.SetReadDeadline(time.Now().Add(patience))
			b, err := io.ReadAll(st)
			if err != nil || len(b) != 1 || Result(b[0]) != tt.want {
				t.Errorf("answer %x, %v; want %v alone", b, err, tt.want)
			}
			st.abortWrite(ResultCancelled)
		})
	}
	t.Run("trickled", func(t *testing.T) { // a byte now and then must not hold the header open
		st, err := s.car.openStream()
		if err != nil {
			t.Fatal(err)
		}
		sent := 0
		for sent < len(good) {
			if _, err := st.Write(good[sent : sent+1]); err != nil {
				break
			}
			sent++
			time.Sleep(30 * time.Millisecond)
		}
		if sent == len(good) {
			t.Error("the connector read a header for longer than its set-up time")
		}
	})
	eventually(t, "no flows", func() bool { return c.Flows() == 0 })
	flow := open(t, s, testFlow)
	checkEcho(t, flow, "others go on")
	flow.Close()
}

// TestHostileAnswer lets an edge meet a connector that answers a flow with an end or a reset in place of a result.
func TestHostileAnswer(t *testing.T) { overBoth(t, testHostileAnswer) }

func testHostileAnswer(t *testing.T, via Carrier) {
	for name, tt := range map[string]struct {
		answer func(stream)
		want   error
	}{
		"end":   {func(st stream) { st.closeWrite() }, ErrInternal},
		"reset": {func(st stream) { st.abortWrite(ResultReset) }, ErrReset},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, s := pairOver(t, via, func(_ context.Context, in *Incoming) {
				in.answered.Store(true)
				tt.answer(in.conn.stream)
				in.conn.Close()
			})
			if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, tt.want) {
				t.Errorf("Open: %v, want %v", err, tt.want)
			}
			if n := s.Flows(); n != 0 {
				t.Errorf("%d flows counted", n)
			}
		})
	}
}
