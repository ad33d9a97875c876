package cli

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
)

func TestListenError(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, taken := net.Listen("tcp", ln.Addr().String())
	_, foreign := net.Listen("tcp", "192.0.2.1:0")
	refused := &net.OpError{Op: "listen", Net: "tcp", Err: os.NewSyscallError("bind", syscall.EACCES)}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("listen: %w", refused), "CAP_NET_BIND_SERVICE"},
		{taken, "choose another port"},
		{foreign, "does not have the address"},
	} {
		got := ListenError(tt.err)
		if got == nil || !strings.Contains(got.Error(), tt.want) || !strings.HasPrefix(got.Error(), tt.err.Error()+": ") {
			t.Errorf("%v: got %v, want it to say %q", tt.err, got, tt.want)
		}
	}
	if got := ListenError(nil); got != nil {
		t.Errorf("nil: got %v", got)
	}
	if other := os.ErrClosed; ListenError(other) != other {
		t.Error("an error without a remedy was changed")
	}
}
