package signer

import (
	"crypto"
	"strings"
)

// schemeSet is a set of ways to do an operation: one bit for each entry of schemes, and two for what is no signature.
type schemeSet uint32

const (
	decrypting schemeSet = 1 << (31 - iota) // raw RSA decryption
	schemeless                              // anything else that is no signature
)

// bit returns the way in which op is done with the algorithm; 0 for an algorithm that nothing can sign with.
func (o Op) bit(alg Algorithm) schemeSet {
	switch {
	case o.signs():
		return alg.bit()
	case o == OpDecrypt:
		return decrypting
	}
	return schemeless
}

// off returns what the switches forbid.
func (l Legacy) off() schemeSet {
	var off schemeSet
	for i := range schemes {
		if name := l.switchOf(1 << i); name != "" {
			off |= 1 << i
		}
	}
	if l.switchOf(decrypting) != "" {
		off |= decrypting
	}
	return off
}

// switchOf names the switch that forbids the way, or "".
func (l Legacy) switchOf(bit schemeSet) string {
	if bit == decrypting {
		if !l.Decrypt {
			return "legacy.decrypt"
		}
		return ""
	}
	for i := range schemes {
		switch {
		case bit != 1<<i:
		case schemes[i].alg.Hash == crypto.SHA1 && !l.SHA1:
			return "legacy.sha1"
		case schemes[i].alg.Hash == crypto.MD5SHA1 && !l.MD5SHA1:
			return "legacy.md5sha1"
		}
	}
	return ""
}

type schemeEntry struct {
	name   string
	alg    Algorithm
	legacy bool // not covered by "*"
}

// schemes names every way to sign that a policy can grant. The names are those of the TLS SignatureScheme registry (RFC 8446
// section 4.2.3) where it has one. A name stands for the algorithm: rsa_pss_rsae_sha256 is RSA-PSS with SHA-256
// whoever asks for it.
var schemes = [...]schemeEntry{
	{"ecdsa_secp256r1_sha256", Algorithm{ECDSA, crypto.SHA256}, false},
	{"ecdsa_secp384r1_sha384", Algorithm{ECDSA, crypto.SHA384}, false},
	{"ecdsa_secp521r1_sha512", Algorithm{ECDSA, crypto.SHA512}, false},
	{"ed25519", Algorithm{Ed25519, 0}, false},
	{"rsa_pss_rsae_sha256", Algorithm{PSS, crypto.SHA256}, false},
	{"rsa_pss_rsae_sha384", Algorithm{PSS, crypto.SHA384}, false},
	{"rsa_pss_rsae_sha512", Algorithm{PSS, crypto.SHA512}, false},
	{"rsa_pkcs1_sha256", Algorithm{PKCS1v15, crypto.SHA256}, false},
	{"rsa_pkcs1_sha384", Algorithm{PKCS1v15, crypto.SHA384}, false},
	{"rsa_pkcs1_sha512", Algorithm{PKCS1v15, crypto.SHA512}, false},
	{"rsa_pkcs1_sha224", Algorithm{PKCS1v15, crypto.SHA224}, true},
	{"rsa_pkcs1_sha1", Algorithm{PKCS1v15, crypto.SHA1}, true},
	{"rsa_pkcs1_md5sha1", Algorithm{PKCS1v15, crypto.MD5SHA1}, true},
	{"ecdsa_sha224", Algorithm{ECDSA, crypto.SHA224}, true},
	{"ecdsa_sha1", Algorithm{ECDSA, crypto.SHA1}, true},
	{"ecdsa_md5sha1", Algorithm{ECDSA, crypto.MD5SHA1}, true},
}

// String returns the name that policies and records use, or "none" for an algorithm that nothing here can do.
func (a Algorithm) String() string {
	if i := a.index(); i >= 0 {
		return schemes[i].name
	}
	return "none"
}

func (a Algorithm) index() int {
	for i := range schemes {
		if schemes[i].alg == a {
			return i
		}
	}
	return -1
}

func (a Algorithm) bit() schemeSet {
	if i := a.index(); i >= 0 {
		return 1 << i
	}
	return 0
}

// parseScheme returns the set that a word of a policy stands for.
func parseScheme(word string) (schemeSet, bool) {
	if word == "*" {
		var all schemeSet
		for i := range schemes {
			if !schemes[i].legacy {
				all |= 1 << i
			}
		}
		return all, true
	}
	for i := range schemes {
		if schemes[i].name == word {
			return 1 << i, true
		}
	}
	return 0, false
}

func schemeNames() string {
	names := make([]string, len(schemes))
	for i := range schemes {
		names[i] = schemes[i].name
	}
	return strings.Join(names, ", ")
}
