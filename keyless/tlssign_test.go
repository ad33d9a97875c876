package keyless

import (
	"bytes"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"strings"
)

// tls13Message is what a TLS 1.3 server signs, with a transcript hash of n bytes.
func tls13Message(n int) []byte {
	return append([]byte(strings.Repeat(" ", 64)+"TLS 1.3, server CertificateVerify\x00"), bytes.Repeat([]byte{0xA5}, n)...)
}

// tls12Message is what a TLS 1.2 server signs, with a fresh key on the named curve.
func tls12Message(id uint16) []byte {
	point := bytes.Repeat([]byte{0x77}, groups[id].size)
	if curve := groups[id].curve; curve != nil {
		point = must(curve.GenerateKey(rand.Reader)).PublicKey().Bytes()
	} else if id == 29 {
		point = must(ecdh.X25519().GenerateKey(rand.Reader)).PublicKey().Bytes()
	}
	msg := bytes.Repeat([]byte{0xC3}, 64)
	msg = append(msg, 3)
	msg = binary.BigEndian.AppendUint16(msg, id)
	msg = append(msg, byte(len(point)))
	return append(msg, point...)
}
