package manifests

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"

	"github.com/egret-project/egret/store"
)

// Kubectl exec runs a command with the environment of the container, and with its files, and with nothing else of what
// the container was started with: its arguments are those of the agent.
func TestExecIntoAPodFindsItsEtcd(t *testing.T) {
	t.Parallel()
	const prefix = "/of-this-cluster/"
	secret := t.TempDir() // that of the volume etcd, as the guide makes it
	writeCertificate(t, secret)
	endpoint, put := secureEtcd(t, secret)
	put(prefix+store.CordonKey("node-7"), `{"node": "node-7"}`)
	bin := egret(t)
	for name, s := range podSpecs(t) {
		container := s.Containers[0]
		mounts := strings.NewReplacer(mountPath(t, container, "etcd"), secret)
		c := exec.Command(bin, "get", "cordons")
		c.Env = []string{"HOME=/root", "HOSTNAME=node-1"}
		for _, e := range container.Env {
			c.Env = append(c.Env, e.Name+"="+mounts.Replace(valueOf(t, e, map[string]string{"endpoints": endpoint, "etcd-prefix": prefix})))
		}
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "node-7") {
			t.Errorf("egret get cordons in a pod of %s: %v\n%swant node-7, of the etcd and the prefix that the ConfigMap names", name, err, out)
		}
	}
}

func mountPath(t *testing.T, c corev1.Container, volume string) string {
	t.Helper()
	for _, m := range c.VolumeMounts {
		if m.Name == volume {
			return m.MountPath
		}
	}
	t.Fatalf("container %s mounts no volume %s", c.Name, volume)
	return ""
}

// valueOf returns the value that a variable has when the ConfigMap egret is as config.
func valueOf(t *testing.T, e corev1.EnvVar, config map[string]string) string {
	t.Helper()
	if e.ValueFrom == nil {
		return e.Value
	}
	if ref := e.ValueFrom.ConfigMapKeyRef; ref != nil {
		value, ok := config[ref.Key]
		if !ok || ref.Name != "egret" {
			t.Errorf("variable %s: want a key of ConfigMap egret, not %s of %s", e.Name, ref.Key, ref.Name)
		}
		return value
	}
	return "node-1" // a field of the pod
}

// secureEtcd starts an etcd that hears only clients with a certificate of the secret's CA.
func secureEtcd(t *testing.T, secret string) (endpoint string, put func(key, value string)) {
	t.Helper()
	cfg := embed.NewConfig()
	cfg.Dir, cfg.UnsafeNoFsync, cfg.ZapLoggerBuilder = t.TempDir(), true, embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{{Scheme: "https", Host: "127.0.0.1:0"}}, []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
	cfg.AdvertiseClientUrls = cfg.ListenClientUrls
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = filepath.Join(secret, "tls.crt"), filepath.Join(secret, "tls.key")
	cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = filepath.Join(secret, "ca.crt"), true
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		t.Fatalf("starting etcd: %v", err)
	}
	t.Cleanup(e.Close)
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd does not get ready")
	}
	client := v3client.New(e.Server)
	t.Cleanup(func() { client.Close() })
	return "https://" + e.Clients[0].Addr().String(), func(key, value string) {
		t.Helper()
		if _, err := client.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
}

// writeCertificate writes ca.crt, tls.crt and tls.key: a certificate of its own, for etcd and for its clients.
func writeCertificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "egret"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, b := range map[string][]byte{
		"ca.crt": certificate, "tls.crt": certificate, "tls.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER}),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
