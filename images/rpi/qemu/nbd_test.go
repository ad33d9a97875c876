package qemu

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"testing"
)

// nbdClient is the other side of the protocol.
type nbdClient struct {
	t *testing.T
	c net.Conn
}

func dialNBD(t *testing.T, socket string) *nbdClient {
	t.Helper()
	c, err := net.Dial("unix", socket)
	must(t, err)
	t.Cleanup(func() { c.Close() })
	n := &nbdClient{t, c}
	n.expect(uint64(nbdMagic), uint64(nbdOption), uint16(nbdHandshakeFlags))
	n.send(uint32(nbdHandshakeFlags))
	return n
}

func (n *nbdClient) send(fields ...any) {
	n.t.Helper()
	must(n.t, put(n.c, fields...))
}

func (n *nbdClient) expect(fields ...any) {
	n.t.Helper()
	var want bytes.Buffer
	must(n.t, put(&want, fields...))
	got := make([]byte, want.Len())
	_, err := io.ReadFull(n.c, got)
	must(n.t, err)
	if !bytes.Equal(got, want.Bytes()) {
		n.t.Fatalf("got %x, want %x", got, want.Bytes())
	}
}

func serve(t *testing.T, d *Disk) (*Server, string) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	s, err := Serve(d, socket)
	must(t, err)
	t.Cleanup(func() { s.Close() })
	return s, socket
}

func TestServer(t *testing.T) {
	d := newDisk(t)
	r := d.Record()
	s, socket := serve(t, d)
	n := dialNBD(t, socket)
	n.send(uint64(nbdOption), uint32(8), uint32(2), uint16(0)) // structured replies
	n.expect(uint64(nbdOptionReply), uint32(8), uint32(nbdRepErrUnsup), uint32(0))
	n.send(uint64(nbdOption), uint32(nbdOptGo), uint32(6), uint32(0), uint16(0))
	n.expect(uint64(nbdOptionReply), uint32(nbdOptGo), uint32(nbdRepInfo), uint32(12), uint16(0), uint64(d.Size()), uint16(nbdFlags))
	n.expect(uint64(nbdOptionReply), uint32(nbdOptGo), uint32(nbdRepAck), uint32(0))
	request := func(flags, kind uint16, off uint64, length uint32, data ...any) {
		n.send(append([]any{uint32(nbdRequest), flags, kind, uint64(7), off, length}, data...)...)
	}
	request(0, nbdWrite, 100, 4, []byte("gate"))
	n.expect(uint32(nbdReply), uint32(0), uint64(7))
	request(0, nbdFlush, 0, 0)
	n.expect(uint32(nbdReply), uint32(0), uint64(7))
	request(nbdFUA, nbdWriteZeroes, 102, 1)
	n.expect(uint32(nbdReply), uint32(0), uint64(7))
	request(0, nbdRead, 99, 6)
	n.expect(uint32(nbdReply), uint32(0), uint64(7), []byte("bga\x00eb"))
	request(0, nbdTrim, 0, blockSize)
	n.expect(uint32(nbdReply), uint32(0), uint64(7))
	for _, bad := range []struct {
		kind uint16
		off  uint64
		code uint32
	}{{nbdRead, uint64(d.Size()), nbdIO}, {nbdWrite, 1 << 63, nbdInvalid}, {99, 0, nbdInvalid}} {
		var data []any
		if bad.kind == nbdWrite {
			data = append(data, byte(0))
		}
		request(0, bad.kind, bad.off, 1, data...)
		n.expect(uint32(nbdReply), bad.code, uint64(7))
	}
	request(0, nbdDisconnect, 0, 0)
	must(t, s.Close())
	ops := r.Ops()
	if len(ops) != 3 || ops[0].Off != 100 || !ops[1].Flush || !ops[2].FUA || ops[2].Off != 102 {
		t.Errorf("the record is %+v", ops)
	}
}

// A QEMU that is killed in the middle of a request is nothing to report.
func TestServerSurvivesAKilledClient(t *testing.T) {
	s, socket := serve(t, newDisk(t))
	n := dialNBD(t, socket)
	n.send(uint64(nbdOption), uint32(nbdOptExportName), uint32(0))
	n.expect(uint64(16*blockSize), uint16(nbdFlags))
	n.send(uint32(nbdRequest), uint16(0), uint16(nbdWrite), uint64(1), uint64(0), uint32(4096), []byte("half"))
	n.c.Close()
	must(t, s.Close())
}

// FuzzTransmit plays a client that says anything: the server must end, without a panic and with a disk of the same size.
func FuzzTransmit(f *testing.F) {
	var seed bytes.Buffer
	put(&seed, uint32(nbdRequest), uint16(0), uint16(nbdWrite), uint64(1), uint64(8), uint32(2), []byte("hi"))
	put(&seed, uint32(nbdRequest), uint16(0), uint16(nbdRead), uint64(2), uint64(8), uint32(2))
	f.Add(seed.Bytes())
	f.Add(binary.BigEndian.AppendUint32(nil, nbdRequest))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := NewDisk(bytes.NewReader(make([]byte, blockSize)), blockSize)
		must(t, err)
		var out bytes.Buffer
		transmit(bufio.NewReader(bytes.NewReader(b)), bufio.NewWriter(&out), d)
		if len(d.blocks) > 1 {
			t.Error("writes beyond the disk were kept")
		}
	})
}
