package lab

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

// kubeConfig is how to reach the API server.
type kubeConfig struct {
	port  int // on 127.0.0.1
	token string
	ca    string // path
}

func (k *kubeConfig) rest() *rest.Config {
	return &rest.Config{
		Host:            fmt.Sprintf("https://127.0.0.1:%d", k.port),
		BearerToken:     k.token,
		TLSClientConfig: rest.TLSClientConfig{CAFile: k.ca},
		QPS:             -1, // no limit: the server is ours
		Timeout:         10 * time.Second,
	}
}

// serviceCIDRs are those of the cluster, serviceIP is the API server's own Service, the first of them.
const serviceCIDRs = "10.96.0.0/16,fd96::/112"

var serviceIP = netip.MustParseAddr("10.96.0.1")

// writeKubeFiles writes the API server's certificates, keys and tokens, and the kubeconfigs: one for the machine,
// through the relay, and one for the lab's own processes on the LAN.
func (l *Lab) writeKubeFiles() error {
	caKey, ca, err := newCA()
	if err != nil {
		return fmt.Errorf("making the certificate authority: %w", err)
	}
	cert, key, err := newCert(ca, caKey, serverCert())
	if err != nil {
		return fmt.Errorf("making the API server's certificate: %w", err)
	}
	clientCert, clientKey, err := newCert(ca, caKey, kubeletClientCert())
	if err != nil {
		return fmt.Errorf("making the API server's certificate for kubelets: %w", err)
	}
	saKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("making the service account key: %w", err)
	}
	saPEM, err := keyPEM(saKey)
	if err != nil {
		return fmt.Errorf("writing the service account key: %w", err)
	}
	caPEM := certPEM(ca.Raw)
	tokens := fmt.Appendf(nil, "%s,admin,1,system:masters\n", l.cluster.token)
	if l.cfg.Kubelet {
		nodes, err := l.nodeTokens(caPEM)
		if err != nil {
			return err
		}
		tokens = append(tokens, nodes...)
	}
	files := map[string][]byte{
		"ca.crt": caPEM, "apiserver.crt": cert, "apiserver.key": key, "sa.key": saPEM,
		"kubelet-client.crt": clientCert, "kubelet-client.key": clientKey, "tokens.csv": tokens,
	}
	for name, server := range map[string]string{
		"kubeconfig":         l.cluster.rest().Host,
		"kubeconfig.control": apiURL(),
	} {
		if files[name], err = l.kubeconfigFile(server, l.cluster.token, caPEM); err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	for name, b := range files {
		err = errors.Join(err, os.WriteFile(l.path(name), b, 0o600))
	}
	return err
}

// kubeconfigFile returns a kubeconfig for whoever has the token.
func (l *Lab) kubeconfigFile(server, token string, ca []byte) ([]byte, error) {
	c := api.NewConfig()
	c.Clusters[l.cfg.Name] = &api.Cluster{Server: server, CertificateAuthorityData: ca}
	c.AuthInfos["admin"] = &api.AuthInfo{Token: token}
	c.Contexts[l.cfg.Name] = &api.Context{Cluster: l.cfg.Name, AuthInfo: "admin"}
	c.CurrentContext = l.cfg.Name
	return clientcmd.Write(*c)
}

// apiServerArgs returns the command line of kube-apiserver.
func (l *Lab) apiServerArgs() []string {
	args := []string{
		filepath.Join(l.cfg.KubeBin, "kube-apiserver"),
		fmt.Sprintf("--etcd-servers=http://127.0.0.1:%d", kubeEtcdPort),
		"--bind-address=" + ControlIP.String(), fmt.Sprintf("--secure-port=%d", apiPort), "--advertise-address=" + ControlIP.String(),
		"--tls-cert-file=" + l.path("apiserver.crt"), "--tls-private-key-file=" + l.path("apiserver.key"), "--cert-dir=" + l.path("certs"),
		"--service-account-issuer=" + apiURL(),
		"--service-account-key-file=" + l.path("sa.key"), "--service-account-signing-key-file=" + l.path("sa.key"),
		"--token-auth-file=" + l.path("tokens.csv"),
		"--service-cluster-ip-range=" + serviceCIDRs, "--allow-privileged=true",
		// No kube-proxy is on the control host: the server itself looks up where the webhook's Service leads.
		"--enable-aggregator-routing=true",
	}
	if l.cfg.Kubelet {
		return append(args,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--client-ca-file="+l.path("ca.crt"),
			"--kubelet-client-certificate="+l.path("kubelet-client.crt"), "--kubelet-client-key="+l.path("kubelet-client.key"),
			"--kubelet-preferred-address-types=InternalIP")
	}
	return append(args,
		"--authorization-mode=RBAC", "--endpoint-reconciler-type=none",
		// No controller makes service accounts, and none takes the taint of a new node away.
		"--disable-admission-plugins=ServiceAccount,TaintNodesByCondition", "--enable-priority-and-fairness=false")
}

func newCA() (*ecdsa.PrivateKey, *x509.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	t := template("egret-lab-ca")
	t.IsCA, t.BasicConstraintsValid, t.KeyUsage = true, true, x509.KeyUsageCertSign
	der, err := x509.CreateCertificate(rand.Reader, t, t, key.Public(), key)
	if err != nil {
		return nil, nil, err
	}
	ca, err := x509.ParseCertificate(der)
	return key, ca, err
}

// newCert signs what a template says, for a new key.
func newCert(ca *x509.Certificate, caKey crypto.Signer, t *x509.Certificate) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, t, ca, k.Public(), caKey)
	if err != nil {
		return nil, nil, err
	}
	key, err = keyPEM(k)
	return certPEM(der), key, err
}

func serverCert() *x509.Certificate {
	t := template("kube-apiserver")
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	t.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), ControlIP.AsSlice(), serviceIP.AsSlice()}
	return t
}

// kubeletClientCert is what the API server shows kubelets, for logs and exec.
func kubeletClientCert() *x509.Certificate {
	t := template("kube-apiserver-kubelet-client")
	t.Subject.Organization = []string{"system:masters"}
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return t
}

// template begins an hour ago, for clocks that step back, and lasts longer than any lab.
func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()),
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().AddDate(1, 0, 0),
	}
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}
