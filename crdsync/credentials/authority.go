package credentials

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/egret-project/egret/crdsync/certificate"
)

const (
	caLife   = 10 * 365 * 24 * time.Hour
	leafLife = 90 * 24 * time.Hour
	// settle is for how long a new CA is trusted before it signs: a kubelet brings a changed Secret into its pods
	// within minutes, and members of etcd, which read the CAs that they trust when they start, have ended one after the
	// other by then, for which all of them have to serve: a person has time to bring back one that is down.
	settle = 7 * 24 * time.Hour

	nextCert, nextKey = "next.crt", "next.key"
)

// pair is a certificate with its key.
type pair struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// authority is the content of the Secret of the CA.
type authority struct {
	name  string // what it is the CA of
	signs pair
	next  *pair               // trusted, and signs when it has settled; nil: there is none
	old   []*x509.Certificate // trusted until they end
}

func newPair(template, parent *x509.Certificate, signer crypto.Signer) (pair, error) {
	cert, key, err := certificate.New(template, parent, signer)
	return pair{cert, key}, err
}

func newCA(of string, now time.Time) (pair, error) {
	return newPair(&x509.Certificate{
		Subject: pkix.Name{CommonName: "egret " + of + " CA " + now.UTC().Format(time.DateOnly)}, NotBefore: now.Add(-certificate.Skew), NotAfter: now.Add(caLife), IsCA: true,
		BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}, nil, nil)
}

// advance makes what is due, and reports whether anything changed.
func (a *authority) advance(now time.Time) (bool, error) {
	before := len(a.old)
	a.old = slices.DeleteFunc(a.old, func(c *x509.Certificate) bool { return now.After(c.NotAfter) })
	changed := len(a.old) != before
	switch {
	case a.signs.cert == nil:
		ca, err := newCA(a.name, now)
		a.signs = ca
		return true, err
	case a.next != nil && now.After(a.next.cert.NotBefore.Add(certificate.Skew+settle)):
		a.old = append(a.old, a.signs.cert)
		a.signs, a.next = *a.next, nil
		return true, nil
	case a.next == nil && certificate.Due(a.signs.cert, now):
		ca, err := newCA(a.name, now)
		a.next = &ca
		return true, err
	}
	return changed, nil
}

// trusted returns all that is trusted, in PEM.
func (a *authority) trusted() []byte {
	list := []*x509.Certificate{a.signs.cert}
	if a.next != nil {
		list = append(list, a.next.cert)
	}
	return encode(append(list, a.old...)...)
}

func encode(certs ...*x509.Certificate) []byte {
	var b bytes.Buffer
	for _, c := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}))
	}
	return b.Bytes()
}

func (p pair) encodeKey() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(p.key)
	if err != nil {
		return nil, fmt.Errorf("writing the key of %s: %w", p.cert.Subject.CommonName, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func (a *authority) data() (map[string][]byte, error) {
	key, err := a.signs.encodeKey()
	out := map[string][]byte{corev1.TLSCertKey: encode(append([]*x509.Certificate{a.signs.cert}, a.old...)...), corev1.TLSPrivateKeyKey: key}
	if a.next != nil && err == nil {
		out[nextCert] = encode(a.next.cert)
		out[nextKey], err = a.next.encodeKey()
	}
	return out, err
}

func readPair(cert, key []byte) (pair, []*x509.Certificate, error) {
	read, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return pair{}, nil, err
	}
	signer, ok := read.PrivateKey.(crypto.Signer)
	if !ok {
		return pair{}, nil, errors.New("its key signs nothing")
	}
	var more []*x509.Certificate
	for _, der := range read.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return pair{}, nil, err
		}
		more = append(more, c)
	}
	return pair{read.Leaf, signer}, more, nil
}

func readAuthority(name string, data map[string][]byte) (a authority, err error) {
	a.name = name
	if a.signs, a.old, err = readPair(data[corev1.TLSCertKey], data[corev1.TLSPrivateKeyKey]); err != nil {
		return a, err
	}
	if len(data[nextCert]) > 0 {
		next, _, err := readPair(data[nextCert], data[nextKey])
		if err != nil {
			return a, fmt.Errorf("%s: %w", nextCert, err)
		}
		a.next = &next
	}
	if !a.signs.cert.IsCA || a.next != nil && !a.next.cert.IsCA {
		return a, errors.New("its certificate is not that of a CA")
	}
	return a, nil
}

// subject is what a certificate is for.
type subject struct {
	secret, name string
	uses         []x509.ExtKeyUsage
	dns          []string // of a server
	ips          []net.IP
}

// issue returns the content of a Secret for s, and whether it differs from what there is: a good certificate stays.
func (a *authority) issue(s subject, have map[string][]byte, now time.Time) (map[string][]byte, bool, error) {
	trusted := a.trusted()
	if a.good(s, have, now) {
		if bytes.Equal(have["ca.crt"], trusted) {
			return have, false, nil
		}
		return map[string][]byte{"ca.crt": trusted, corev1.TLSCertKey: have[corev1.TLSCertKey], corev1.TLSPrivateKeyKey: have[corev1.TLSPrivateKeyKey]}, true, nil
	}
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: s.name}, DNSNames: s.dns, IPAddresses: s.ips, NotBefore: now.Add(-certificate.Skew), NotAfter: now.Add(leafLife),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: s.uses,
	}
	leaf, err := newPair(template, a.signs.cert, a.signs.key)
	if err != nil {
		return nil, false, err
	}
	key, err := leaf.encodeKey()
	return map[string][]byte{"ca.crt": trusted, corev1.TLSCertKey: encode(leaf.cert), corev1.TLSPrivateKeyKey: key}, true, err
}

// due reports whether a certificate is to be replaced. A CA that was made because the former one was gone signs nothing
// in the place of what is still good, until it has settled.
func (a *authority) due(c *x509.Certificate, now time.Time) bool {
	if len(a.old) > 0 && now.Before(a.signs.cert.NotBefore.Add(certificate.Skew+settle)) {
		return !now.Before(c.NotAfter.Add(-24 * time.Hour))
	}
	return certificate.Due(c, now)
}

// good reports whether a Secret has a certificate for s that is trusted and not due.
func (a *authority) good(s subject, have map[string][]byte, now time.Time) bool {
	p, _, err := readPair(have[corev1.TLSCertKey], have[corev1.TLSPrivateKeyKey])
	if err != nil || a.due(p.cert, now) || p.cert.Subject.CommonName != s.name || !slices.Equal(p.cert.DNSNames, s.dns) ||
		!slices.Equal(p.cert.ExtKeyUsage, s.uses) {
		return false
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(a.trusted())
	_, err = p.cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: now, KeyUsages: s.uses})
	return err == nil
}
