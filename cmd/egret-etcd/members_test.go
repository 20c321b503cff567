package main

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/egret-project/egret/crdsync/certificate"
)

// certified is an installation whose certificates no API server has.
func certified(t *testing.T) *installation {
	t.Helper()
	i := newMembers(t, netip.MustParseAddr("127.0.0.1"))
	ca, signer := newCA(t, "a CA")
	i.trust(ca)
	i.issue(ca, signer)
	return i
}

// anHour returns a certificate that is good from now on for an hour.
func anHour(c x509.Certificate) *x509.Certificate {
	c.NotBefore, c.NotAfter = time.Now().Add(-certificate.Skew), time.Now().Add(time.Hour)
	return &c
}

func newCA(t *testing.T, name string) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	ca, signer, err := certificate.New(anHour(x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return ca, signer
}

// trust has members and clients trust these CAs.
func (i *installation) trust(cas ...*x509.Certificate) {
	i.Helper()
	var file []byte
	for _, ca := range cas {
		file = append(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw})...)
	}
	i.write("egret-etcd-root", "ca.crt", file)
	i.write("egret-etcd-server", "ca.crt", file)
}

// issue has a CA make the certificates of members and of etcd's user root.
func (i *installation) issue(ca *x509.Certificate, signer crypto.Signer) {
	i.Helper()
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for secret, leaf := range map[string]x509.Certificate{
		"egret-etcd-server": {Subject: pkix.Name{CommonName: "egret-etcd"}, ExtKeyUsage: append(client, x509.ExtKeyUsageServerAuth),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{i.creds.ServerName()}},
		"egret-etcd-root": {Subject: pkix.Name{CommonName: "root"}, ExtKeyUsage: client},
	} {
		leaf.KeyUsage = x509.KeyUsageDigitalSignature
		cert, key, err := certificate.New(anHour(leaf), ca, signer)
		if err != nil {
			i.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			i.Fatal(err)
		}
		i.write(secret, "tls.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
		i.write(secret, "tls.key", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	}
}

// write writes a file of a Secret, as a whole, as a kubelet does.
func (i *installation) write(secret, name string, b []byte) {
	i.Helper()
	file := filepath.Join(i.dir, secret, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file+".new", b, 0o600), os.Rename(file+".new", file)); err != nil {
		i.Fatal(err)
	}
}

// Without the others it never gets ready.
func TestAMemberThatIsNotReadyStopsWhenItIsTold(t *testing.T) {
	t.Parallel()
	i := certified(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- i.run(ctx, 0) }()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		c, err := net.Dial("tcp", i.at(i.peers[0]))
		if err == nil {
			c.Close()
		}
		if log, _ := filepath.Glob(filepath.Join(i.data(0), "member", "wal", "*.wal")); err == nil && len(log) > 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it does not listen: %v", err)
		}
	}
	stop()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("it does not end")
	}
}
