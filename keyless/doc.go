// Package keyless speaks the keyless TLS protocol: a client asks a server that holds, or can reach, a private key to
// make one signature at a time, over a mutually authenticated TLS connection.
//
// The package has four parts. The codec ([Packet], [ParseHeader], [ParseBody]) turns operations into bytes and back and
// owns no socket. [Server] reads requests from connections and hands them to a [Handler]. [Client] keeps a pool of
// pipelined connections to several servers. [Key] makes a [Client] look like a crypto.Signer, crypto.MessageSigner and
// crypto.Decrypter, so that crypto/tls can use a key that is elsewhere.
//
// The wire format and the behaviour of both ends are written down in SPEC.md.
package keyless
