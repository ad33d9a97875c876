// Package pkcs11 signs with private keys that live in PKCS#11 tokens: hardware security modules, smart cards, SoftHSM2.
//
// [Open] loads a module, finds one token, logs in once and yields a [Token], a [signer.Backend] whose keys sign
// inside the token. The package follows PKCS #11 Cryptographic Token Interface Base Specification 2.40, and 3.0 for EdDSA.
//
// # Modules
//
// A module is code of a vendor that runs inside the process that loads it. [Open] is for programs that do one thing and end; servers
// leave modules to processes of their own, see package worker. Only modules that the configuration names are loaded, each once, and
// initialised once however many tokens are open. A module stays loaded until the process ends; it is finalised when its last
// token is closed. Calls into a module cannot be cancelled: a context is honoured until the call begins.
//
// # Sessions
//
// A session serves one operation at a time. A [Token] has at most Config.Sessions of them, opens them as they are needed and keeps
// them, so that the login, which belongs to all sessions of the process together, survives. A session whose state is in doubt is thrown away.
//
// # Recovery
//
// What a token or daemon that went away and came back leaves behind is healed within an operation, each remedy once: a dead session is
// replaced, a lost login renewed, a lost object found again by its public key. When the device itself has failed, operations
// return [ErrDevice]: only a new process helps, which package worker provides. A refused PIN is never tried
// again: tokens lock after a few tries.
//
// # What leaves
//
// Keys that the token would give away (CKA_EXTRACTABLE, or not CKA_SENSITIVE) are refused unless Config.AllowExtractable says otherwise.
// These attributes are the module's word; only a vendor's attestation proves them. PINs never appear in errors, logs or URIs.
package pkcs11
