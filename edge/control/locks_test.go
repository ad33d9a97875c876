package control

import (
	"encoding/json"
	"fmt"
	"sync"
	"testing"
	"time"
)

// What an edge does all day, all at once: nobody waits for a lock of somebody who waits for theirs.
func TestLocksAreTakenInOneOrder(t *testing.T) {
	f := newCluster(t, 1)
	a := f.edge("a")
	a.site("plant", "")
	plant, err := a.Tunnel("plant")
	must(t, err)
	text := func(v any) []byte { b, _ := json.Marshal(v); return b }
	session := text(presence{Since: time.Now(), Processes: []presentProcess{{Connector: "p", Instance: "i", Sessions: 1, Draining: 1, Want: 1}}})

	stop := make(chan struct{})
	var loops, done sync.WaitGroup
	for _, f := range []func(i int){
		func(i int) { // another edge is started anew
			a.peers.apply(delta{key: prefixEdge + "b", value: text(edgeRecord{Instance: fmt.Sprint(i), Beat: uint64(i)})})
		},
		func(int) { // it has sessions, which drain
			a.peers.apply(delta{key: prefixPresent + plant.ID + "/b", value: []byte(`{}`)})
			a.peers.apply(delta{key: prefixPresent + plant.ID + "/b", value: session})
		},
		func(int) { // flows go over it
			for _, e := range a.peers.with(plant.ID, "") {
				if _, err := e.session(t.Context()); err == nil {
					t.Error("got a session with an edge that is not there")
				}
			}
		},
		func(int) { // somebody looks
			a.counts()
			a.Tunnels()
			a.Edges()
			if _, err := a.Connectors("plant"); err != nil {
				t.Error(err)
			}
		},
		func(int) { a.model.apply(nil, 0) },
		func(int) { // connectors are configured
			a.configs.mark()
			for k := range a.configRound() {
				a.pushConfig(t.Context(), k)
			}
		},
		func(int) { // sessions come and go
			for _, l := range a.reg.all() {
				a.changed(l)
			}
		},
	} {
		// Each does this often, and goes on until all have.
		done.Add(1)
		loops.Go(func() {
			for i := 0; ; i++ {
				f(i)
				if i == 1000 {
					done.Done()
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	done.Wait()
	close(stop)
	loops.Wait()
}
