package appliance

import (
	"context"
	"log/slog"
	"time"

	"github.com/keyhaven/keyhaven/mtls"
)

// Health is how the connector is.
type Health struct {
	Tunnel bool      // at least one session to an edge is up
	Since  time.Time // when Tunnel became what it is
	Text   string    // for people
}

// A JoinFunc enrols a connector with the token and writes its identity to dir. Called again after a failure with the same dir it
// uses the same key.
type JoinFunc func(ctx context.Context, token mtls.JoinToken, dir, name string) error

// An Agent runs an appliance. Its fields are set before Run, and not changed after.
type Agent struct {
	Host    Host
	Join    JoinFunc
	Version string       // of this program
	Log     *slog.Logger // nil: nothing is logged
}

// Run sets the machine up and looks after it until ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}
