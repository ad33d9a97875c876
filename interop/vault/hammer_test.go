package vault

import (
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/interop/vault/server"
)

// While the server is away, the login alone asks it only now and then.
func TestOutageIsNotHammered(t *testing.T) {
	t.Parallel()
	l := newLab(t)
	l.make("web", "ecdsa-p256")
	cfg := l.config("web")
	l.appRole(&cfg, lifetime(3*time.Second, time.Minute))
	k := keys(t, l.open(cfg), 1)["web"]
	l.Inject(server.Fault{Status: 503})
	time.Sleep(5 * time.Second)
	if got := l.Counters().Faults; got > 20 {
		t.Errorf("%d requests within 5 s", got)
	}
	l.Clear()
	eventually(t, "a signature", func() bool {
		_, err := k.Sign(t.Context(), p256, make([]byte, 32))
		return err == nil
	})
}
