package keyless

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"sync"
	"time"
)

// ErrNotTLS says that a key was asked to sign something other than a TLS handshake. A key that is to sign other things,
// too, needs KeyOptions.Plain, and a server that permits it.
var ErrNotTLS = errors.New("keyless: key signs TLS server handshakes only")

// KeyOptions say how a Key uses the servers. The zero value is the strict one.
type KeyOptions struct {
	// Plain uses the digest operations of the protocol instead of keyhaven/tls-sign, for servers of other makes. The
	// servers then sign whatever they are sent.
	Plain bool
	// AllowDecrypt enables Decrypt, for TLS 1.2 clients without ECDHE. RSA keys only.
	AllowDecrypt bool
	// Timeout bounds one operation; 0 means ClientConfig.Timeout.
	Timeout time.Duration
	// NoVerify returns signatures unchecked. For measuring; a server that signs wrongly would go unnoticed.
	NoVerify bool
}

// A Key is a private key that lives behind a Client. It implements crypto.Signer, crypto.MessageSigner and
// crypto.Decrypter, and is safe for concurrent use. Unless told otherwise it verifies each signature with the public
// half before it returns it.
type Key struct {
	client *Client
	pub    crypto.PublicKey
	ski    SKI
	opts   KeyOptions
}

// Key returns the key with this public half: *rsa.PublicKey, *ecdsa.PublicKey or ed25519.PublicKey. No server is asked
// whether it has it.
func (c *Client) Key(pub crypto.PublicKey, o KeyOptions) (*Key, error) {
	switch pub.(type) {
	case *rsa.PublicKey:
	case *ecdsa.PublicKey, ed25519.PublicKey:
		if o.AllowDecrypt {
			return nil, fmt.Errorf("keyless: AllowDecrypt with a key of type %T, only RSA keys decrypt", pub)
		}
	default:
		return nil, fmt.Errorf("keyless: key of type %T, want RSA, ECDSA or Ed25519", pub)
	}
	ski, err := SKIOf(pub)
	if err != nil {
		return nil, err
	}
	if o.Timeout <= 0 {
		o.Timeout = c.cfg.Timeout
	}
	return &Key{client: c, pub: pub, ski: ski, opts: o}, nil
}

// Public returns the public half.
func (k *Key) Public() crypto.PublicKey { return k.pub }

// SKI returns the name that requests carry.
func (k *Key) SKI() SKI { return k.ski }

// SignMessage signs msg, hashed with opts.HashFunc() (not at all for Ed25519), for a handshake that is not known.
// Without KeyOptions.Plain it signs only what a TLS server signs in a handshake and fails with ErrNotTLS for anything
// else. rand is not used.
func (k *Key) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return (&boundKey{key: k, ctx: context.Background()}).signMessage(msg, opts)
}

// Sign signs a digest, which only works with KeyOptions.Plain: a digest does not show what it is a digest of. For
// Ed25519 the "digest" is the message, and Sign is SignMessage.
func (k *Key) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return (&boundKey{key: k, ctx: context.Background()}).sign(digest, opts)
}

// Decrypt recovers an RSA session key (TLS 1.2 without ECDHE). It needs KeyOptions.AllowDecrypt, and opts must be
// *rsa.PKCS1v15DecryptOptions with a SessionKeyLen: with bad padding the result is a random key of that length, in the
// same time and without an error, so that nobody learns whether the padding was good. rand is not used.
func (k *Key) Decrypt(_ io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	return (&boundKey{key: k, ctx: context.Background()}).decrypt(ciphertext, opts)
}

// For binds the key to one handshake: its context, the visitor's SNI, and the addresses of visitor and server, which
// go into each request. The result also implements crypto.MessageSigner, and crypto.Decrypter if KeyOptions.AllowDecrypt
// is set, so that crypto/tls offers RSA key exchange only then. It is cheap and made anew for each handshake.
func (k *Key) For(ctx context.Context, sni string, client, server netip.Addr) crypto.Signer {
	b := boundKey{key: k, ctx: ctx, sni: sni, client: client, server: server}
	if k.opts.AllowDecrypt {
		return &boundDecrypter{boundSigner{b}}
	}
	return &boundSigner{b}
}

// A boundKey is a key within one handshake.
type boundKey struct {
	key            *Key
	ctx            context.Context
	sni            string
	client, server netip.Addr
}

type boundSigner struct{ boundKey }

func (b *boundSigner) Public() crypto.PublicKey { return b.key.pub }

func (b *boundSigner) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	return b.sign(digest, opts)
}

func (b *boundSigner) SignMessage(_ io.Reader, msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	return b.signMessage(msg, opts)
}

type boundDecrypter struct{ boundSigner }

func (b *boundDecrypter) Decrypt(_ io.Reader, ciphertext []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	return b.decrypt(ciphertext, opts)
}

var (
	_ crypto.MessageSigner = (*Key)(nil)
	_ crypto.Decrypter     = (*Key)(nil)
	_ crypto.MessageSigner = (*boundSigner)(nil)
	_ crypto.MessageSigner = (*boundDecrypter)(nil)
	_ crypto.Decrypter     = (*boundDecrypter)(nil)
)

func (b *boundKey) signMessage(msg []byte, opts crypto.SignerOpts) ([]byte, error) {
	kind, hash, err := algorithm(b.key.pub, opts)
	if err != nil {
		return nil, err
	}
	if b.key.opts.Plain {
		return b.signPlain(kind, hash, digestOf(hash, msg))
	}
	return b.signTLS(kind, hash, msg)
}

func (b *boundKey) sign(digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	kind, hash, err := algorithm(b.key.pub, opts)
	switch {
	case err != nil:
		return nil, err
	case b.key.opts.Plain:
		return b.signPlain(kind, hash, digest)
	case kind == kindEd25519:
		return b.signTLS(kind, hash, digest)
	}
	return nil, fmt.Errorf("%w: sign was called with a digest, which does not show what it is of", ErrNotTLS)
}

// signTLS asks for a context-bound signature.
func (b *boundKey) signTLS(kind sigKind, hash crypto.Hash, msg []byte) ([]byte, error) {
	sch, ok := schemeOf(kind, hash)
	if !ok {
		return nil, fmt.Errorf("%w: no TLS signature scheme uses %v", ErrNotTLS, hash)
	}
	buf := payloads.Get().(*[]byte)
	defer payloads.Put(buf)
	*buf = AppendTLSSign((*buf)[:0], sch, msg)
	if _, err := ParseTLSSign(*buf); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotTLS, err)
	}
	sig, err := b.do(&Operation{Opcode: OpCustom, CustomFunc: FuncTLSSign, Payload: *buf})
	if err != nil || b.key.opts.NoVerify {
		return sig, err
	}
	if err := verify(b.key.pub, kind, hash, digestOf(hash, msg), sig); err != nil {
		return nil, fmt.Errorf("keyless: key %s: %w", b.key.ski, err)
	}
	return sig, nil
}

// payloads holds buffers for tls-sign payloads. Do copies them before it returns.
var payloads = sync.Pool{New: func() any { return new([]byte) }}

// signPlain asks for a signature over a digest (over the message for Ed25519).
func (b *boundKey) signPlain(kind sigKind, hash crypto.Hash, digest []byte) ([]byte, error) {
	op, ok := plainOpcode(kind, hash)
	if !ok {
		return nil, fmt.Errorf("keyless: the protocol has no operation for this signature with %v", hash)
	}
	if hash != 0 && len(digest) != hash.Size() {
		return nil, fmt.Errorf("keyless: digest of %d bytes, %v has %d", len(digest), hash, hash.Size())
	}
	sig, err := b.do(&Operation{Opcode: op, Payload: digest})
	if err != nil || b.key.opts.NoVerify {
		return sig, err
	}
	if err := verify(b.key.pub, kind, hash, digest, sig); err != nil {
		return nil, fmt.Errorf("keyless: key %s: %w", b.key.ski, err)
	}
	return sig, nil
}

// do completes op with the key and the handshake, and sends it.
func (b *boundKey) do(op *Operation) ([]byte, error) {
	op.SKI = b.key.ski
	op.SNI, op.ClientIP, op.ServerIP = b.sni, b.client, b.server
	return b.key.client.do(b.ctx, op, b.key.opts.Timeout)
}

// algorithm reads the signature's kind and hash out of the options that crypto/tls and crypto/x509 pass.
func algorithm(pub crypto.PublicKey, opts crypto.SignerOpts) (sigKind, crypto.Hash, error) {
	if opts == nil {
		opts = crypto.Hash(0)
	}
	hash := opts.HashFunc()
	switch pub.(type) {
	case *rsa.PublicKey:
		pss, ok := opts.(*rsa.PSSOptions)
		switch {
		case hash == 0:
			return 0, 0, errors.New("keyless: RSA signatures need a hash")
		case !ok:
			return kindPKCS1v15, hash, nil
		case pss.SaltLength != rsa.PSSSaltLengthEqualsHash && pss.SaltLength != hash.Size():
			return 0, 0, fmt.Errorf("keyless: RSA-PSS salt length %d, the protocol has the hash's length only", pss.SaltLength)
		}
		return kindPSS, hash, nil
	case *ecdsa.PublicKey:
		if hash == 0 {
			return 0, 0, errors.New("keyless: ECDSA signatures need a hash")
		}
		return kindECDSA, hash, nil
	default:
		if hash != 0 {
			return 0, 0, errors.New("keyless: Ed25519 signs messages, not digests (Ed25519ph is not supported)")
		}
		return kindEd25519, 0, nil
	}
}

// schemeOf finds the TLS scheme for a kind and a hash, of which there is at most one.
func schemeOf(kind sigKind, hash crypto.Hash) (tls.SignatureScheme, bool) {
	for id, s := range schemes {
		if s.kind == kind && s.hash == hash {
			return id, true
		}
	}
	return 0, false
}

// plainOpcode finds the digest operation for a kind and a hash.
func plainOpcode(kind sigKind, hash crypto.Hash) (Opcode, bool) {
	first, last := OpRSASignMD5SHA1, OpRSASignSHA512
	switch kind {
	case kindPSS:
		first, last = OpRSAPSSSignSHA256, OpRSAPSSSignSHA512
	case kindECDSA:
		first, last = OpECDSASignMD5SHA1, OpECDSASignSHA512
	case kindEd25519:
		first, last = OpEd25519Sign, OpEd25519Sign
	}
	for op := first; op <= last; op++ {
		if op.Hash() == hash {
			return op, true
		}
	}
	return 0, false
}

// digestOf hashes msg, unless hash is 0.
func digestOf(hash crypto.Hash, msg []byte) []byte {
	if hash == 0 {
		return msg
	}
	return sum(hash, msg)
}
