// Package transit signs with private keys that live in the Transit engine of a HashiCorp Vault or OpenBao server.
//
// [Open] logs in and yields a [Backend], a [signer.Backend] each of whose keys is one version of one Transit key. A private
// key never leaves the engine: keys that it would give away (exportable, allow_plaintext_backup) are refused.
//
// # Keys
//
// Each request names the key version whose public key was read, and an answer that names another version is refused, so a
// rotation in the engine never changes what a running key server signs with. After a rotation both versions
// can be served at once; a new one is found by the next [Backend.Keys].
//
// RSA keys sign with PKCS #1 v1.5 and PSS (salt as long as the hash), ECDSA keys of P-256, P-384 and P-521 and Ed25519 keys as TLS
// wants it. The engine has no form of MD5SHA1 that this package would use. Its keys are no [signer.Decrypter]: the engine
// takes the padding off itself and says when it was wrong, which is the oracle that raw decryption exists to avoid.
//
// # Requests
//
// Signatures with one ECDSA or Ed25519 key that are asked for while a request with that key is under way are sent together, as
// one request, when it ends; nothing ever waits for a clock. RSA signatures gain nothing by it and go one by one. At most
// Config.InFlight requests are under way at once. A request is not repeated here, with one exception: when the server
// denies permission, one new login is made, for all at once, and the request sent again. Fail-over is [signer.Entry]'s.
//
// # Login
//
// Secrets are read from files. The login is renewed as long as the server allows and then made anew; a file that changes
// is read again. Ids of an AppRole that the server refused are not sent again for a while, see [Refusals]. VAULT_* and proxy variables of the environment have no effect.
package transit
