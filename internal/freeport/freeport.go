// Package freeport finds ports for tests, benchmarks and the demo that must know an address before something listens on
// it, or that listen on it once more.
//
// A port that was got by listening on port 0 and closing again is not such a port: the system may give it to the next
// client or listener that asks for any.
package freeport

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

// The ports lie below the ranges from which Linux (32768) and others (49152) give ports to those who ask for any.
const (
	first = 20000
	count = 12000
)

var (
	mu      sync.Mutex
	next    = rand.IntN(count) // so that processes that cannot see each other's claims rarely meet
	claimed = map[int]io.Closer{}
)

// Addr returns an address of host, an IP address, whose port nothing uses by TCP or UDP. No other call is given that
// port while this process lives; on Linux this holds for all processes of the network namespace. It may be called at
// the same time by several goroutines.
func Addr(host string) (string, error) {
	mu.Lock()
	defer mu.Unlock()
	last := errors.New("this process has them all")
	for range count {
		next = (next + 1) % count
		port := first + next
		if claimed[port] != nil {
			continue
		}
		claim, err := claim(port)
		if err != nil {
			last = err
			continue
		}
		addr := net.JoinHostPort(host, strconv.Itoa(port))
		if last = Check(addr); last == nil {
			claimed[port] = claim
			return addr, nil
		}
		claim.Close() //nolint:errcheck // nothing was written
	}
	return "", fmt.Errorf("no port of %s is free for both TCP and UDP: %w", host, last)
}

// Check returns what keeps a listener from having addr by TCP or UDP; nil if nothing does.
func Check(addr string) error {
	tcp, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	defer tcp.Close() //nolint:errcheck // nobody knew of it
	udp, err := net.ListenPacket("udp", addr)
	if err != nil {
		return err
	}
	return udp.Close()
}
