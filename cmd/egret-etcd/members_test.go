package main

import (
	"context"
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
	life := func(c x509.Certificate) *x509.Certificate {
		c.NotBefore, c.NotAfter = time.Now().Add(-certificate.Skew), time.Now().Add(time.Hour)
		return &c
	}
	ca, signer, err := certificate.New(life(x509.Certificate{
		Subject: pkix.Name{CommonName: "a CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for secret, leaf := range map[string]x509.Certificate{
		"egret-etcd-server": {Subject: pkix.Name{CommonName: "egret-etcd"}, ExtKeyUsage: append(client, x509.ExtKeyUsageServerAuth),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{i.creds.ServerName()}},
		"egret-etcd-root": {Subject: pkix.Name{CommonName: "root"}, ExtKeyUsage: client},
	} {
		leaf.KeyUsage = x509.KeyUsageDigitalSignature
		cert, key, err := certificate.New(life(leaf), ca, signer)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		err = os.MkdirAll(filepath.Join(i.dir, secret), 0o700)
		for name, block := range map[string]pem.Block{
			"ca.crt": {Type: "CERTIFICATE", Bytes: ca.Raw}, "tls.crt": {Type: "CERTIFICATE", Bytes: cert.Raw}, "tls.key": {Type: "PRIVATE KEY", Bytes: der},
		} {
			err = errors.Join(err, os.WriteFile(filepath.Join(i.dir, secret, name), pem.EncodeToMemory(&block), 0o600))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return i
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
