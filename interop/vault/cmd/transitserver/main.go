// Command transitserver is a Transit engine to play with: for demo, bench and fault tests, never for real keys.
//
// It listens on a loopback address, makes the keys that -key names, writes the files that a client logs in with into -dir (token,
// role_id, secret_id, jwt), and prints one line, "listening http://127.0.0.1:PORT", when it is ready. Below /control/ it takes faults and
// requests of an administrator.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/keyhaven/keyhaven/interop/vault/server"
)

type keyFlags []string

func (k *keyFlags) String() string     { return strings.Join(*k, " ") }
func (k *keyFlags) Set(v string) error { *k = append(*k, v); return nil }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "transitserver:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var keys keyFlags
	var life server.Lifetime
	listen := flag.String("listen", "127.0.0.1:0", "loopback `address` to listen on")
	dir := flag.String("dir", "", "`directory` for the files that clients log in with")
	cert := flag.String("cert", "", "certificate `file`; with -tls-key: serve https")
	key := flag.String("tls-key", "", "private key `file` of the certificate")
	flag.Var(&keys, "key", "`name=type` of a key to make, such as web=ecdsa-p256; may be given again")
	flag.DurationVar(&life.TTL, "ttl", time.Hour, "lifetime of a login")
	flag.DurationVar(&life.Max, "max-ttl", 0, "the most that renewals make of it; 0: no bound")
	flag.Parse()
	if addr, err := netip.ParseAddrPort(*listen); err != nil || !addr.Addr().IsLoopback() {
		return fmt.Errorf("-listen %q: give a loopback IP address and a port", *listen)
	}
	s, err := server.New(ctx)
	if err != nil {
		return err
	}
	for _, k := range keys {
		name, typ, ok := strings.Cut(k, "=")
		if !ok {
			return fmt.Errorf("-key %q: give name=type", k)
		}
		if _, err := s.Do("keys/"+name, map[string]any{"type": typ}); err != nil {
			return err
		}
	}
	if *dir != "" {
		if err := logins(s, *dir, life); err != nil {
			return err
		}
	}
	ln, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	return serve(ctx, ln, s, *cert, *key)
}

// logins makes one login of each kind and writes its files.
func logins(s *server.Server, dir string, life server.Lifetime) error {
	files := map[string]string{"token": s.NewToken(life), "role_id": rand.Text(), "secret_id": rand.Text(), "jwt": rand.Text()}
	s.AddAppRole("approle", files["role_id"], files["secret_id"], life)
	s.AddKubernetes("kubernetes", "keyserver", files["jwt"], life)
	for name, v := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(v+"\n"), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func serve(ctx context.Context, ln net.Listener, s *server.Server, cert, key string) error {
	mux := http.NewServeMux()
	mux.Handle("/v1/", s)
	mux.Handle("/control/", http.StripPrefix("/control", s.Control()))
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	done := make(chan error, 1)
	scheme := "http"
	if cert != "" {
		scheme = "https"
		go func() { done <- srv.ServeTLS(ln, cert, key) }()
	} else {
		go func() { done <- srv.Serve(ln) }()
	}
	fmt.Printf("listening %s://%s\n", scheme, ln.Addr())
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	srv.Close()
	if err := <-done; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
