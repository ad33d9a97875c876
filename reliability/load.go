package reliability

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/mtls"
)

const (
	callers = 4                     // at one time
	pause   = 10 * time.Millisecond // of a caller, between two requests
	timeout = 2 * time.Second       // of a request, as an edge has it
)

// A sample is one request and what became of it.
type sample struct {
	start, end time.Time
	err        error
}

// A Load is clients that ask for handshake signatures all the time, and verify each one.
type Load struct {
	client *keyless.Client
	pub    crypto.PublicKey
	ski    keyless.SKI
	scheme tls.SignatureScheme
	wg     sync.WaitGroup
	cancel context.CancelFunc

	mu      sync.Mutex // guards what follows
	samples []sample
	wrong   int
	paused  chan struct{} // closed when the callers may go on; nil: they run
	resumed []time.Time
	busy    int // requests in flight
}

// startLoad connects as the bench's client and begins to ask. scheme decides which of the keys signs.
func (b *Bench) startLoad(ctx context.Context, addr string, scheme tls.SignatureScheme) (*Load, error) {
	src, err := mtls.OpenDir(b.path(client), nil)
	if err != nil {
		return nil, err
	}
	conf := src.ClientConfig(mtls.ClientOptions{Expect: mtls.AcceptKinds(mtls.KindKeyServer)})
	l := &Load{scheme: scheme, pub: b.keys["ec"]}
	if scheme == tls.PSSWithSHA256 {
		l.pub = b.keys["rsa"]
	}
	if l.ski, err = keyless.SKIOf(l.pub); err != nil {
		return nil, err
	}
	l.client, err = keyless.NewClient(keyless.ClientConfig{Servers: []string{addr}, TLS: func(string) *tls.Config { return conf }, Timeout: timeout})
	if err != nil {
		return nil, err
	}
	ctx, l.cancel = context.WithCancel(ctx)
	for range callers {
		l.wg.Go(func() { l.run(ctx) })
	}
	return l, nil
}

// stop ends the load and waits for it.
func (l *Load) stop() {
	l.cancel()
	l.wg.Wait()
	l.client.Close()
}

func (l *Load) run(ctx context.Context) {
	for ctx.Err() == nil {
		if !l.begin(ctx) {
			return
		}
		s := sample{start: time.Now()}
		s.err = l.Ask(ctx)
		s.end = time.Now()
		l.finish(ctx, s)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (l *Load) begin(ctx context.Context) bool {
	for {
		l.mu.Lock()
		paused := l.paused
		if paused == nil {
			l.busy++
		}
		l.mu.Unlock()
		if paused == nil {
			return true
		}
		select {
		case <-ctx.Done():
			return false
		case <-paused:
		}
	}
}

func (l *Load) finish(ctx context.Context, s sample) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.busy--
	if errors.Is(s.err, errWrong) {
		l.wrong++
	}
	if ctx.Err() == nil { // else the end of the load ended it
		l.samples = append(l.samples, s)
	}
}

// Pause lets the requests in flight end and begins no others.
func (l *Load) Pause(ctx context.Context) error {
	l.mu.Lock()
	if l.paused == nil {
		l.paused = make(chan struct{})
	}
	l.mu.Unlock()
	return poll(ctx, "the requests in flight end", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.busy == 0
	})
}

// Resume lets the callers go on.
func (l *Load) Resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.paused != nil {
		close(l.paused)
		l.paused = nil
		l.resumed = append(l.resumed, time.Now())
	}
}

var errWrong = errors.New("WRONG ANSWER: the signature does not verify")

// what precedes the transcript hash in a server's CertificateVerify (RFC 8446, section 4.4.3).
var serverContext = strings.Repeat(" ", 64) + "TLS 1.3, server CertificateVerify\x00"

// message is what a server signs in a handshake: of TLS 1.3, or of TLS 1.2 if the scheme is for that alone. There it is two
// randoms and an X25519 share (RFC 8422, section 5.4).
func (l *Load) message() []byte {
	if l.scheme != tls.PKCS1WithSHA256 {
		msg := append([]byte(serverContext), make([]byte, sha256.Size)...)
		rand.Read(msg[len(serverContext):])
		return msg
	}
	msg := make([]byte, 64+4+32)
	rand.Read(msg)
	copy(msg[64:], []byte{3, 0, 29, 32})
	return msg
}

// Ask has a handshake signed and verifies the signature. ECDSA signatures that are not in minimal DER count as wrong.
func (l *Load) Ask(ctx context.Context) error {
	msg := l.message()
	sig, err := l.client.Do(ctx, &keyless.Operation{
		Opcode: keyless.OpCustom, CustomFunc: keyless.FuncTLSSign, SKI: l.ski, SNI: "www.example.com",
		Payload: keyless.AppendTLSSign(nil, l.scheme, msg),
	})
	if err != nil {
		return err
	}
	digest := sha256.Sum256(msg)
	switch pub := l.pub.(type) {
	case *ecdsa.PublicKey:
		if !ecdsa.VerifyASN1(pub, digest[:], sig) {
			return errWrong
		}
	case *rsa.PublicKey:
		err = rsa.VerifyPSS(pub, crypto.SHA256, digest[:], sig, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		if l.scheme == tls.PKCS1WithSHA256 {
			err = rsa.VerifyPKCS1v15(pub, crypto.SHA256, digest[:], sig)
		}
		if err != nil {
			return errWrong
		}
	}
	return nil
}

// good counts the requests in a row that went well up to now, and all that have ended.
func (l *Load) good() (inRow, all int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := len(l.samples) - 1; i >= 0 && l.samples[i].err == nil; i-- {
		inRow++
	}
	return inRow, len(l.samples)
}

// patience bounds every wait; it is no measurement.
const patience = 40 * time.Second

// poll waits until ok.
func poll(ctx context.Context, what string, ok func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for !ok() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("never: %s", what)
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}
