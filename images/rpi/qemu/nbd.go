package qemu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
)

// The NBD protocol, as far as QEMU's client needs it: fixed newstyle negotiation and simple replies. See
// doc/proto.md of the network block device project, "Newstyle negotiation" and "Transmission".
const (
	nbdMagic       = 0x4e42444d41474943
	nbdOption      = 0x49484156454f5054
	nbdOptionReply = 0x3e889045565a9
	nbdRequest     = 0x25609513
	nbdReply       = 0x67446698

	nbdOptExportName = 1
	nbdOptAbort      = 2
	nbdOptInfo       = 6
	nbdOptGo         = 7

	nbdRepAck      = 1
	nbdRepInfo     = 3
	nbdRepErrUnsup = 1<<31 | 1

	nbdRead        = 0
	nbdWrite       = 1
	nbdDisconnect  = 2
	nbdFlush       = 3
	nbdTrim        = 4
	nbdWriteZeroes = 6

	nbdHandshakeFlags = 1 | 2                         // fixed newstyle, no zeroes
	nbdFlags          = 1 | 1<<2 | 1<<3 | 1<<5 | 1<<6 // has flags; takes flush, FUA, trim, write zeroes
	nbdFUA            = 1

	nbdInvalid = 22 // EINVAL
	nbdIO      = 5  // EIO

	nbdMaxRequest = 32 << 20
	nbdMaxOption  = 4096
)

// A Server serves a disk to one QEMU at a time on a Unix socket. Operations are done in the order in which they come.
type Server struct {
	disk *Disk
	l    net.Listener
	wg   sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	conns  map[net.Conn]bool
	closed bool
	err    error // the first that was not the client's going
}

// Serve begins to serve a disk. Close the server when QEMU has ended.
func Serve(d *Disk, socket string) (*Server, error) {
	os.Remove(socket) // left by an earlier server
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, fmt.Errorf("qemu: serve a disk: %w", err)
	}
	s := &Server{disk: d, l: l, conns: map[net.Conn]bool{}}
	s.wg.Go(s.accept)
	return s, nil
}

func (s *Server) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return // closed
		}
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			c.Close()
			return
		}
		s.conns[c] = true
		s.mu.Unlock()
		s.wg.Go(func() {
			err := serveNBD(c, s.disk)
			c.Close()
			s.mu.Lock()
			defer s.mu.Unlock()
			delete(s.conns, c)
			if err != nil && s.err == nil && !s.closed {
				s.err = err
			}
		})
	}
}

// Close ends the service, waits for what is under way, and returns what went wrong, but for the going of clients.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		c.Close()
	}
	s.mu.Unlock()
	s.l.Close()
	s.wg.Wait()
	return s.err
}

// serveNBD speaks with one client until it goes.
func serveNBD(c net.Conn, d *Disk) error {
	r, w := bufio.NewReaderSize(c, 256<<10), bufio.NewWriterSize(c, 256<<10)
	ok, err := negotiate(r, w, d.Size())
	if err == nil && ok {
		err = transmit(r, w, d)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return nil // a QEMU that was killed
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return nil
	}
	return err
}

func put(w io.Writer, fields ...any) error {
	for _, f := range fields {
		if err := binary.Write(w, binary.BigEndian, f); err != nil {
			return err
		}
	}
	return nil
}

// negotiate reports whether transmission follows.
func negotiate(r *bufio.Reader, w *bufio.Writer, size int64) (bool, error) {
	if err := errors.Join(put(w, uint64(nbdMagic), uint64(nbdOption), uint16(nbdHandshakeFlags)), w.Flush()); err != nil {
		return false, err
	}
	var flags uint32
	if err := binary.Read(r, binary.BigEndian, &flags); err != nil {
		return false, err
	}
	for {
		var h struct {
			Magic       uint64
			Option, Len uint32
		}
		if err := binary.Read(r, binary.BigEndian, &h); err != nil {
			return false, err
		}
		if h.Magic != nbdOption || h.Len > nbdMaxOption {
			return false, fmt.Errorf("qemu: NBD option with magic %#x and %d bytes", h.Magic, h.Len)
		}
		if _, err := r.Discard(int(h.Len)); err != nil {
			return false, err
		}
		reply := func(kind uint32, b ...any) error {
			return errors.Join(put(w, uint64(nbdOptionReply), h.Option, kind), put(w, b...))
		}
		var err error
		switch h.Option {
		case nbdOptExportName:
			return true, errors.Join(put(w, uint64(size), uint16(nbdFlags)), w.Flush())
		case nbdOptAbort:
			return false, errors.Join(reply(nbdRepAck, uint32(0)), w.Flush())
		case nbdOptInfo, nbdOptGo:
			err = errors.Join(reply(nbdRepInfo, uint32(12), uint16(0), uint64(size), uint16(nbdFlags)), reply(nbdRepAck, uint32(0)))
		default:
			err = reply(nbdRepErrUnsup, uint32(0))
		}
		if err = errors.Join(err, w.Flush()); err != nil || h.Option == nbdOptGo {
			return err == nil, err
		}
	}
}

type nbdHeader struct {
	Magic       uint32
	Flags, Type uint16
	Cookie, Off uint64
	Len         uint32
}

// transmit does what the client asks until it disconnects.
func transmit(r *bufio.Reader, w *bufio.Writer, d *Disk) error {
	for {
		var h nbdHeader
		if err := binary.Read(r, binary.BigEndian, &h); err != nil {
			return err
		}
		if h.Magic != nbdRequest {
			return fmt.Errorf("qemu: NBD request with magic %#x", h.Magic)
		}
		var data []byte
		carries := h.Type == nbdRead || h.Type == nbdWrite
		if carries && h.Len > nbdMaxRequest {
			return fmt.Errorf("qemu: NBD request of %d bytes", h.Len)
		}
		if carries {
			data = make([]byte, h.Len)
		}
		if h.Type == nbdWrite {
			if _, err := io.ReadFull(r, data); err != nil {
				return err
			}
		}
		if h.Type == nbdDisconnect {
			return nil
		}
		code := do(d, h, data)
		if err := put(w, uint32(nbdReply), code, h.Cookie); err != nil {
			return err
		}
		if h.Type == nbdRead && code == 0 {
			w.Write(data) // an error comes again with Flush
		}
		if r.Buffered() == 0 || w.Buffered() > 1<<20 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
	}
}

// do does one request and returns its error code.
func do(d *Disk, h nbdHeader, data []byte) uint32 {
	if h.Off > 1<<62 {
		return nbdInvalid
	}
	off, fua := int64(h.Off), h.Flags&nbdFUA != 0
	var err error
	switch h.Type {
	case nbdRead:
		_, err = d.ReadAt(data, off)
	case nbdWrite:
		_, err = d.write(data, off, fua)
	case nbdFlush:
		d.flush()
	case nbdTrim: // a card may ignore it
		err = d.check(off, int(h.Len))
	case nbdWriteZeroes:
		for left := int64(h.Len); left > 0 && err == nil; {
			n := min(left, int64(len(zeros)))
			_, err = d.write(zeros[:n], off, fua)
			off, left = off+n, left-n
		}
	default:
		return nbdInvalid
	}
	if err != nil {
		return nbdIO
	}
	return 0
}

var zeros [1 << 20]byte
