package tunnel

import (
	"context"
	"errors"
	"testing"
	"time"
)

// A flow that lies in a pool learns of the drain, which would otherwise wait for it.
func TestFlowsLearnOfTheDrain(t *testing.T) { overBoth(t, testFlowsLearnOfTheDrain) }

func testFlowsLearnOfTheDrain(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	flow := open(t, s, testFlow)
	select {
	case <-flow.(Drainer).Draining():
		t.Fatal("draining before the drain")
	default:
	}
	drained := make(chan error, 1)
	go func() { drained <- c.Drain(context.Background()) }()
	select {
	case <-flow.(Drainer).Draining():
	case <-time.After(patience):
		t.Fatal("the flow was not told")
	}
	flow.Close()
	if err := <-drained; err != nil {
		t.Errorf("Drain: %v", err)
	}
}

func TestRetire(t *testing.T) { overBoth(t, testRetire) }

func testRetire(t *testing.T, via Carrier) {
	_, c, s := pairOver(t, via, accept(echo))
	flow := open(t, s, testFlow)
	s.Retire()
	<-flow.(Drainer).Draining()
	if _, err := s.Open(context.Background(), testFlow); !errors.Is(err, ErrDraining) {
		t.Errorf("Open: %v, want ErrDraining", err)
	}
	checkEcho(t, flow, "open flows go on")
	flow.Close()
	select {
	case <-c.Draining():
		t.Error("the connector was told")
	case <-s.Done():
		t.Error("the session ended")
	default:
	}
}
