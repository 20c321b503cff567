package kubelet

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/egret-project/egret/crdsync/certificate"
	"github.com/egret-project/egret/integration/lab"
)

// An etcd that is not the chart's: it runs on the control host, speaks TLS, and knows its clients by certificates of a
// CA that neither Egret nor Kubernetes has made. It has no users yet.

// ownPort is its port for clients; the next one is for its members, of which there is one.
const ownPort = 2479

// helmInstalledWithOwnEtcd does what docs/install.md says of your own etcd.
func helmInstalledWithOwnEtcd(t *testing.T, c *cluster) {
	c.begin()
	certificates := c.startOwnEtcd()
	c.root = filepath.Join(certificates, "root")
	of := func(part string) map[string]string {
		files := map[string]string{}
		for _, file := range []string{"ca.crt", "tls.crt", "tls.key"} {
			files[file] = filepath.Join(certificates, "egret-"+part, file)
		}
		return files
	}
	for _, command := range [][]string{
		documented(t, "Chart", "kubectl create namespace", nil), documented(t, "Chart", "kubectl label namespace", nil),
		documented(t, "Your own etcd", "kubectl -n egret-system create secret generic egret-etcd-agent", of("agent")),
		documented(t, "Your own etcd", "kubectl -n egret-system create secret generic egret-etcd-crdsync", of("crdsync")),
		documented(t, "Your own etcd", "kubectl -n egret-system create secret generic egret-etcd-operator", of("operator")),
	} {
		c.kubectl(command[1:]...)
	}
	c.workloads = []string{"deployment/egret-credentials", "daemonset/egret-agent", "deployment/egret-crdsync"}
	repository, tag := split(*name)
	c.helmInstall(append(documented(t, "Chart", "helm install", map[string]string{"VALUES": c.file("../../manifests/examples/values/own-etcd.yaml")}),
		"--set", "image.repository="+repository, "--set-string", "image.tag="+tag, "--set", fmt.Sprintf("etcd.endpoints={https://%v:%d}", lab.ControlIP, ownPort)))
}

// startOwnEtcd starts it, until all steps are done, and returns the folder with a folder for each certificate, by its
// common name.
func (c *cluster) startOwnEtcd() (certificates string) {
	c.t.Helper()
	// not a folder of the test, whose name has a comma: for kubectl it ends a file's
	dir, err := os.MkdirTemp("", "egret-kubelet-")
	if err == nil {
		c.way.Cleanup(func() { os.RemoveAll(dir) }) // what stays is in the folder for temporary files
		err = writeCertificates(dir)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	cmd, err := c.lab.Command(ctx, "control", "", filepath.Join(filepath.Dir(c.lab.EgretPath()), "egret-etcd"), "run", "--name=own", "--data-dir="+filepath.Join(dir, "data", "own"),
		fmt.Sprintf("--initial-cluster=own=https://%v:%d", lab.ControlIP, ownPort+1), "--host-ip="+lab.ControlIP.String(), "--listen-ip="+lab.ControlIP.String(),
		fmt.Sprintf("--client-port=%d", ownPort), fmt.Sprintf("--peer-port=%d", ownPort+1), "--status-port=0", "--certs="+filepath.Join(dir, "member"))
	if err != nil {
		stop()
		c.t.Fatal(err)
	}
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		stop()
		c.t.Fatal(err)
	}
	way := c.way
	way.Cleanup(func() {
		stop()
		_ = cmd.Wait() // it was told to end
		if way.Failed() {
			way.Logf("the etcd of one's own said:\n%s", said.String())
		}
	})
	c.until(60*time.Second, "the etcd of one's own listens", func() (bool, string) {
		err := c.lab.In("control", "", func() error {
			conn, err := net.DialTimeout("tcp", fmt.Sprintf("%v:%d", lab.ControlIP, ownPort), time.Second)
			if err == nil {
				err = conn.Close()
			}
			return err
		})
		return err == nil, fmt.Sprint(err)
	})
	return dir
}

// writeCertificates makes a CA, and of it certificates of the member and of each client, in a folder of its common
// name.
func writeCertificates(dir string) error {
	now := time.Now()
	life := func(c x509.Certificate) *x509.Certificate {
		c.NotBefore, c.NotAfter = now.Add(-certificate.Skew), now.Add(24*time.Hour)
		return &c
	}
	ca, signer, err := certificate.New(life(x509.Certificate{
		Subject: pkix.Name{CommonName: "somebody's CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}), nil, nil)
	if err != nil {
		return err
	}
	client := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	for _, leaf := range []x509.Certificate{
		{Subject: pkix.Name{CommonName: "member"}, ExtKeyUsage: append(client, x509.ExtKeyUsageServerAuth), IPAddresses: []net.IP{lab.ControlIP.AsSlice()}},
		{Subject: pkix.Name{CommonName: "root"}, ExtKeyUsage: client},
		{Subject: pkix.Name{CommonName: "egret-agent"}, ExtKeyUsage: client},
		{Subject: pkix.Name{CommonName: "egret-crdsync"}, ExtKeyUsage: client},
		{Subject: pkix.Name{CommonName: "egret-operator"}, ExtKeyUsage: client},
	} {
		if err := writeCertificate(filepath.Join(dir, leaf.Subject.CommonName), life(leaf), ca, signer); err != nil {
			return err
		}
	}
	return nil
}

func writeCertificate(dir string, leaf, ca *x509.Certificate, signer crypto.Signer) error {
	leaf.KeyUsage = x509.KeyUsageDigitalSignature
	cert, key, err := certificate.New(leaf, ca, signer)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	err = os.MkdirAll(dir, 0o700)
	for name, block := range map[string]pem.Block{
		"ca.crt": {Type: "CERTIFICATE", Bytes: ca.Raw}, "tls.crt": {Type: "CERTIFICATE", Bytes: cert.Raw}, "tls.key": {Type: "PRIVATE KEY", Bytes: der},
	} {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&block), 0o600))
	}
	return err
}
