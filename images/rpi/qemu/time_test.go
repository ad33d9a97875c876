//go:build image

package qemu

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/internal/testnet"
)

// timeYAML names the test's time server, in place of public ones, which cannot be reached here.
const timeYAML = "ntp: [10.0.2.2]\n"

// timeServer answers SNTP requests with the host's time. See RFC 5905, figure 8.
func timeServer(t *testing.T, ns *testnet.Namespace) {
	t.Helper()
	var c net.PacketConn
	must(t, ns.Do(func() (err error) {
		c, err = net.ListenPacket("udp", "127.0.0.1:123")
		return err
	}))
	done := make(chan struct{})
	t.Cleanup(func() { c.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 512)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			if n < 48 {
				continue
			}
			now := time.Now()
			stamp := uint64(now.Unix()+2208988800)<<32 | uint64(now.Nanosecond())<<32/1e9
			out := make([]byte, 48)
			out[0], out[1], out[2], out[3] = 4<<3|4, 2, b[2], 0xec // version 4, server, stratum 2
			copy(out[12:], []byte{127, 0, 0, 1})
			binary.BigEndian.PutUint64(out[16:], stamp)
			copy(out[24:32], b[40:48]) // their transmit time
			binary.BigEndian.PutUint64(out[32:], stamp)
			binary.BigEndian.PutUint64(out[40:], stamp)
			c.WriteTo(out, from)
		}
	}()
}

// epochLine matches what a list of files says of the file whose time systemd moves an earlier clock to.
var epochLine = regexp.MustCompile(`(?m)^usr/lib/clock-epoch [A-Z] (\d+) `)

// setBuilt makes a slot one that was built at another time.
func setBuilt(f *FAT, dir string, built time.Time) error {
	if _, err := changeInfo(f, func(i *slotInfo) { i.Built = built.Format(time.RFC3339) }); err != nil {
		return err
	}
	b, err := f.Read("root.squashfs")
	if err != nil {
		return err
	}
	was, list, is := filepath.Join(dir, "was"), filepath.Join(dir, "list"), filepath.Join(dir, "is")
	if err := os.WriteFile(was, b, 0o600); err != nil {
		return err
	}
	if out, err := exec.Command("unsquashfs", "-pf", list, was).CombinedOutput(); err != nil {
		return fmt.Errorf("unsquashfs: %w: %s", err, out)
	}
	if b, err = os.ReadFile(list); err != nil {
		return err
	}
	at, now := epochLine.FindSubmatchIndex(b), strconv.FormatInt(built.Unix(), 10)
	if at == nil || at[3]-at[2] != len(now) {
		return errors.New("the root file system has no usr/lib/clock-epoch, or of another century")
	}
	copy(b[at[2]:], now)
	if err := os.WriteFile(list, b, 0o600); err != nil {
		return err
	}
	out, err := exec.Command("mksquashfs", "-", is, "-pf", list, "-quiet", "-no-progress", "-comp", "zstd", "-Xcompression-level", "3").CombinedOutput()
	if err != nil {
		return fmt.Errorf("mksquashfs: %w: %s", err, out)
	}
	if b, err = os.ReadFile(is); err != nil {
		return err
	}
	return f.Write("root.squashfs", b)
}
