package pkcs11

import (
	"errors"
	"fmt"
	"strings"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/signer"
)

// Errors that callers branch on. They arrive wrapped, with the module's own code (a ck.Error) beside them where there is one.
var (
	// ErrPINIncorrect means that the token refused the PIN. The token is not asked again before another Open. It is a
	// signer.ErrUnavailable: another home of the key may answer.
	ErrPINIncorrect = error(&kind{"PIN refused", signer.ErrUnavailable})
	// ErrPINLocked means that the token accepts no PIN any more; its security officer has to reset it. It is a
	// signer.ErrUnavailable.
	ErrPINLocked = error(&kind{"PIN locked", signer.ErrUnavailable})
	// ErrPINFinalTry means that one more wrong PIN would lock the token, and Config.AllowFinalTry is not set. The PIN was
	// not tried. It is a signer.ErrUnavailable.
	ErrPINFinalTry = error(&kind{"last try of the PIN", signer.ErrUnavailable})
	// ErrTokenNotFound means that no slot holds the token that the URI names.
	ErrTokenNotFound = errors.New("token not found")
	// ErrAmbiguous means that more than one token, module, object or key fits. It is a signer.ErrAmbiguous.
	ErrAmbiguous = error(&kind{"ambiguous name", signer.ErrAmbiguous})
	// ErrKeyNotFound means that the token has no such usable key. It is a signer.ErrNotFound.
	ErrKeyNotFound = error(&kind{"key not found", signer.ErrNotFound})
	// ErrExtractable means that the token would give the private key away.
	ErrExtractable = errors.New("private key can leave the token")
	// ErrUnsupported means that token or key cannot do what was asked. It is a signer.ErrUnsupported.
	ErrUnsupported = error(&kind{"not supported", signer.ErrUnsupported})
	// ErrInput means that the digest, message or ciphertext has a length or value that cannot be right. The token was not asked.
	ErrInput = errors.New("input does not fit the algorithm")
	// ErrDevice means that the device failed or is away, and that the module has to be loaded anew. It is a
	// signer.ErrUnavailable: another home of the key may answer.
	ErrDevice = error(&kind{"device failed", signer.ErrUnavailable})
	// ErrBusy means that the device is well and has no room for the operation now. It is a signer.ErrThrottled.
	ErrBusy = error(&kind{"token is busy", signer.ErrThrottled})
	// ErrClosed means that the token was closed. It is a signer.ErrUnavailable.
	ErrClosed = error(&kind{"token closed", signer.ErrUnavailable})
	// ErrModule means that the file is no PKCS#11 module that this program can load.
	ErrModule = errors.New("module does not load")
	// ErrModuleNotAllowed means that the URI asks for a module that the configuration does not name.
	ErrModuleNotAllowed = errors.New("module not allowed")
	// ErrExists means that the token already has a key of that name.
	ErrExists = errors.New("key exists")
	// ErrCertificateMismatch means that a certificate is not for the key.
	ErrCertificateMismatch = errors.New("certificate does not fit the key")

	// errUnsigned means that the token did not sign what it can sign. It is a signer.ErrUnavailable: another home of the key may.
	errUnsigned = error(&kind{"token does not sign", signer.ErrUnavailable})
	// errNoUserPIN means that the token says that it has no PIN.
	errNoUserPIN = errors.New("no user PIN yet")
	// errUnproven means that the PIN may be what the token counted as wrong.
	errUnproven = errors.New("a login with it had no answer, and the token counts a wrong PIN since")
	// errUnreadable means that the token does not say how it is.
	errUnreadable = errors.New("read token")
)

// kind is an error that is another without saying so.
type kind struct {
	text string
	is   error
}

func (e *kind) Error() string { return e.text }

func (e *kind) Unwrap() error { return e.is }

// named puts the package's name before what an exported function returns. It stands nowhere else, so that it is there once.
func named(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("pkcs11: %w", err)
}

// code is a module's return value with its name in the standard. It is a ck.Error, whose text has a prefix of its own.
type code struct{ rv ck.Error }

func (c code) Error() string {
	text := strings.TrimPrefix(c.rv.Error(), "pkcs11: ")
	if value, name, ok := strings.Cut(text, ": "); ok && name != "" {
		return name + " (" + value + ")"
	}
	return text
}

func (c code) Unwrap() error { return c.rv }

// coded makes what miekg's package returns an error of ours.
func coded(err error) error {
	if rv, ok := err.(ck.Error); ok {
		return code{rv}
	}
	return err
}

// unsigned makes a module's error that no remedy helped against a failure of the token: what is signed was checked before. It is no
// reason to load the module anew. What the module says of the data is final, as a client chooses the length of Ed25519 messages; what it says of
// the key is this key's failure in this home, and not the token's.
func unsigned(err error) error {
	var rv ck.Error
	if !errors.As(err, &rv) || errors.Is(err, signer.ErrUnavailable) || errors.Is(err, signer.ErrThrottled) {
		return err
	}
	switch uint(rv) {
	case ck.CKR_DATA_INVALID, ck.CKR_DATA_LEN_RANGE:
		return err
	case ck.CKR_KEY_SIZE_RANGE, ck.CKR_KEY_TYPE_INCONSISTENT, ck.CKR_KEY_FUNCTION_NOT_PERMITTED, ck.CKR_MECHANISM_INVALID, ck.CKR_MECHANISM_PARAM_INVALID:
		return fmt.Errorf("%w: %w: %w", signer.ErrNotFound, errUnsigned, err)
	}
	return fmt.Errorf("%w: %w", errUnsigned, err)
}

// fault is what an error of the module asks for.
type fault int

const (
	faultNone    fault = iota // success
	faultOther                // nothing that a remedy is known for
	faultSession              // the session is dead or occupied: another one
	faultLogin                // the login is gone
	faultObject               // the object handle is stale
	faultBusy                 // the device wants to be asked less
	faultDevice               // the module has to be loaded anew
	faultPIN                  // the PIN was refused: terminal
)

// faultOf classifies an error. CKR_GENERAL_ERROR is not a device failure: modules return it for bad input too, and a client
// must not be able to have the module restarted.
func faultOf(err error) fault {
	if err == nil {
		return faultNone
	}
	var rv ck.Error
	if !errors.As(err, &rv) {
		return faultOther
	}
	switch uint(rv) {
	case ck.CKR_SESSION_HANDLE_INVALID, ck.CKR_SESSION_CLOSED, ck.CKR_OPERATION_ACTIVE, ck.CKR_OPERATION_NOT_INITIALIZED:
		return faultSession
	case ck.CKR_USER_NOT_LOGGED_IN:
		return faultLogin
	case ck.CKR_OBJECT_HANDLE_INVALID, ck.CKR_KEY_HANDLE_INVALID:
		return faultObject
	case ck.CKR_FUNCTION_FAILED, ck.CKR_SESSION_COUNT, ck.CKR_HOST_MEMORY, ck.CKR_DEVICE_MEMORY:
		return faultBusy
	case ck.CKR_DEVICE_ERROR, ck.CKR_DEVICE_REMOVED, ck.CKR_TOKEN_NOT_PRESENT, ck.CKR_TOKEN_NOT_RECOGNIZED,
		ck.CKR_CRYPTOKI_NOT_INITIALIZED, ck.CKR_SLOT_ID_INVALID:
		return faultDevice
	case ck.CKR_PIN_INCORRECT, ck.CKR_PIN_INVALID, ck.CKR_PIN_LEN_RANGE, ck.CKR_PIN_EXPIRED, ck.CKR_PIN_LOCKED:
		return faultPIN
	}
	return faultOther
}

// pinError gives a login's refusal its name.
func pinError(err error) error {
	if errors.Is(err, ck.Error(ck.CKR_PIN_LOCKED)) {
		return fmt.Errorf("%w: have the security officer reset it: %w", ErrPINLocked, err)
	}
	return fmt.Errorf("%w: correct it, then open the token again: %w", ErrPINIncorrect, err)
}
