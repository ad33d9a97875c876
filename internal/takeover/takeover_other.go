//go:build !unix

package takeover

import (
	"context"
	"errors"
	"net"
	"os"

	"github.com/keyhaven/keyhaven/internal/notify"
)

var errUnsupported = errors.New("on this system a process cannot be replaced while it runs")

// Begin returns a process without a predecessor, for which nobody can ask for a successor.
func Begin() (*Process, error) { return &Process{request: make(chan os.Signal)}, nil }

func bind(network, addr string) (net.Listener, error) {
	if network != "tcp" {
		return nil, errors.New("sockets that only their owner may use need a Unix system")
	}
	return net.Listen(network, addr)
}

// Ready returns at once.
func (p *Process) Ready(context.Context) error { return nil }

// A Successor does not exist here.
type Successor struct{}

// PID is 0.
func (s *Successor) PID() int { return 0 }

// Start fails.
func (p *Process) Start(context.Context, bool) (*Successor, error) { return nil, errUnsupported }

// Release fails.
func (s *Successor) Release(notify.Notifier) error { return errUnsupported }
