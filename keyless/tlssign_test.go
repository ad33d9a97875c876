package keyless

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
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
	}
	return tls12With(3, id, len(point), point)
}

func tls12With(curveType byte, id uint16, announced int, point []byte) []byte {
	msg := bytes.Repeat([]byte{0xC3}, 64)
	msg = append(msg, curveType)
	msg = binary.BigEndian.AppendUint16(msg, id)
	msg = append(msg, byte(announced))
	return append(msg, point...)
}

// accepted lists every shape that may be signed.
func accepted() map[string][]byte {
	m := map[string][]byte{
		"TLS 1.3, SHA-256 transcript": tls13Message(32),
		"TLS 1.3, SHA-384 transcript": tls13Message(48),
	}
	for id := range groups {
		m[fmt.Sprintf("TLS 1.2, group %d", id)] = tls12Message(id)
	}
	return m
}

func TestParseTLSSignAccepts(t *testing.T) {
	for name, msg := range accepted() {
		t.Run(name, func(t *testing.T) {
			got, err := ParseTLSSign(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, msg))
			if err != nil {
				t.Fatal(err)
			}
			if got.Scheme != tls.ECDSAWithP256AndSHA256 || !bytes.Equal(got.Message, msg) {
				t.Errorf("got %+v", got)
			}
			if want := strings.TrimPrefix(tls.VersionName(got.Version), "TLS "); !strings.HasPrefix(name, "TLS "+want) {
				t.Errorf("version %s for %s", want, name)
			}
		})
	}
}

// Each accepted shape, one byte shorter or longer at either end, is no TLS message any more.
func TestParseTLSSignExactLength(t *testing.T) {
	for name, msg := range accepted() {
		for what, changed := range map[string][]byte{
			"last byte gone":  msg[:len(msg)-1],
			"first byte gone": msg[1:],
			"byte appended":   append(bytes.Clone(msg), 0x00),
			"byte prepended":  append([]byte{msg[0]}, msg...),
		} {
			if _, err := ParseTLSSign(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, changed)); err == nil {
				t.Errorf("%s, %s: accepted", name, what)
			}
		}
		for n := range msg {
			if bytes.Equal(msg[:n], tls13Message(32)) {
				continue // the longer transcript hash, cut to the shorter one
			}
			if _, err := ParseTLSSign(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, msg[:n])); err == nil {
				t.Errorf("%s cut to %d bytes: accepted", name, n)
			}
		}
	}
}

func TestParseTLSSignRefuses(t *testing.T) {
	p256 := must(ecdh.P256().GenerateKey(rand.Reader)).PublicKey().Bytes()
	offCurve := bytes.Clone(p256)
	offCurve[64] ^= 1
	csr := must(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, p256Key()))
	for name, msg := range map[string][]byte{
		"nothing":                       {},
		"TBSCertificate":                must(x509.ParseCertificate(serverCert().Certificate[0])).RawTBSCertificate,
		"certification request":         must(x509.ParseCertificateRequest(csr)).RawTBSCertificateRequest,
		"JWT":                           jwt(),
		"JWT of the length of a shape":  append(jwt(), bytes.Repeat([]byte("A"), 133)...)[:133],
		"SSH challenge":                 sshChallenge("git", 51),
		"TLS 1.3 client":                []byte(strings.Repeat(" ", 64) + "TLS 1.3, client CertificateVerify\x00" + strings.Repeat("h", 32)),
		"TLS 1.3, other context":        []byte(strings.Repeat(" ", 64) + "TLS 1.3, server DelegatedCredens\x00" + strings.Repeat("h", 32)),
		"TLS 1.3, 63 spaces":            tls13Message(32)[1:],
		"TLS 1.3, tab for a space":      append([]byte("\t"), tls13Message(32)[1:]...),
		"TLS 1.3, no zero byte":         bytes.Replace(tls13Message(32), []byte{0}, []byte{1}, 1),
		"TLS 1.3, no hash":              tls13Message(0),
		"TLS 1.3, SHA-1 transcript":     tls13Message(20),
		"TLS 1.3, SHA-512 transcript":   tls13Message(64),
		"TLS 1.2, explicit prime":       tls12With(1, 23, 65, p256),
		"TLS 1.2, explicit char2":       tls12With(2, 23, 65, p256),
		"TLS 1.2, group 0":              tls12With(3, 0, 65, p256),
		"TLS 1.2, secp256k1":            tls12With(3, 22, 65, p256),
		"TLS 1.2, ffdhe2048":            tls12With(3, 256, 65, p256),
		"TLS 1.2, X25519MLKEM768":       tls12With(3, 4588, 65, p256),
		"TLS 1.2, P-256 point on P-384": tls12With(3, 24, 65, p256),
		"TLS 1.2, wrong length byte":    tls12With(3, 23, 64, p256),
		"TLS 1.2, point off the curve":  tls12With(3, 23, 65, offCurve),
		"TLS 1.2, compressed tag":       tls12With(3, 23, 65, append([]byte{2}, p256[1:]...)),
		"TLS 1.2, compressed point":     tls12With(3, 23, 33, append([]byte{2}, p256[1:33]...)),
		"TLS 1.2, infinity":             tls12With(3, 23, 1, []byte{0}),
		"TLS 1.2, text for a point":     tls12With(3, 23, 65, append([]byte{4}, bytes.Repeat([]byte("x"), 64)...)),
		"TLS 1.2, finite-field DH":      append(bytes.Repeat([]byte{0xC3}, 64), bytes.Repeat([]byte{0, 2, 7, 7}, 17)...),
		"TLS 1.2, DER around P-256":     derAround(tls12With(3, 23, 65, p256), []byte{0x30, 0x81, 0x82, 0x04, 0x81, 0x7f}),
		"TLS 1.2, CMS attributes":       derAround(tls12Message(29), []byte{0x31, 0x62, 0x04, 0x60}),
		"TLS 1.2, DER around X25519":    derAround(tls12Message(29), []byte{0x30, 0x62, 0x02, 0x01, 0x00, 0x04, 0x5d}),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseTLSSign(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, msg))
			wantErr(t, err, ErrFormat)
		})
	}
	for n := range 2 {
		_, err := ParseTLSSign(make([]byte, n))
		wantErr(t, err, ErrFormat)
	}
}

// derAround puts the start of a DER structure over the randoms, which a client and a dishonest edge choose.
func derAround(msg, start []byte) []byte {
	copy(msg, start)
	return msg
}

func jwt() []byte {
	enc := base64.RawURLEncoding.EncodeToString
	return []byte(enc([]byte(`{"alg":"ES256","typ":"JWT"}`)) + "." + enc([]byte(`{"sub":"admin","exp":4102444800}`)))
}

// sshChallenge is what an SSH client signs to log in (RFC 4252, section 7).
func sshChallenge(user string, blob int) []byte {
	var b []byte
	str := func(s string) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(s)))
		b = append(b, s...)
	}
	str(strings.Repeat("s", 32))
	b = append(b, 50)
	str(user)
	str("ssh-connection")
	str("publickey")
	b = append(b, 1)
	str("ecdsa-sha2-nistp256")
	str(strings.Repeat("k", blob))
	return b
}

// An SSH challenge with a user name made to look like ECDHE parameters has every length right, and fails on the point.
func TestParseTLSSignRefusesFittedSSHChallenge(t *testing.T) {
	msg := sshChallenge(strings.Repeat("u", 23)+"\x03\x00\x19\x85\x04"+strings.Repeat("u", 30), 51)
	for len(msg) < 64+4+133 {
		msg = append(msg, 'k')
	}
	msg = msg[:64+4+133]
	if !bytes.Equal(msg[64:68], []byte{3, 0, 25, 133}) {
		t.Fatalf("the challenge is not fitted: % x", msg[64:68])
	}
	_, err := ParseTLSSign(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, msg))
	wantErr(t, err, ErrFormat)
	if !strings.Contains(err.Error(), "not on group") {
		t.Errorf("got %q, want it to fail on the point", err)
	}
}

func TestParseTLSSignSchemes(t *testing.T) {
	for _, tt := range []struct {
		scheme       tls.SignatureScheme
		tls12, tls13 bool
	}{
		{tls.PKCS1WithSHA256, true, false}, {tls.PKCS1WithSHA384, true, false}, {tls.PKCS1WithSHA512, true, false},
		{tls.PSSWithSHA256, true, true}, {tls.PSSWithSHA384, true, true}, {tls.PSSWithSHA512, true, true},
		{tls.ECDSAWithP256AndSHA256, true, true}, {tls.ECDSAWithP384AndSHA384, true, true},
		{tls.ECDSAWithP521AndSHA512, true, true}, {tls.Ed25519, true, true},
		{tls.PKCS1WithSHA1, false, false}, {tls.ECDSAWithSHA1, false, false}, {0, false, false},
		{0x0809, false, false}, {0x0808, false, false}, {0xffff, false, false},
	} {
		for _, m := range []struct {
			msg  []byte
			want bool
		}{{tls12Message(29), tt.tls12}, {tls13Message(32), tt.tls13}} {
			_, err := ParseTLSSign(AppendTLSSign(nil, tt.scheme, m.msg))
			if (err == nil) != m.want {
				t.Errorf("scheme 0x%04x, message of %d bytes: got %v, want accepted = %v", uint16(tt.scheme), len(m.msg), err, m.want)
			}
		}
	}
}

func TestCheckScheme(t *testing.T) {
	p256, rsa, ed := p256Key().Public(), rsaKey().Public(), edKey().Public()
	for _, tt := range []struct {
		name    string
		pub     any
		version uint16
		scheme  tls.SignatureScheme
		want    bool
	}{
		{"P-256 in 1.3", p256, tls.VersionTLS13, tls.ECDSAWithP256AndSHA256, true},
		{"P-256 with SHA-384 in 1.3", p256, tls.VersionTLS13, tls.ECDSAWithP384AndSHA384, false},
		{"P-256 with SHA-384 in 1.2", p256, tls.VersionTLS12, tls.ECDSAWithP384AndSHA384, true},
		{"RSA PKCS#1 in 1.2", rsa, tls.VersionTLS12, tls.PKCS1WithSHA256, true},
		{"RSA PKCS#1 in 1.3", rsa, tls.VersionTLS13, tls.PKCS1WithSHA256, false},
		{"RSA with an ECDSA scheme", rsa, tls.VersionTLS12, tls.ECDSAWithP256AndSHA256, false},
		{"ECDSA with PSS", p256, tls.VersionTLS13, tls.PSSWithSHA256, false},
		{"Ed25519", ed, tls.VersionTLS13, tls.Ed25519, true},
		{"Ed25519 with ECDSA", ed, tls.VersionTLS13, tls.ECDSAWithP256AndSHA256, false},
		{"SHA-1", rsa, tls.VersionTLS12, tls.PKCS1WithSHA1, false},
		{"TLS 1.1", rsa, tls.VersionTLS11, tls.PKCS1WithSHA256, false},
		{"no key", nil, tls.VersionTLS13, tls.Ed25519, false},
	} {
		if err := CheckScheme(tt.pub, tt.version, tt.scheme); (err == nil) != tt.want {
			t.Errorf("%s: got %v, want allowed = %v", tt.name, err, tt.want)
		}
	}
}

func TestVerifyTLS(t *testing.T) {
	msg := tls13Message(32)
	sign := func(k crypto.Signer, s tls.SignatureScheme) []byte {
		row := schemes[s]
		return must(k.Sign(rand.Reader, digestOf(row.hash, msg), signOpts(row.kind, row.hash)))
	}
	for _, tt := range []struct {
		scheme tls.SignatureScheme
		key    crypto.Signer
	}{
		{tls.PKCS1WithSHA256, rsaKey()}, {tls.PKCS1WithSHA512, rsaKey()}, {tls.PSSWithSHA256, rsaKey()}, {tls.PSSWithSHA384, rsaKey()},
		{tls.ECDSAWithP256AndSHA256, p256Key()}, {tls.ECDSAWithP384AndSHA384, p256Key()}, {tls.Ed25519, edKey()},
	} {
		sig := sign(tt.key, tt.scheme)
		if err := VerifyTLS(tt.key.Public(), tt.scheme, msg, sig); err != nil {
			t.Errorf("%s: %v", tt.scheme, err)
		}
		wantErr(t, VerifyTLS(tt.key.Public(), tt.scheme, msg[:len(msg)-1], sig), ErrSignature)
		wantErr(t, VerifyTLS(tt.key.Public(), tt.scheme, msg, sig[:len(sig)-1]), ErrSignature)
		wantErr(t, VerifyTLS(tt.key.Public(), tt.scheme, msg, nil), ErrSignature)
	}
	// A PSS signature is no PKCS#1 signature, nor is a scheme of another key type ever right.
	if err := VerifyTLS(rsaKey().Public(), tls.PKCS1WithSHA256, msg, sign(rsaKey(), tls.PSSWithSHA256)); err == nil {
		t.Error("PSS signature verified as PKCS#1 v1.5")
	}
	if err := VerifyTLS(rsaKey().Public(), tls.Ed25519, msg, sign(edKey(), tls.Ed25519)); err == nil {
		t.Error("Ed25519 signature verified with an RSA key")
	}
	if err := VerifyTLS(p256Key().Public(), 0x0203, msg, nil); err == nil {
		t.Error("unknown scheme verified")
	}
}

// Attacker: an edge whose identity was stolen, who chooses the payload. Whatever is accepted must be one of the two
// shapes, checked here in another way than the parser does.
func FuzzParseTLSSign(f *testing.F) {
	for _, msg := range accepted() {
		f.Add(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, msg))
		f.Add(AppendTLSSign(nil, tls.PSSWithSHA256, msg))
	}
	f.Add(AppendTLSSign(nil, tls.ECDSAWithP256AndSHA256, sshChallenge("root", 51)))
	f.Fuzz(func(t *testing.T, payload []byte) {
		m, err := ParseTLSSign(payload)
		if err != nil {
			wantErr(t, err, ErrFormat)
			return
		}
		if !bytes.Equal(AppendTLSSign(nil, m.Scheme, m.Message), payload) {
			t.Fatal("payload does not re-encode")
		}
		n := len(m.Message)
		switch m.Version {
		case tls.VersionTLS13:
			want := strings.Repeat(" ", 64) + "TLS 1.3, server CertificateVerify" + "\x00"
			if !strings.HasPrefix(string(m.Message), want) || n != 98+32 && n != 98+48 {
				t.Fatalf("accepted as TLS 1.3: %q", m.Message)
			}
		case tls.VersionTLS12:
			sizes := map[byte]int{23: 65, 24: 97, 25: 133, 29: 32, 30: 56}
			size := sizes[m.Message[66]]
			if size == 0 || n != 68+size || m.Message[64] != 3 || m.Message[65] != 0 || int(m.Message[67]) != size {
				t.Fatalf("accepted as TLS 1.2: %x", m.Message)
			}
		default:
			t.Fatalf("version 0x%04x", m.Version)
		}
	})
}
