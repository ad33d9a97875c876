package pkcs11

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	ck "github.com/miekg/pkcs11"

	"github.com/keyhaven/keyhaven/keyless"
	"github.com/keyhaven/keyhaven/signer"
)

// A Description is what a discovery found out about a key. It lets another process use the key without a discovery of its own, see
// [Token.Adopt].
type Description struct {
	Info       signer.KeyInfo
	Public     crypto.PublicKey
	Algorithms []signer.Algorithm // those that the self-test found to work
	Decrypt    bool               // raw decryption works

	kind    uint
	always  bool
	methods map[signer.Algorithm]method
}

// maxCertificate bounds the certificate of a description, in bytes; a larger one is left out.
const maxCertificate = 64 << 10

// maxMethods bounds the algorithms of a description: there are not that many.
const maxMethods = 64

// wireDescription is a Description as JSON. The label is bytes, as tokens do not promise UTF-8.
type wireDescription struct {
	Public, Label, ID, Certificate                         []byte
	Home                                                   string
	Extractable, NeverExtractable, Local, Always, Decrypts bool
	Kind                                                   uint
	Methods                                                []wireMethod
}

type wireMethod struct {
	Kind                       signer.Kind
	Hash                       crypto.Hash
	Mechanism, Digest, MGF, PS uint // PS is the length of the PSS salt
	Software                   bool
}

// Describe returns the description of a key that a [Token] returned.
func Describe(k signer.Key) (*Description, error) {
	if d, ok := k.(decrypter); ok {
		k = d.key
	}
	own, ok := k.(*key)
	if !ok {
		return nil, named(errors.New("describe key: it is not a token's"))
	}
	d := &Description{Info: own.Info(), Public: own.pub, Decrypt: own.decrypt, kind: own.kind, always: own.always, methods: own.methods}
	d.list()
	return d, nil
}

// list fills in Algorithms.
func (d *Description) list() {
	for alg := range d.methods {
		d.Algorithms = append(d.Algorithms, alg)
	}
	slices.SortFunc(d.Algorithms, func(a, b signer.Algorithm) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Hash, b.Hash))
	})
}

// MarshalBinary returns what ParseDescription reads. Equal descriptions have equal bytes.
func (d *Description) MarshalBinary() ([]byte, error) {
	pub, err := x509.MarshalPKIXPublicKey(d.Public)
	if err != nil {
		return nil, named(fmt.Errorf("describe key: %w", err))
	}
	w := wireDescription{
		Public: pub, Label: []byte(d.Info.Label), ID: d.Info.ID, Home: d.Info.Home, Extractable: d.Info.Extractable,
		NeverExtractable: d.Info.NeverExtractable, Local: d.Info.Local, Always: d.always, Decrypts: d.Decrypt, Kind: d.kind,
	}
	if c := d.Info.Certificate; c != nil && len(c.Raw) <= maxCertificate {
		w.Certificate = c.Raw
	}
	for _, alg := range d.Algorithms {
		m := d.methods[alg]
		w.Methods = append(w.Methods, wireMethod{alg.Kind, alg.Hash, m.id, m.hash, m.mgf, m.salt, m.software})
	}
	return json.Marshal(w)
}

// ParseDescription reads what MarshalBinary wrote.
func ParseDescription(b []byte) (*Description, error) {
	d, err := parseDescription(b)
	if err != nil {
		return nil, named(fmt.Errorf("description of a key: %w", err))
	}
	return d, nil
}

func parseDescription(b []byte) (*Description, error) {
	var w wireDescription
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&w); err != nil {
		return nil, err
	}
	pub, err := x509.ParsePKIXPublicKey(w.Public)
	if err != nil {
		return nil, err
	}
	ski, err := keyless.SKIOf(pub)
	if err != nil {
		return nil, err
	}
	d := &Description{Public: pub, Decrypt: w.Decrypts, kind: w.Kind, always: w.Always, methods: map[signer.Algorithm]method{}}
	_, isRSA := pub.(*rsa.PublicKey)
	fits := isRSA && w.Kind == ck.CKK_RSA || !isRSA && (&private{kind: w.Kind}).sameKind(pub)
	if !fits || w.Decrypts && !isRSA || len(w.Methods) > maxMethods || len(w.ID) > maxID {
		return nil, errors.New("its parts do not fit each other")
	}
	d.Info = signer.KeyInfo{SKI: ski, Label: string(w.Label), ID: w.ID, Home: w.Home, Type: signer.TypeOf(pub),
		Extractable: w.Extractable, NeverExtractable: w.NeverExtractable, Local: w.Local}
	if len(w.Certificate) > 0 {
		if d.Info.Certificate, err = x509.ParseCertificate(w.Certificate); err != nil {
			return nil, err
		}
		if !equal(pub, d.Info.Certificate.PublicKey) {
			return nil, ErrCertificateMismatch
		}
	}
	for _, m := range w.Methods {
		alg := signer.Algorithm{Kind: m.Kind, Hash: m.Hash}
		if !signer.Fits(pub, alg) {
			return nil, fmt.Errorf("%w: %v with %v", ErrUnsupported, m.Kind, m.Hash)
		}
		d.methods[alg] = method{mechanism{m.Mechanism, m.Digest, m.MGF, m.PS}, m.Software}
	}
	d.list()
	if _, probe := d.methods[probeAlgorithm(pub)]; !probe && (w.Kind != ck.CKK_RSA || !d.Decrypt && len(d.methods) == 0) {
		return nil, errors.New("the key can do nothing")
	}
	return d, nil
}

// Adopt returns the key that another process described. The token is not asked: the key is found on its first use, by its public key.
func (t *Token) Adopt(d *Description) signer.Key {
	k := &key{t: t, pub: d.Public, kind: d.kind, order: orderOf(d.Public), always: d.always, methods: d.methods, decrypt: d.Decrypt}
	info := d.Info
	k.info.Store(&info)
	return k.face()
}
