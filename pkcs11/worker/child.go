package worker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// Descriptors that a worker inherits.
const (
	socketFD = 3
	pinFD    = 4
)

// Exit statuses of a worker.
const (
	exitTold    = 0 // by the pool, or its socket closed
	exitFailed  = 3 // and said why
	exitMisused = 4 // not started by a pool
	exitStuck   = 5 // the module holds an operation, and the pool does not end the worker
)

// maxPIN bounds the PIN, in bytes.
const maxPIN = 4096

// Main is the life of a worker: what the program does when it is started by a [Pool], with the pool's socket as descriptor 3 and the PIN in a pipe
// as descriptor 4. It returns the exit status when the pool says so or ctx ends, and ends the process at once when the
// socket closes, as calls into a module cannot be cancelled.
func Main(ctx context.Context) int {
	// These are for the pool's process, which tells its workers in its own time.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	var confined confinement
	if os.Getenv(confinedVariable) == "" {
		request, err := readConfine()
		if err != nil {
			fmt.Fprintf(os.Stderr, "worker: %v: it is started by the key server itself\n", err)
			return exitMisused
		}
		confined, err = confine(request)
		if err == nil && request.Mode != SandboxOff {
			err = reportConfined(confined)
			if err == nil {
				err = again()
			}
		} else if err == nil {
			err = reportConfined(confined)
		}
		if err != nil {
			_ = writeFrame(frameFailed, encodeError(err))
			return exitFailed
		}
	}
	return serve(ctx)
}

func reportConfined(c confinement) error { return writeFrame(frameConfined, encodeJSON(c)) }

// readConfine reads the first frame, and nothing behind it: the pool sends no more before it has an answer.
func readConfine() (*confineRequest, error) {
	buf := make([]byte, 0, 4096)
	for {
		f, _, ok, err := cutFrame(buf)
		if err != nil {
			return nil, err
		}
		if ok {
			var r confineRequest
			if f.typ != frameConfine {
				return nil, fmt.Errorf("%w: type %d comes first", errFrame, f.typ)
			}
			return &r, decodeJSON("confine", f.body, &r)
		}
		var some [4096]byte
		n, err := ignoringEINTR(func() (int, error) { return syscall.Read(socketFD, some[:]) })
		if err == nil && n == 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return nil, fmt.Errorf("read descriptor %d: %w", socketFD, err)
		}
		buf = append(buf, some[:n]...)
	}
}

func writeFrame(typ frameType, body []byte) error {
	out := appendFrame(nil, typ, 0, body)
	for len(out) > 0 {
		n, err := ignoringEINTR(func() (int, error) { return syscall.Write(socketFD, out) })
		if err != nil {
			return err
		}
		out = out[n:]
	}
	return nil
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, syscall.EINTR) {
			return n, err
		}
	}
}

// socket makes a connection of the inherited descriptor.
func socket() (net.Conn, error) {
	f := os.NewFile(socketFD, "pool")
	defer f.Close()
	return net.FileConn(f)
}

// serve is what a confined worker does.
func serve(ctx context.Context) int {
	rename()
	conn, err := socket()
	if err != nil {
		fmt.Fprintf(os.Stderr, "worker: %v\n", err)
		return exitMisused
	}
	s := newServer()
	var writing sync.WaitGroup
	writing.Go(func() {
		if s.out.run(conn) != nil {
			os.Exit(exitTold)
		}
	})
	go s.read(conn) // ends with the process
	status := exitTold
	if err := s.run(ctx); err != nil {
		s.out.send(frameFailed, 0, encodeError(err))
		status = exitFailed
	}
	s.out.close()
	writing.Wait()
	return status
}

// run opens the token, serves until the pool says that it is enough, and closes the token.
func (s *server) run(ctx context.Context) error {
	var request openRequest
	select {
	case request = <-s.open:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if err := seal(request.Mode, request.Network); err != nil {
		return err
	}
	s.deadline = request.Deadline
	token, err := s.openToken(ctx, &request)
	if err != nil {
		return err
	}
	s.work(ctx, token, &request)
	// A module that hangs now is not waited for.
	stuck := time.AfterFunc(closeWait, func() { os.Exit(exitTold) })
	defer stuck.Stop()
	return token.Close()
}

// closeWait is how long a worker that leaves waits for C_Finalize.
const closeWait = 2 * time.Second

func (s *server) openToken(ctx context.Context, r *openRequest) (*pkcs11.Token, error) {
	pin, err := readPIN()
	if err != nil {
		return nil, err
	}
	uri, err := pkcs11.ParseURI(r.URI)
	if err != nil {
		return nil, err
	}
	return pkcs11.Open(ctx, pkcs11.Config{
		URI: uri, Module: r.Module, Sessions: r.Sessions, AllowExtractable: r.AllowExtractable, AllowFinalTry: r.AllowFinalTry,
		PIN: func() (pkcs11.PIN, error) { return pin, nil }, Leave: s.leave, Progress: s.progress, Logger: s.logger(),
	})
}

// readPIN reads the PIN from its descriptor, to the end, and closes that.
func readPIN() (pkcs11.PIN, error) {
	f := os.NewFile(pinFD, "PIN")
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxPIN+1))
	if err == nil && len(b) > maxPIN {
		err = fmt.Errorf("longer than %d bytes", maxPIN)
	}
	if err != nil {
		return pkcs11.PIN{}, fmt.Errorf("read the PIN from descriptor %d: %w", pinFD, err)
	}
	defer clear(b)
	return pkcs11.NewPIN(string(b)), nil
}
