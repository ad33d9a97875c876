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

// loadCertificates reads and checks the zone's certificates.
func (z *Zone) loadCertificates(c *Config, r *report, now time.Time) (warnings []string) {
	files := c.Certificates
	key := func(i int) string { return fmt.Sprintf("certificates[%d]", i) }
	switch {
	case c.CertificatePEM != "":
		z.inlineCertificate(c, r)
		files = nil
	case c.Certificate != "" && len(files) > 0:
		r.fault("certificate", "is given beside certificates; put the file into that list")
		return nil
	case c.Certificate != "":
		files, key = []string{c.Certificate}, func(int) string { return "certificate" }
	case len(files) == 0:
		r.fault("certificate", "no file with the certificate chain")
		return nil
	}
	for i, file := range files {
		if j := slices.Index(files, file); j < i {
			r.fault(key(i), "is the file of %s; remove one", key(j))
			continue
		}
		cert, err := z.loadChain(file)
		if err != nil {
			r.fault(key(i), "%v", err)
			continue
		}
		z.Certificates = append(z.Certificates, cert)
	}
	for _, cert := range z.Certificates {
		warnings = append(warnings, z.remarks(cert, now)...)
	}
	rsaKey := slices.ContainsFunc(z.Certificates, func(c *Certificate) bool { _, ok := c.Leaf.PublicKey.(*rsa.PublicKey); return ok })
	if z.AllowRSADecrypt && len(z.Certificates) > 0 && !rsaKey {
		r.fault("allow_rsa_decrypt", "the certificate's key is %s; decryption needs RSA", z.Certificates[0].Leaf.PublicKeyAlgorithm)
	}
	return warnings
}

// loadChain reads and checks one certificate chain.
func (z *Zone) loadChain(file string) (*Certificate, error) {
	if file == "" {
		return nil, errors.New("no file with the certificate chain")
	}
	chain, err := readChain(file)
	if err != nil {
		return nil, err
	}
	return z.checkChain(file, chain)
}

// inlineName stands for the file of a chain that is in the configuration itself.
const inlineName = "certificate_pem"

func (z *Zone) inlineCertificate(c *Config, r *report) {
	if c.Certificate != "" || len(c.Certificates) > 0 {
		r.fault(inlineName, "is given beside a certificate file; a zone has one or the other")
		return
	}
	chain, err := parseChain(inlineName, []byte(c.CertificatePEM))
	var cert *Certificate
	if err == nil {
		cert, err = z.checkChain(inlineName, chain)
	}
	if err != nil { // which begins with the name as the fault does
		r.fault(inlineName, "%s", strings.TrimLeft(strings.TrimPrefix(err.Error(), inlineName), ": "))
		return
	}
	z.Certificates = append(z.Certificates, cert)
}

// checkChain checks a chain that was found in file.
func (z *Zone) checkChain(file string, chain []*x509.Certificate) (_ *Certificate, err error) {
	c := &Certificate{File: file, Leaf: chain[0]}
	for _, cert := range chain {
		c.Chain = append(c.Chain, cert.Raw)
	}
	for i := range len(chain) - 1 {
		if err := chain[i].CheckSignatureFrom(chain[i+1]); err != nil {
			return nil, fmt.Errorf("%s: certificate %d (%s) is not issued by certificate %d (%s): %w; the order is leaf first, each followed by its issuer",
				file, i+1, chain[i].Subject, i+2, chain[i+1].Subject, err)
		}
	}
	if c.Leaf.IsCA {
		return nil, fmt.Errorf("%s: the first certificate (%s) is that of an authority; put the leaf first", file, c.Leaf.Subject)
	}
	if eku := c.Leaf.ExtKeyUsage; len(eku) > 0 && !slices.Contains(eku, x509.ExtKeyUsageServerAuth) && !slices.Contains(eku, x509.ExtKeyUsageAny) {
		return nil, fmt.Errorf("%s: the leaf is not for server authentication", file)
	}
	for _, h := range z.Hosts {
		probe := h
		if rest, ok := strings.CutPrefix(h, "*"); ok {
			probe = "any-label" + rest
		}
		if c.Leaf.VerifyHostname(probe) != nil {
			return nil, fmt.Errorf("%s does not cover host %s, only %s", file, h, strings.Join(c.Leaf.DNSNames, ", "))
		}
	}
	if c.Schemes, err = schemesOf(c.Leaf); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if c.SKI, err = keyless.SKIOf(c.Leaf.PublicKey); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return c, nil
}

// remarks says what is noteworthy about a certificate's validity.
func (z *Zone) remarks(c *Certificate, now time.Time) (warnings []string) {
	say := func(format string, at time.Time) {
		warnings = append(warnings, fmt.Sprintf("zone %s: certificate %s "+format+" %s", z.Name, c.File, at.Format(time.RFC3339)))
	}
	switch left := c.Leaf.NotAfter.Sub(now); {
	case left <= 0:
		say("expired on", c.Leaf.NotAfter)
	case left < expiryWarning:
		say("expires on", c.Leaf.NotAfter)
	}
	if now.Before(c.Leaf.NotBefore) {
		say("is not valid before", c.Leaf.NotBefore)
	}
	return warnings
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
	return parseChain(file, data)
}

// parseChain is [readChain] for what was read.
func parseChain(file string, data []byte) ([]*x509.Certificate, error) {
	if len(data) > maxChainFile {
		return nil, errors.New(file + " is larger than 1 MiB")
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
