package worker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/pkcs11"
	"github.com/keyhaven/keyhaven/signer"
)

// ErrLost means that the worker that held the operation was lost. Whether the token did it is not known.
var ErrLost = errors.New("worker lost while it held the operation")

// errGone means that there is no worker to be asked. It is a signer.ErrUnavailable.
var errGone = error(unavailable{errors.New("no worker is ready")})

// unavailable makes an error a signer.ErrUnavailable without saying so.
type unavailable struct{ error }

func (e unavailable) Unwrap() error { return e.error }

func (e unavailable) Is(target error) bool { return target == signer.ErrUnavailable }

// sentinels are the errors whose identity crosses the socket: bit i of an error's mask is sentinels[i]. The list only grows.
var sentinels = []error{
	signer.ErrUnsupported, signer.ErrUnavailable, signer.ErrNotFound, signer.ErrAmbiguous, signer.ErrThrottled,
	pkcs11.ErrPINIncorrect, pkcs11.ErrPINLocked, pkcs11.ErrPINFinalTry, pkcs11.ErrTokenNotFound, pkcs11.ErrAmbiguous,
	pkcs11.ErrKeyNotFound, pkcs11.ErrExtractable, pkcs11.ErrUnsupported, pkcs11.ErrInput, pkcs11.ErrDevice, pkcs11.ErrBusy,
	pkcs11.ErrClosed, pkcs11.ErrModule, pkcs11.ErrModuleNotAllowed, context.DeadlineExceeded, errSandbox, signer.ErrOverloaded,
}

// errorHeader is mask (4) and the module's return value plus one (8), 0 if there is none.
const errorHeader = 12

// maxErrorText bounds the text of an error on the wire, in bytes.
const maxErrorText = 4096

// remoteError is an error of a worker.
type remoteError struct {
	text string
	mask uint32
	rv   uint64 // plus one
}

func (e *remoteError) Error() string { return e.text }

// Is reports whether the error was target before it crossed the socket.
func (e *remoteError) Is(target error) bool {
	for i, s := range sentinels {
		if e.mask&(1<<i) != 0 && target == s {
			return true
		}
	}
	return false
}

// Unwrap returns the module's return value, if there is one.
func (e *remoteError) Unwrap() error {
	if e.rv == 0 {
		return nil
	}
	return ck.Error(e.rv - 1)
}

// encodeError makes the body of an error frame.
func encodeError(err error) []byte {
	var mask uint32
	for i, s := range sentinels {
		if errors.Is(err, s) {
			mask |= 1 << i
		}
	}
	var value uint64
	var rv ck.Error
	if errors.As(err, &rv) {
		value = uint64(rv) + 1
	}
	text := strings.TrimPrefix(err.Error(), "pkcs11: ")
	if len(text) > maxErrorText {
		text = text[:maxErrorText]
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, errorHeader+len(text)), mask)
	b = binary.BigEndian.AppendUint64(b, value)
	return append(b, text...)
}

// decodeError reads the body of an error frame.
func decodeError(body []byte) (*remoteError, error) {
	if len(body) < errorHeader || len(body) > errorHeader+maxErrorText {
		return nil, fmt.Errorf("%w: error: %d bytes", errFrame, len(body))
	}
	e := &remoteError{mask: binary.BigEndian.Uint32(body), rv: binary.BigEndian.Uint64(body[4:])}
	e.text = strings.ToValidUTF8(string(body[errorHeader:]), string(utf8.RuneError))
	return e, nil
}

// refusesPIN reports whether err means that no login may be tried before an operator has acted.
func refusesPIN(err error) bool {
	for _, refusal := range []error{pkcs11.ErrPINIncorrect, pkcs11.ErrPINLocked, pkcs11.ErrPINFinalTry} {
		if errors.Is(err, refusal) {
			return true
		}
	}
	return false
}

// named puts the name that the keys' and tokens' errors have before err.
func named(err error) error {
	if err == nil || strings.HasPrefix(err.Error(), "pkcs11: ") {
		return err
	}
	return fmt.Errorf("pkcs11: %w", err)
}
