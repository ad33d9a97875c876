package keyless

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// cpuTime is the CPU time that the process has used, both ends together.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// inFlight runs f from n goroutines, b.N times in all, and reports CPU time per operation.
func inFlight(b *testing.B, n int, f func() error) {
	b.ReportAllocs()
	var done atomic.Int64
	var wg sync.WaitGroup
	b.ResetTimer()
	start := cpuTime()
	for range n {
		wg.Go(func() {
			for done.Add(1) <= int64(b.N) {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	b.StopTimer()
	b.ReportMetric(float64(cpuTime()-start)/float64(b.N)/1e3, "cpu-µs/op")
}

func benchClient(b *testing.B, h Handler) *Client {
	addr, _ := startServer(b, &Server{Handler: h})
	c := startClient(b, ClientConfig{Servers: []string{addr}})
	if _, err := c.Do(context.Background(), &Operation{Opcode: OpPing}); err != nil {
		b.Fatal(err)
	}
	return c
}

// BenchmarkLoop measures what the protocol itself costs: a handler that does nothing, over TLS on loopback.
func BenchmarkLoop(b *testing.B) {
	for _, n := range []int{1, 8, 64} {
		b.Run(fmt.Sprintf("inflight=%d", n), func(b *testing.B) {
			c := benchClient(b, echo)
			op := Operation{Opcode: OpECDSASignSHA256, SKI: SKI{1}, Payload: make([]byte, 32), SNI: "www.keyhaven.test"}
			inFlight(b, n, func() error {
				_, err := c.Do(context.Background(), &op)
				return err
			})
		})
	}
}

// BenchmarkSign measures signatures with a key in the server's memory, and the same signatures without a server.
func BenchmarkSign(b *testing.B) {
	msg := tls13Message(32)
	digest := sha256.Sum256(msg)
	for _, k := range []struct {
		name string
		key  crypto.Signer
	}{{"P256", p256Key()}, {"RSA2048", rsaKey()}} {
		opts := signOpts(kindECDSA, crypto.SHA256)
		if k.name == "RSA2048" {
			opts = signOpts(kindPSS, crypto.SHA256)
		}
		b.Run(k.name+"/local", func(b *testing.B) {
			inFlight(b, 64, func() error {
				_, err := k.key.Sign(rand.Reader, digest[:], opts)
				return err
			})
		})
		for _, n := range []int{1, 8, 64} {
			b.Run(fmt.Sprintf("%s/inflight=%d", k.name, n), func(b *testing.B) {
				c := benchClient(b, signingHandler(k.key))
				key := must(c.Key(k.key.Public(), KeyOptions{NoVerify: true}))
				inFlight(b, n, func() error {
					_, err := key.SignMessage(nil, msg, opts)
					return err
				})
			})
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	p := Packet{Major: 1, Operation: Operation{Opcode: OpECDSASignSHA256, SKI: SKI{1}, Payload: make([]byte, 32), SNI: "www.keyhaven.test"}}
	buf := make([]byte, 0, 2048)
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = p.Append(buf[:0])
	}
}

func BenchmarkParseBody(b *testing.B) {
	p := Packet{Major: 1, Operation: Operation{Opcode: OpECDSASignSHA256, SKI: SKI{1}, Payload: make([]byte, 32), SNI: "www.keyhaven.test"}}
	body := must(p.Append(nil))[HeaderSize:]
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ParseBody(body); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkParseTLSSign(b *testing.B) {
	for _, c := range []struct {
		name    string
		payload []byte
	}{
		{"tls13", AppendTLSSign(nil, 0x0403, tls13Message(32))},
		{"tls12-P256", AppendTLSSign(nil, 0x0403, tls12Message(23))},
		{"tls12-X25519", AppendTLSSign(nil, 0x0403, tls12Message(29))},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := ParseTLSSign(c.payload); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
