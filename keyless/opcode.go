package keyless

import (
	"crypto"
	"fmt"
)

// An Opcode says what a packet asks for or answers. It is the value of item 0x11.
type Opcode byte

// The opcodes of protocol version 1. The sign opcodes take a digest made with the hash in their name; OpEd25519Sign
// takes the whole message.
const (
	OpRSADecrypt       Opcode = 0x01 // raw: ciphertext to a block of the modulus's length, padding still in place
	OpRSASignMD5SHA1   Opcode = 0x02
	OpRSASignSHA1      Opcode = 0x03
	OpRSASignSHA224    Opcode = 0x04
	OpRSASignSHA256    Opcode = 0x05
	OpRSASignSHA384    Opcode = 0x06
	OpRSASignSHA512    Opcode = 0x07
	OpRSADecryptRaw    Opcode = 0x08 // the raw form's name in old C clients
	OpECDSASignMD5SHA1 Opcode = 0x12
	OpECDSASignSHA1    Opcode = 0x13
	OpECDSASignSHA224  Opcode = 0x14
	OpECDSASignSHA256  Opcode = 0x15
	OpECDSASignSHA384  Opcode = 0x16
	OpECDSASignSHA512  Opcode = 0x17
	OpEd25519Sign      Opcode = 0x18
	OpSeal             Opcode = 0x21
	OpUnseal           Opcode = 0x22
	OpRPC              Opcode = 0x23
	OpCustom           Opcode = 0x24 // the function is named by Operation.CustomFunc
	OpRSAPSSSignSHA256 Opcode = 0x35 // salt length = hash length, MGF1 with the same hash
	OpRSAPSSSignSHA384 Opcode = 0x36
	OpRSAPSSSignSHA512 Opcode = 0x37
	OpResponse         Opcode = 0xF0
	OpPing             Opcode = 0xF1
	OpPong             Opcode = 0xF2
	OpError            Opcode = 0xFF
)

// opcodes holds a row for each known opcode; a row without a name is an unknown one.
var opcodes = [256]struct {
	name string
	hash crypto.Hash
	sign bool
}{
	OpRSADecrypt:       {name: "rsa-decrypt"},
	OpRSASignMD5SHA1:   {"rsa-sign-md5sha1", crypto.MD5SHA1, true},
	OpRSASignSHA1:      {"rsa-sign-sha1", crypto.SHA1, true},
	OpRSASignSHA224:    {"rsa-sign-sha224", crypto.SHA224, true},
	OpRSASignSHA256:    {"rsa-sign-sha256", crypto.SHA256, true},
	OpRSASignSHA384:    {"rsa-sign-sha384", crypto.SHA384, true},
	OpRSASignSHA512:    {"rsa-sign-sha512", crypto.SHA512, true},
	OpRSADecryptRaw:    {name: "rsa-decrypt-raw"},
	OpECDSASignMD5SHA1: {"ecdsa-sign-md5sha1", crypto.MD5SHA1, true},
	OpECDSASignSHA1:    {"ecdsa-sign-sha1", crypto.SHA1, true},
	OpECDSASignSHA224:  {"ecdsa-sign-sha224", crypto.SHA224, true},
	OpECDSASignSHA256:  {"ecdsa-sign-sha256", crypto.SHA256, true},
	OpECDSASignSHA384:  {"ecdsa-sign-sha384", crypto.SHA384, true},
	OpECDSASignSHA512:  {"ecdsa-sign-sha512", crypto.SHA512, true},
	OpEd25519Sign:      {"ed25519-sign", 0, true},
	OpSeal:             {name: "seal"},
	OpUnseal:           {name: "unseal"},
	OpRPC:              {name: "rpc"},
	OpCustom:           {name: "custom"},
	OpRSAPSSSignSHA256: {"rsa-pss-sign-sha256", crypto.SHA256, true},
	OpRSAPSSSignSHA384: {"rsa-pss-sign-sha384", crypto.SHA384, true},
	OpRSAPSSSignSHA512: {"rsa-pss-sign-sha512", crypto.SHA512, true},
	OpResponse:         {name: "response"},
	OpPing:             {name: "ping"},
	OpPong:             {name: "pong"},
	OpError:            {name: "error"},
}

// String is a short lower-case name, fit for logs and metric labels; an unknown opcode prints as "opcode-0xNN".
func (o Opcode) String() string {
	if name := opcodes[o].name; name != "" {
		return name
	}
	return fmt.Sprintf("opcode-0x%02x", byte(o))
}

// Known reports whether protocol version 1 defines o.
func (o Opcode) Known() bool { return opcodes[o].name != "" }

// IsSign reports whether o is one of the plain sign opcodes (OpCustom is not).
func (o Opcode) IsSign() bool { return opcodes[o].sign }

// IsDecrypt reports whether o is one of the two raw RSA decryptions.
func (o Opcode) IsDecrypt() bool { return o == OpRSADecrypt || o == OpRSADecryptRaw }

// IsReply reports whether only servers may send o.
func (o Opcode) IsReply() bool { return o == OpResponse || o == OpPong || o == OpError }

// Hash is the hash whose digest a sign opcode takes; 0 for OpEd25519Sign and for opcodes that do not sign. The payload
// of a sign opcode with a hash must be exactly Hash().Size() bytes long.
func (o Opcode) Hash() crypto.Hash { return opcodes[o].hash }

// An ErrorCode is the one byte that an error reply carries. Codes are append-only.
type ErrorCode byte

// The error codes of protocol version 1. None is worth retrying on the same server except CodeInternal, which says
// that the server, not the request, is at fault.
const (
	CodeCrypto           ErrorCode = 1
	CodeKeyNotFound      ErrorCode = 2
	CodeRead             ErrorCode = 3
	CodeVersion          ErrorCode = 4
	CodeBadOpcode        ErrorCode = 5
	CodeUnexpectedOpcode ErrorCode = 6
	CodeFormat           ErrorCode = 7
	CodeInternal         ErrorCode = 8
	CodeCertNotFound     ErrorCode = 9
	CodeExpired          ErrorCode = 10
	CodeRemoteConfig     ErrorCode = 11
)

var codeNames = [...]string{
	CodeCrypto:           "cryptography failure",
	CodeKeyNotFound:      "key not found",
	CodeRead:             "read error",
	CodeVersion:          "version mismatch",
	CodeBadOpcode:        "bad opcode",
	CodeUnexpectedOpcode: "unexpected opcode",
	CodeFormat:           "format error",
	CodeInternal:         "internal error",
	CodeCertNotFound:     "certificate not found",
	CodeExpired:          "expired",
	CodeRemoteConfig:     "remote configuration error",
}

// String is the protocol's name of the code.
func (c ErrorCode) String() string {
	if int(c) < len(codeNames) && codeNames[c] != "" {
		return codeNames[c]
	}
	return fmt.Sprintf("error code %d", byte(c))
}

// An Error is a refusal that crosses the wire. Only Code does: what led to it stays in the log of the side that
// refused. Two Errors match with errors.Is when their codes are equal.
type Error struct{ Code ErrorCode }

func (e *Error) Error() string { return "keyless: " + e.Code.String() }

// Is reports whether target is an *Error with the same code.
func (e *Error) Is(target error) bool {
	t, ok := target.(*Error)
	return ok && t.Code == e.Code
}

// The refusals, for errors.Is and for handlers to return.
var (
	ErrCrypto           = &Error{CodeCrypto}
	ErrKeyNotFound      = &Error{CodeKeyNotFound}
	ErrRead             = &Error{CodeRead}
	ErrVersion          = &Error{CodeVersion}
	ErrBadOpcode        = &Error{CodeBadOpcode}
	ErrUnexpectedOpcode = &Error{CodeUnexpectedOpcode}
	ErrFormat           = &Error{CodeFormat}
	ErrInternal         = &Error{CodeInternal}
	ErrCertNotFound     = &Error{CodeCertNotFound}
	ErrExpired          = &Error{CodeExpired}
	ErrRemoteConfig     = &Error{CodeRemoteConfig}
)
