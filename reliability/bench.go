package reliability

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/keyhaven/keyhaven/internal/faultmodule"
	"github.com/keyhaven/keyhaven/internal/softhsm"
)

const (
	domain = "keys.example"
	client = "one"
)

// A Bench holds what all rows share: the program, an authority with a server and a client, and tokens to copy, which hold the
// same two keys. It is safe for concurrent use.
type Bench struct {
	dir     string
	program string
	tokens  []*softhsm.Token
	keys    map[string]crypto.PublicKey // by type: "ec" and "rsa"
}

// maxHomes is how many tokens a row can have.
const maxHomes = 2

// NewBench prepares dir for rows that run program, the key server.
func NewBench(ctx context.Context, dir, program string) (*Bench, error) {
	b := &Bench{dir: dir, program: program, keys: map[string]crypto.PublicKey{}}
	for _, args := range [][]string{
		{"ca", "init", "--ca-dir", b.path("ca"), "--trust-domain", domain},
		{"ca", "issue", "hsm", "--ca-dir", b.path("ca"), "--out", b.path("tls")},
		{"client", "add", client, "--ca-dir", b.path("ca"), "--out", b.path(client)},
	} {
		if out, err := exec.CommandContext(ctx, program, args...).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("reliability: %v: %w: %s", args, err, out)
		}
	}
	files, err := b.makeKeys()
	if err != nil {
		return nil, err
	}
	for i := range maxHomes {
		t, err := softhsm.Create(b.path(fmt.Sprintf("token%d", i)))
		if err != nil {
			return nil, err
		}
		for name, file := range files {
			imp := exec.CommandContext(ctx, "softhsm2-util", "--import", file, "--token", t.Label, "--pin", t.PIN, "--label", name, "--id", fmt.Sprintf("%x", name))
			imp.Env = append(os.Environ(), t.Env())
			if out, err := imp.CombinedOutput(); err != nil {
				return nil, fmt.Errorf("reliability: import a key: %w: %s", err, out)
			}
		}
		b.tokens = append(b.tokens, t)
	}
	return b, nil
}

func (b *Bench) path(name string) string { return filepath.Join(b.dir, name) }

// makeKeys writes a key of each type to a file.
func (b *Bench) makeKeys() (map[string]string, error) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	rs, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	files := map[string]string{}
	for name, key := range map[string]crypto.Signer{"ec": ec, "rsa": rs} {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		files[name] = b.path(name + ".pem")
		if err := os.WriteFile(files[name], pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
			return nil, fmt.Errorf("reliability: %w", err)
		}
		b.keys[name] = key.Public()
	}
	return files, nil
}

// A Home is one token of a row, behind a module of its own.
type Home struct {
	*faultmodule.Control
	Token   *softhsm.Token
	module  string
	PINFile string
	Files   string // SoftHSM's directory of tokens
}

// home copies a token into dir and puts a module before it.
func (b *Bench) home(dir string, i int) (*Home, error) {
	t := b.tokens[i]
	soft := filepath.Join(dir, "softhsm")
	if err := os.CopyFS(soft, os.DirFS(t.Dir)); err != nil {
		return nil, fmt.Errorf("reliability: copy a token: %w", err)
	}
	conf, err := os.ReadFile(t.Conf)
	if err != nil {
		return nil, fmt.Errorf("reliability: %w", err)
	}
	own := filepath.Join(soft, filepath.Base(t.Conf))
	if err := os.WriteFile(own, []byte(strings.ReplaceAll(string(conf), t.Dir, soft)), 0o600); err != nil {
		return nil, fmt.Errorf("reliability: %w", err)
	}
	h := &Home{Token: t, PINFile: filepath.Join(dir, "pin"), Files: filepath.Join(soft, "tokens")}
	if err := os.WriteFile(h.PINFile, []byte(t.PIN+"\n"), 0o600); err != nil {
		return nil, fmt.Errorf("reliability: %w", err)
	}
	if h.module, err = faultmodule.Build(dir); err != nil {
		return nil, err
	}
	h.Control, err = faultmodule.New(dir, t.Module, "SOFTHSM2_CONF="+own)
	return h, err
}
