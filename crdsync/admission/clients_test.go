package admission

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/internal/syncbuf"
)

// issuer is a CA of a cluster, not of ours.
type issuer struct {
	*testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newIssuer(t *testing.T) issuer {
	t.Helper()
	i := issuer{T: t}
	i.cert, i.key = i.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "cluster"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return i
}

func (i issuer) sign(c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	i.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.Fatal(err)
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, by := i.cert, i.key
	if parent == nil {
		parent, by = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), by)
	if err != nil {
		i.Fatal(err)
	}
	out, err := x509.ParseCertificate(der)
	if err != nil {
		i.Fatal(err)
	}
	return out, key
}

// client returns a certificate for a client of a name.
func (i issuer) client(name string, change ...func(*x509.Certificate)) tls.Certificate {
	i.Helper()
	c := &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	for _, f := range change {
		f(c)
	}
	cert, key := i.sign(c)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key}
}

func (i issuer) file(path string) string {
	i.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.cert.Raw}), 0o600); err != nil {
		i.Fatal(err)
	}
	return path
}

func TestTheWebhookAnswersThoseAloneWhoShowACertificateOfAnAPIServer(t *testing.T) {
	cluster, other := newIssuer(t), newIssuer(t)
	var log syncbuf.Buffer
	s := &server{Config: Config{
		Address: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), ClientCA: cluster.file(filepath.Join(t.TempDir(), "ca.crt")), Clients: []string{"api-1", "api-2"},
		InUse: func() ([]egress.Allocation, error) { return nil, nil }, Log: slog.New(slog.NewTextHandler(&log, nil)),
	}}
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	ours, err := newAuthority(time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ours.serve(time.Now(), []string{"webhook"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.current.Store(c)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.serve(ctx) }()
	defer func() {
		stop()
		<-ended // says that it was closed
	}()
	roots := x509.NewCertPool()
	roots.AddCert(ours.cert)
	ask := func(version uint16, shown ...tls.Certificate) error {
		t.Helper()
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{
			RootCAs: roots, ServerName: "webhook", Certificates: shown, MinVersion: tls.VersionTLS12, MaxVersion: version,
		}}
		defer transport.CloseIdleConnections()
		r, err := (&http.Client{Transport: transport, Timeout: 20 * time.Second}).Post("https://"+s.Address+Path, "application/json",
			bytes.NewReader(reviewOf("egresses", `{"spec":{"egressIP":"10.0.0.1"}}`, "")))
		if err != nil {
			return err
		}
		defer r.Body.Close()
		// one review at a time
		if b, err := io.ReadAll(r.Body); err != nil || r.StatusCode != http.StatusOK || r.ProtoMajor != 1 {
			t.Errorf("answer %d by HTTP/%d, %s, %v", r.StatusCode, r.ProtoMajor, b, err)
		}
		return nil
	}
	for end := time.Now().Add(20 * time.Second); ask(tls.VersionTLS13, cluster.client("api-1")) != nil; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(ask(tls.VersionTLS13, cluster.client("api-1")))
		}
	}
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		if err := ask(version, cluster.client("api-2")); err != nil {
			t.Errorf("the other API server, TLS %x: %v", version, err)
		}
		for what, shown := range map[string][]tls.Certificate{
			"nothing":                       nil,
			"a certificate of a user":       {cluster.client("mallory")},
			"one of an empty name":          {cluster.client("")},
			"the name of another CA":        {other.client("api-1")},
			"one that has ended":            {cluster.client("api-1", func(c *x509.Certificate) { c.NotBefore, c.NotAfter = time.Unix(0, 0), time.Unix(1, 0) })},
			"one of a server":               {cluster.client("api-1", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })},
			"a name in another field alone": {cluster.client("mallory", func(c *x509.Certificate) { c.DNSNames, c.Subject.Organization = []string{"api-1"}, []string{"api-1"} })},
		} {
			if err := ask(version, shown...); err == nil {
				t.Errorf("%s, TLS %x: it was answered", what, version)
			}
		}
	}
	if n := strings.Count(log.String(), "the webhook does not answer a client"); n != 1 {
		t.Errorf("the log tells %d times of clients that are not answered, want once in %v:\n%s", n, tellInterval, log.String())
	}

	// Another CA in place of the file: those of the one before are not answered any more.
	other.file(s.ClientCA)
	for end := time.Now().Add(reloadAfter + 20*time.Second); ask(tls.VersionTLS13, cluster.client("api-1")) == nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("certificates of a CA that was taken away are still good")
		}
	}
	if err := ask(tls.VersionTLS13, other.client("api-1")); err != nil {
		t.Errorf("after the CA was replaced: %v", err)
	}
}

func TestFaultyClientsOfTheWebhookAreRefused(t *testing.T) {
	ca := newIssuer(t).file(filepath.Join(t.TempDir(), "ca.crt"))
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for want, cfg := range map[string]Config{
		"belong together":          {Clients: []string{"a"}},
		"only one of them":         {ClientCA: ca},
		"none of them empty":       {ClientCA: ca, Clients: []string{"a", " "}},
		"no such file":             {ClientCA: ca + ".not", Clients: []string{"a"}},
		"holds no PEM certificate": {ClientCA: empty, Clients: []string{"a"}},
	} {
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: got %v, want %q", cfg, err, want)
		}
	}
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("whoever asks: %v", err)
	}
}

// An API server shows what the kubeconfig of its AdmissionConfiguration has for the Service.
func TestAnAPIServerShowsItsCertificate(t *testing.T) {
	cluster, dir := newIssuer(t), t.TempDir()
	shown := cluster.client("kube-apiserver")
	key, err := x509.MarshalECPrivateKey(shown.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	write := func(name string, b []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	cert := write("tls.crt", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: shown.Certificate[0]}))
	keyFile := write("tls.key", pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key}))
	kubeconfig := write("kubeconfig", fmt.Appendf(nil, `apiVersion: v1
kind: Config
users:
- name: %s.%s.svc
  user: {client-certificate: %s, client-key: %s}
`, Name, namespace, cert, keyFile))
	config := write("admission.yaml", fmt.Appendf(nil, `apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
- name: ValidatingAdmissionWebhook
  configuration:
    apiVersion: apiserver.config.k8s.io/v1
    kind: WebhookAdmissionConfiguration
    kubeConfigFile: %s
`, kubeconfig))
	s := newService(t, "--admission-control-config-file="+config)
	s.apply()
	strict := s.replica()
	strict.ClientCA, strict.Clients = cluster.file(filepath.Join(dir, "ca.crt")), []string{"kube-apiserver"}
	if err := strict.certify(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.only(strict)
	s.wantAnswers(strict)
	before := strict.asked.Load()
	if err := s.stranger(strict); err == nil || strict.asked.Load() != before {
		t.Errorf("a client without a certificate: error %v, %d reviews of it; want to be refused, and none", err, strict.asked.Load()-before)
	}
}

// stranger asks a replica as a pod does that reaches its port.
func (s *service) stranger(r *replica) error {
	s.Helper()
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}
	pool := `{"metadata":{"name":"x"},"spec":{"ipRanges":[{"cidr":"10.1.0.0/24"}],"nodeSelector":{}}}`
	answer, err := client.Post("https://"+r.Address+Path, "application/json", bytes.NewReader(reviewOf("externalippools", pool, "")))
	if err != nil {
		return err
	}
	return answer.Body.Close()
}
