package worker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"sync"
	"testing"
	"testing/iotest"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

func TestFramesThroughASocket(t *testing.T) {
	r, w := net.Pipe()
	out := newFrameWriter()
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := out.run(w); err != nil {
			t.Error(err)
		}
		w.Close()
	})
	const n = 2000
	big := bytes.Repeat([]byte{7}, maxFrame-frameHeader)
	wg.Go(func() {
		for i := range uint32(n) {
			body := []byte(fmt.Sprint(i))
			if i%500 == 0 {
				body = big
			}
			out.send(framePulse, i, body)
		}
		out.close()
	})
	in := newFrameReader(iotest.HalfReader(r))
	for i := range uint32(n) {
		f, err := in.next()
		if err != nil {
			t.Fatal(err)
		}
		if f.id != i || f.typ != framePulse || i%500 != 0 && string(f.body) != fmt.Sprint(i) || i%500 == 0 && !bytes.Equal(f.body, big) {
			t.Fatalf("got frame %d of type %d, want %d", f.id, f.typ, i)
		}
	}
	if _, err := in.next(); err != io.EOF {
		t.Errorf("got %v, want io.EOF", err)
	}
	wg.Wait()
}

func TestErrorsKeepTheirIdentity(t *testing.T) {
	for _, s := range sentinels {
		err := fmt.Errorf("pkcs11: sign with key %q: %w: %w", "k", s, ck.Error(ck.CKR_PIN_INCORRECT))
		got, bad := decodeError(encodeError(err))
		if bad != nil {
			t.Fatal(bad)
		}
		for _, other := range append(sentinels, ck.Error(ck.CKR_PIN_INCORRECT), ck.Error(ck.CKR_DEVICE_ERROR), context.Canceled) {
			if errors.Is(got, other) != errors.Is(err, other) {
				t.Errorf("%v: being %v is %v, was %v", err, other, errors.Is(got, other), errors.Is(err, other))
			}
		}
	}
	if len(sentinels) > 32 {
		t.Errorf("%d sentinels do not fit the mask", len(sentinels))
	}
}

// FuzzWorkerFrames: what a pool sends a worker, from the socket to the jobs.
func FuzzWorkerFrames(f *testing.F) {
	f.Add(appendFrame(nil, frameOpen, 0, encodeJSON(openRequest{URI: "pkcs11:token=a"})))
	f.Add(appendRequest(nil, frameSign, 7, &signRequest{1, signer.Algorithm{Kind: signer.ECDSA, Hash: 5}, []byte("input")}))
	f.Add(appendRequest(nil, frameDecrypt, 7, &signRequest{key: 1, input: []byte("input")}))
	f.Add(appendFrame(appendFrame(nil, frameLeave, 1, []byte{leaveDenied}, encodeError(signer.ErrNotFound)), frameQuit, 0))
	f.Add(appendFrame(appendFrame(nil, frameCancel, 1), frameCheck, 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newServer()
		s.leaves[1] = make(chan leaveReply, 1)
		s.token = new(pkcs11.Token)
		s.keys[1] = stubKey{}
		close(s.ready)
		r := newFrameReader(bytes.NewReader(b))
		for {
			fr, err := r.next()
			if err != nil || s.handle(fr) != nil {
				return
			}
		}
	})
}

type stubKey struct{ signer.Key }

// FuzzPoolFrames: a module that has taken over its worker sends what it likes.
func FuzzPoolFrames(f *testing.F) {
	f.Add(appendFrame(nil, frameConfined, 0, encodeJSON(confinement{Landlock: 3, Lacks: []string{"x"}})))
	f.Add(appendFrame(appendFrame(nil, frameConfined, 0, []byte("{}")), frameReady, 0, encodeJSON(readyReply{"t", 4})))
	f.Add(appendFrame(nil, frameFailed, 0, encodeError(pkcs11.ErrPINIncorrect)))
	f.Add(appendFrame(appendFrame(nil, frameListed, 1, []byte("x")), frameDone, 1, []byte("y")))
	f.Add(appendFrame(nil, frameError, 1, encodeError(pkcs11.ErrDevice)))
	f.Add(appendFrame(appendFrame(nil, frameAsk, 3), frameLogin, 3))
	f.Add(appendFrame(nil, frameLog, 0, encodeJSON(logRecord{Level: slog.LevelInfo, Message: "m", Attrs: [][2]string{{"a", "b"}}})))
	f.Add(appendFrame(nil, framePulse, 0))
	f.Add(appendFrame(nil, frameDone, 2, []byte{0x30, 6, 2, 1, 1, 2, 1, 1}))
	sleeper := exec.Command("/bin/true")
	if err := sleeper.Run(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg, err := Config{}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		p := &Pool{cfg: cfg, log: cfg.Logger, changed: make(chan struct{})}
		p.ready.Store(new([]*proc))
		a, z := net.Pipe()
		defer z.Close()
		w := &proc{pool: p, cmd: sleeper, conn: a, out: newFrameWriter(), text: newTail(pkcs11.PIN{}), started: make(chan error, 1),
			sick: make(chan struct{}), gone: make(chan struct{}), pending: map[uint32]*op{}, given: map[uint32]struct{}{}, state: frameConfined}
		o := &op{done: make(chan struct{}, 1)}
		w.send(o, &request{typ: frameList})
		signature := &op{done: make(chan struct{}, 1)}
		w.send(signature, &request{typ: frameSign, of: &key{pub: &ecdsa.PublicKey{Curve: elliptic.P256()}}})
		r := newFrameReader(bytes.NewReader(b))
		for {
			fr, err := r.next()
			if err == nil {
				err = w.handle(fr)
			}
			if err != nil {
				w.end("", err)
				break
			}
		}
		<-o.done
		if <-signature.done; len(signature.result) > 72 {
			t.Errorf("a signature of %d bytes", len(signature.result))
		}
	})
}
