package dns

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"time"

	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/tunnel"
)

func newLog() *slog.Logger { return slog.New(slog.DiscardHandler) }

// fixed is a way to a name server that always says the same, with the asker's id.
type fixed []byte

func (f fixed) Dial(context.Context, control.Query) (net.Conn, error) {
	return nil, errors.New("no stream")
}

func (f fixed) DialPacket(context.Context, control.Query) (tunnel.PacketConn, error) {
	return &fixedFlow{reply: append([]byte(nil), f...)}, nil
}

type fixedFlow struct {
	tunnel.PacketConn
	reply []byte
	read  bool
}

func (f *fixedFlow) WritePacket(b []byte) error {
	copy(f.reply, b[:2])
	return nil
}

func (f *fixedFlow) ReceivePacket() ([]byte, error) {
	if f.read {
		return nil, io.EOF
	}
	f.read = true
	return f.reply, nil
}

func (f *fixedFlow) SetReadDeadline(time.Time) error { return nil }
func (f *fixedFlow) Close() error                    { return nil }
