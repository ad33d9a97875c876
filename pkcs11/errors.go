package pkcs11

import (
	"errors"
	"fmt"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/signer"
)

// Errors that callers branch on. They arrive wrapped, with the module's own code (a ck.Error) beside them where there is one.
var (
	// ErrPINIncorrect means that the token refused the PIN. The token is not asked again before Reopen. It is a
	// signer.ErrUnavailable: another home of the key may answer.
	ErrPINIncorrect = error(unavailable("pkcs11: PIN refused"))
	// ErrPINLocked means that the token accepts no PIN any more; its security officer has to reset it. It is a
	// signer.ErrUnavailable.
	ErrPINLocked = error(unavailable("pkcs11: PIN locked"))
	// ErrPINFinalTry means that one more wrong PIN would lock the token, and Config.AllowFinalTry is not set. The PIN was
	// not tried. It is a signer.ErrUnavailable.
	ErrPINFinalTry = error(unavailable("pkcs11: last try of the PIN"))
	// errNoUserPIN means that the token says that it has no PIN.
	errNoUserPIN = errors.New("pkcs11: no user PIN yet")
	// errUnreadable means that the token does not say how it is.
	errUnreadable = errors.New("pkcs11: read token")
	// ErrTokenNotFound means that no slot holds the token that the URI names.
	ErrTokenNotFound = errors.New("pkcs11: token not found")
	// ErrAmbiguous means that more than one token, module, object or key fits. It is a signer.ErrAmbiguous.
	ErrAmbiguous = fmt.Errorf("pkcs11: ambiguous name: %w", signer.ErrAmbiguous)
	// ErrKeyNotFound means that the token has no such usable key. It is a signer.ErrNotFound.
	ErrKeyNotFound = fmt.Errorf("pkcs11: key not found: %w", signer.ErrNotFound)
	// ErrExtractable means that the token would give the private key away.
	ErrExtractable = errors.New("pkcs11: private key can leave the token")
	// ErrUnsupported means that token or key cannot do what was asked. It is a signer.ErrUnsupported.
	ErrUnsupported = fmt.Errorf("pkcs11: not supported: %w", signer.ErrUnsupported)
	// ErrInput means that the digest, message or ciphertext has a length or value that cannot be right. The token was not asked.
	ErrInput = errors.New("pkcs11: input does not fit the algorithm")
	// ErrDevice means that the device failed or is away. It is a signer.ErrUnavailable: another home of the key may answer.
	ErrDevice = fmt.Errorf("pkcs11: device failed: %w", signer.ErrUnavailable)
	// ErrClosed means that the token was closed. It is a signer.ErrUnavailable.
	ErrClosed = fmt.Errorf("pkcs11: token closed: %w", signer.ErrUnavailable)
	// ErrModuleNotAllowed means that the URI asks for a module that the configuration does not name.
	ErrModuleNotAllowed = errors.New("pkcs11: module not allowed")
	// ErrExists means that the token already has a key of that name.
	ErrExists = errors.New("pkcs11: key exists")
	// ErrCertificateMismatch means that a certificate is not for the key.
	ErrCertificateMismatch = errors.New("pkcs11: certificate does not fit the key")
)

// unavailable is an error that is a signer.ErrUnavailable without saying so.
type unavailable string

func (e unavailable) Error() string { return string(e) }

func (e unavailable) Is(target error) bool { return target == signer.ErrUnavailable }

// fault is what an error of the module asks for.
type fault int

const (
	faultNone    fault = iota // success
	faultOther                // nothing that a remedy is known for
	faultSession              // the session is dead or occupied: another one
	faultLogin                // the login is gone
	faultObject               // the object handle is stale
	faultDevice               // the module or device has to be initialised anew
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
