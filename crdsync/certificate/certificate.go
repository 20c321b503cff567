// Package certificate makes the certificates that Egret signs itself: of the webhook, and of its own etcd.
package certificate

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"math/big"
	"time"
)

// Skew is by how much the clock of who looks at a certificate may be behind: it is valid from so long ago.
const Skew = time.Hour

// New makes a certificate and its key (ECDSA, P-256) from the template, to which it gives a serial number that no other
// has: two CAs share a name. parent and signer are the CA; a certificate without a signer is its own.
func New(template, parent *x509.Certificate, signer crypto.Signer) (*x509.Certificate, *ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("making a key: %w", err)
	}
	if signer == nil {
		parent, signer = template, key
	}
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[0] &= 0x7f
	template.SerialNumber = new(big.Int).SetBytes(b[:])
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		return nil, nil, fmt.Errorf("making the certificate of %s: %w", template.Subject.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	return cert, key, err
}

// Due reports whether a certificate is to be replaced: when a third of its life is left.
func Due(c *x509.Certificate, now time.Time) bool {
	return now.After(c.NotAfter.Add(-c.NotAfter.Sub(c.NotBefore) / 3))
}
