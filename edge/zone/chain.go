package zone

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

const (
	maxChainFile = 1 << 20
	minRSABits   = 2048
)

// loadChain reads and checks the certificate chain.
func (z *Zone) loadChain(c *Config, r *report, now time.Time) (warnings []string) {
	if c.Certificate == "" {
		r.fault("certificate", "no file with the certificate chain")
		return nil
	}
	chain, err := readChain(c.Certificate)
	if err != nil {
		r.fault("certificate", "%v", err)
		return nil
	}
	z.Leaf = chain[0]
	for _, cert := range chain {
		z.Chain = append(z.Chain, cert.Raw)
	}
	for i := range len(chain) - 1 {
		if err := chain[i].CheckSignatureFrom(chain[i+1]); err != nil {
			r.fault("certificate", "%s: certificate %d (%s) is not issued by certificate %d (%s): %v; the order is leaf first, each followed by its issuer",
				c.Certificate, i+1, chain[i].Subject, i+2, chain[i+1].Subject, err)
			return nil
		}
	}
	if z.Leaf.IsCA {
		r.fault("certificate", "%s: the first certificate (%s) is that of an authority; put the leaf first", c.Certificate, z.Leaf.Subject)
		return nil
	}
	if eku := z.Leaf.ExtKeyUsage; len(eku) > 0 && !slices.Contains(eku, x509.ExtKeyUsageServerAuth) && !slices.Contains(eku, x509.ExtKeyUsageAny) {
		r.fault("certificate", "%s: the leaf is not for server authentication", c.Certificate)
	}
	for _, h := range z.Hosts {
		probe := h
		if rest, ok := strings.CutPrefix(h, "*"); ok {
			probe = "any-label" + rest
		}
		if z.Leaf.VerifyHostname(probe) != nil {
			r.fault("certificate", "%s does not cover host %s, only %s", c.Certificate, h, strings.Join(z.Leaf.DNSNames, ", "))
		}
	}
	z.checkKey(c, r)
	switch left := z.Leaf.NotAfter.Sub(now); {
	case left <= 0:
		warnings = append(warnings, fmt.Sprintf("zone %s: certificate %s expired on %s", z.Name, c.Certificate, z.Leaf.NotAfter.Format(time.RFC3339)))
	case left < expiryWarning:
		warnings = append(warnings, fmt.Sprintf("zone %s: certificate %s expires on %s", z.Name, c.Certificate, z.Leaf.NotAfter.Format(time.RFC3339)))
	}
	if now.Before(z.Leaf.NotBefore) {
		warnings = append(warnings, fmt.Sprintf("zone %s: certificate %s is not valid before %s", z.Name, c.Certificate, z.Leaf.NotBefore.Format(time.RFC3339)))
	}
	return warnings
}

func (z *Zone) checkKey(c *Config, r *report) {
	schemes, err := schemesOf(z.Leaf)
	if err != nil {
		r.fault("certificate", "%s: %v", c.Certificate, err)
		return
	}
	z.Schemes = schemes
	if _, isRSA := z.Leaf.PublicKey.(*rsa.PublicKey); z.AllowRSADecrypt && !isRSA {
		r.fault("allow_rsa_decrypt", "the certificate's key is %s; decryption needs RSA", z.Leaf.PublicKeyAlgorithm)
	}
	if z.SKI, err = keyless.SKIOf(z.Leaf.PublicKey); err != nil {
		r.fault("certificate", "%s: %v", c.Certificate, err)
	}
}

// schemesOf returns the signature schemes of TLS that fit the leaf's key, best first. SHA-1 is not among them.
func schemesOf(leaf *x509.Certificate) ([]tls.SignatureScheme, error) {
	switch pub := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		if bits := pub.N.BitLen(); bits < minRSABits {
			return nil, fmt.Errorf("an RSA key of %d bits is too short; %d is the least", bits, minRSABits)
		}
		return []tls.SignatureScheme{
			tls.PSSWithSHA256, tls.PSSWithSHA384, tls.PSSWithSHA512,
			tls.PKCS1WithSHA256, tls.PKCS1WithSHA384, tls.PKCS1WithSHA512,
		}, nil
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}, nil
		case elliptic.P384():
			return []tls.SignatureScheme{tls.ECDSAWithP384AndSHA384}, nil
		case elliptic.P521():
			return []tls.SignatureScheme{tls.ECDSAWithP521AndSHA512}, nil
		}
		return nil, fmt.Errorf("curve %s has no signature scheme in TLS", pub.Curve.Params().Name)
	case ed25519.PublicKey:
		return []tls.SignatureScheme{tls.Ed25519}, nil
	}
	return nil, fmt.Errorf("keys of type %s are not supported; use RSA, ECDSA P-256, P-384, P-521 or Ed25519", leaf.PublicKeyAlgorithm)
}

// readChain reads the certificates of a PEM file. A private key in it is an error: the edge must not hold one.
func readChain(file string) ([]*x509.Certificate, error) {
	data, err := readFile(file)
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			return nil, fmt.Errorf("%s holds a private key; keep the key at the key server and only the certificates here", file)
		}
		if block.Type != "CERTIFICATE" {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", file, len(chain)+1, err)
		}
		chain = append(chain, cert)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s holds no certificate in PEM", file)
	}
	return chain, nil
}

func readFile(file string) ([]byte, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxChainFile {
		return nil, errors.New(file + " is larger than 1 MiB")
	}
	return os.ReadFile(file)
}
