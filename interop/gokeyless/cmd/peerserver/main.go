// Command peerserver runs the key server of github.com/cloudflare/gokeyless, as its library makes it by default, for tests
// and benchmarks. It must be built with the tag pkcs11 to use tokens. It prints "listening on ADDR" when it serves, and
// ends with SIGTERM.
package main

import (
	"bufio"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/cloudflare/gokeyless/protocol"
	"github.com/cloudflare/gokeyless/server"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "peerserver:", err)
		os.Exit(1)
	}
}

func run() error {
	listen := flag.String("listen", "127.0.0.1:0", "host:port")
	cert := flag.String("cert", "", "the server's certificate chain, PEM")
	key := flag.String("key", "", "its private key, PEM")
	ca := flag.String("ca", "", "the authority of clients, PEM")
	uris := flag.String("uris", "", "file with a PKCS#11 URI on each line; options such as max-sessions stand in the URI")
	dir := flag.String("keys", "", "directory of *.key files")
	extras := flag.Bool("extras", false, "seal and unseal with a key of this run, and answer the custom function \"echo\"")
	idle := flag.Duration("idle", 0, "after how long without a request a connection is closed; 0 for the library's own default")
	flag.Parse()

	keys, err := loadKeys(*uris, *dir)
	if err != nil {
		return err
	}
	config := server.DefaultServeConfig()
	if *idle > 0 {
		config = config.WithTCPTimeout(*idle)
	}
	if *extras {
		config = config.WithCustomOpFunction(custom)
	}
	srv, err := server.NewServerFromFile(config, *cert, *key, *ca)
	if err != nil {
		return err
	}
	srv.SetKeystore(keys)
	if *extras {
		s, err := newSealer()
		if err != nil {
			return err
		}
		srv.SetSealer(s)
	}
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	fmt.Printf("listening on %s\n", ln.Addr())
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		return srv.Close()
	}
}

func loadKeys(uris, dir string) (server.Keystore, error) {
	keys := server.NewDefaultKeystore()
	if dir != "" {
		if err := keys.AddFromDir(dir, server.DefaultLoadKey); err != nil {
			return nil, err
		}
	}
	if uris == "" {
		return keys, nil
	}
	f, err := os.Open(uris)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if err := keys.AddFromURI(strings.TrimSpace(lines.Text())); err != nil {
			return nil, fmt.Errorf("a URI of %s: %w", uris, err) // the URI itself holds the PIN
		}
	}
	return keys, lines.Err()
}

// custom answers the function "echo" with its payload and knows no other.
func custom(_ context.Context, op protocol.Operation) ([]byte, error) {
	if op.CustomFuncName != "echo" {
		return nil, protocol.ErrBadOpcode
	}
	return op.Payload, nil
}

// A sealer seals with AES-256-GCM under a key that nobody else has.
type sealer struct{ aead cipher.AEAD }

func newSealer() (*sealer, error) {
	key := make([]byte, 32)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, err
	}
	return &sealer{aead}, nil
}

var errUnseal = errors.New("not sealed here")

// Seal implements the library's Sealer.
func (s *sealer) Seal(op *protocol.Operation) ([]byte, error) {
	return s.aead.Seal(nil, nil, op.Payload, nil), nil
}

// Unseal implements the library's Sealer. What another key sealed, or nobody, is "expired" to the client.
func (s *sealer) Unseal(op *protocol.Operation) ([]byte, error) {
	out, err := s.aead.Open(nil, nil, op.Payload, nil)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", protocol.ErrExpired, errUnseal)
	}
	return out, nil
}
