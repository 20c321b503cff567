package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/egret-project/egret/store"
)

// authority is a CA of its own for each test.
type authority struct {
	*testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	a := authority{T: t}
	a.cert, a.key = a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

func (a authority) issue(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.Fatal(err)
	}
	c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		a.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.Fatal(err)
	}
	return cert, key
}

func (a authority) pair(use x509.ExtKeyUsage, cn string, names ...string) tls.Certificate {
	a.Helper()
	c, key := a.issue(&x509.Certificate{Subject: pkix.Name{CommonName: cn}, DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{use}})
	return tls.Certificate{Certificate: [][]byte{c.Raw}, PrivateKey: key, Leaf: c}
}

func (a authority) write(dir string, p tls.Certificate) {
	a.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(p.PrivateKey)
	if err != nil {
		a.Fatal(err)
	}
	for name, b := range map[string]*pem.Block{
		"ca.crt": {Type: "CERTIFICATE", Bytes: a.cert.Raw}, "tls.crt": {Type: "CERTIFICATE", Bytes: p.Certificate[0]}, "tls.key": {Type: "PRIVATE KEY", Bytes: key},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
			a.Fatal(err)
		}
	}
}

// dial makes a connection by the flags with a server that shows a certificate, and returns whom the server saw.
func dial(t *testing.T, f *etcdFlags, host string, shows tls.Certificate) (string, error) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	seen := make(chan string, 1)
	go func() {
		name := ""
		if c, err := l.Accept(); err == nil {
			s := tls.Server(c, &tls.Config{Certificates: []tls.Certificate{shows}, ClientAuth: tls.RequestClientCert, NextProtos: []string{"h2"}})
			if err := s.Handshake(); err == nil && len(s.ConnectionState().PeerCertificates) > 0 {
				name = s.ConnectionState().PeerCertificates[0].Subject.CommonName
			}
			c.Close()
		}
		seen <- name
	}()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, _, err = store.Reloading(f.tls).ClientHandshake(t.Context(), net.JoinHostPort(host, "2379"), c)
	c.Close()
	return <-seen, err
}

// An installation lives for years, and its certificates for weeks.
func TestCertificatesThatWereReplacedNeedNoRestart(t *testing.T) {
	dir := t.TempDir()
	first, second := newAuthority(t), newAuthority(t)
	const host = "127.0.0.1"
	server := func(a authority) tls.Certificate { return a.pair(x509.ExtKeyUsageServerAuth, "server", "etcd.example") }
	first.write(dir, first.pair(x509.ExtKeyUsageClientAuth, "first"))
	f := etcdFlags{cacert: filepath.Join(dir, "ca.crt"), cert: filepath.Join(dir, "tls.crt"), key: filepath.Join(dir, "tls.key")}
	if who, err := dial(t, &f, host, server(first)); err != nil || who != "first" {
		t.Errorf("etcd saw %q, %v: want first", who, err)
	}
	if _, err := dial(t, &f, host, server(second)); err == nil {
		t.Error("etcd of another CA is trusted")
	}
	second.write(dir, second.pair(x509.ExtKeyUsageClientAuth, "second"))
	if who, err := dial(t, &f, host, server(second)); err != nil || who != "second" {
		t.Errorf("after the files were replaced, etcd saw %q, %v: want second", who, err)
	}
	if _, err := dial(t, &f, host, server(first)); err == nil {
		t.Error("the CA that was replaced is trusted")
	}
	// What crypto/tls would refuse is refused.
	if _, err := dial(t, &f, "10.0.0.1", server(second)); err == nil {
		t.Error("a certificate for another host is taken")
	}
	if _, err := dial(t, &f, host, second.pair(x509.ExtKeyUsageClientAuth, "client")); err == nil {
		t.Error("a client's certificate is taken for etcd's")
	}
	f.serverName = "etcd.example"
	if _, err := dial(t, &f, "10.0.0.1", server(second)); err != nil {
		t.Errorf("with --etcd-server-name: %v", err)
	}
	f.serverName = "another.example"
	if _, err := dial(t, &f, host, server(second)); err == nil {
		t.Error("a certificate without the name of --etcd-server-name is taken")
	}
	// Files that cannot be read are no reason to trust anybody.
	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	if _, err := dial(t, &f, host, server(second)); err == nil {
		t.Error("etcd is trusted without a CA")
	}
}
