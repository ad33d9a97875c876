package audit

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// message is what a syslog message of ours looks like.
var message = regexp.MustCompile(`^<(\d+)>1 \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \S+ keyhaven-keyserver \d+ audit - (\{"seq":\d+,.*"\})$`)

// checkMessages reads messages until the log's last checkpoint and checks that they are the log's lines.
func checkMessages(t *testing.T, dir string, next func() (string, error)) {
	t.Helper()
	want := lines(read(t, filepath.Join(dir, fileName(1))))
	for i, line := range want {
		msg, err := next()
		if err != nil {
			t.Fatal(err)
		}
		m := message.FindStringSubmatch(msg)
		if m == nil {
			t.Fatalf("message %q has another form", msg)
		}
		if m[2]+"\n" != string(line) {
			t.Errorf("message %d: got %q, want %q", i, m[2], line)
		}
		pri := 13*8 + 6
		if bytes.Contains(line, []byte(`"result":"refused"`)) {
			pri = 13*8 + 4
		}
		if m[1] != strconv.Itoa(pri) {
			t.Errorf("message %d: got priority %s, want %d", i, m[1], pri)
		}
	}
}

func TestSyslog(t *testing.T) {
	key, _ := newKey(t)
	socket := filepath.Join(t.TempDir(), "log")
	datagrams := func(network, address string) (net.PacketConn, func() (string, error)) {
		c, err := net.ListenPacket(network, address)
		if err != nil {
			t.Fatal(err)
		}
		return c, func() (string, error) {
			buf := make([]byte, 64<<10)
			n, _, err := c.ReadFrom(buf)
			return string(buf[:n]), err
		}
	}
	unix, fromUnix := datagrams("unixgram", socket)
	defer unix.Close()
	udp, fromUDP := datagrams("udp", "127.0.0.1:0")
	defer udp.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	var stream *bufio.Reader
	fromTCP := func() (string, error) {
		if stream == nil {
			c, err := tcp.Accept()
			if err != nil {
				return "", err
			}
			t.Cleanup(func() { c.Close() })
			stream = bufio.NewReader(c)
		}
		size, err := stream.ReadString(' ')
		if err != nil {
			return "", err
		}
		n, err := strconv.Atoi(strings.TrimSuffix(size, " "))
		if err != nil {
			return "", err
		}
		buf := make([]byte, n)
		_, err = io.ReadFull(stream, buf)
		return string(buf), err
	}
	for _, c := range []struct {
		address string
		next    func() (string, error)
	}{
		{"unix:" + socket, fromUnix},
		{"udp:" + udp.LocalAddr().String(), fromUDP},
		{"tcp:" + tcp.Addr().String(), fromTCP},
	} {
		t.Run(c.address[:4], func(t *testing.T) {
			out, err := Syslog(SyslogConfig{Address: c.address})
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, Outputs: []Output{out}})
			l.commit(t, 0, 3)
			refused := testRecord(3)
			refused.Result = "refused"
			if err := l.Commit(t.Context(), refused); err != nil {
				t.Fatal(err)
			}
			if err := l.end(t); err != nil {
				t.Fatal(err)
			}
			checkMessages(t, dir, c.next)
		})
	}
	for _, bad := range []string{"/dev/log", "http:host:1", "tcp:host", "unix:"} {
		if _, err := Syslog(SyslogConfig{Address: bad}); err == nil {
			t.Errorf("address %q was taken", bad)
		}
	}
}

// The lines of an output are the log's, so that a log host holds what it takes to verify.
func TestJSONLines(t *testing.T) {
	key, pub := newKey(t)
	dir, path := t.TempDir(), filepath.Join(t.TempDir(), "copy.jsonl")
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, Outputs: []Output{JSONLines(path)}})
	l.commit(t, 0, 3)
	eventually(t, "lines", func() bool { return l.Stats().Outputs[0].Written >= 4 })
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	l.commit(t, 3, 6)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	both := append(read(t, path+".1"), read(t, path)...)
	if want := read(t, filepath.Join(dir, fileName(1))); !bytes.Equal(both, want) {
		t.Errorf("got  %s\nwant %s", both, want)
	}
	write(t, path, both)
	if rep := verify(t, VerifyConfig{Files: []string{path}, Keys: []crypto.PublicKey{pub}}); rep.Problem != nil || rep.Covered != 6 {
		t.Errorf("the copy: got %+v", rep)
	}
}

// flakyOutput fails until it is told otherwise.
type flakyOutput struct {
	fail  chan struct{} // closed when it shall work
	lines [][]byte
}

func (f *flakyOutput) Name() string { return "flaky" }
func (f *flakyOutput) Close() error { return nil }
func (f *flakyOutput) Write(_ context.Context, line []byte) error {
	select {
	case <-f.fail:
		f.lines = append(f.lines, bytes.Clone(line))
		return nil
	default:
		return errors.New("away")
	}
}

func TestOutputAway(t *testing.T) {
	key, _ := newKey(t)
	out := &flakyOutput{fail: make(chan struct{})}
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, Outputs: []Output{out}})
	l.commit(t, 0, 5)
	eventually(t, "a failure", func() bool { return l.Stats().Outputs[0].Err != "" })
	if l.Ready() != nil {
		t.Error("an output held the log up")
	}
	close(out.fail)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	if got, want := bytes.Join(out.lines, nil), read(t, filepath.Join(dir, fileName(1))); !bytes.Equal(got, want) {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestOutputQueueIsBounded(t *testing.T) {
	out := &flakyOutput{fail: make(chan struct{})}
	q := newOutputQueue(out, discard)
	chunk := bytes.Repeat(append(bytes.Repeat([]byte{'x'}, 4095), '\n'), 16) // 64 KiB
	for range 2 * maxOutputBytes / len(chunk) {
		q.offer(chunk)
	}
	if got, want := q.stats().Lost, uint64(maxOutputBytes/4096); got != want {
		t.Errorf("lost %d lines, want %d", got, want)
	}
	close(out.fail)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	q.run(ctx)
	if s := q.stats(); s.Written != uint64(maxOutputBytes/4096) || q.bytes.Load() != 0 {
		t.Errorf("got %+v, %d bytes", s, q.bytes.Load())
	}
}
