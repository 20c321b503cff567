package monitor

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/port"
)

// authority issues certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "metrics"}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, form, form, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, key}
}

// issue returns a certificate and its key, in PEM.
func (a authority) issue(t *testing.T, name string, until time.Time) (cert, key []byte) {
	t.Helper()
	own, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}, NotBefore: until.Add(-2 * time.Hour),
		NotAfter: until, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, form, a.cert, own.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalECPrivateKey(own)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: b})
}

func (a authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// files writes the files of a listener, whose clients are those of a CA.
func (a authority) files(t *testing.T, name string) TLS {
	t.Helper()
	dir := t.TempDir()
	f := TLS{Cert: filepath.Join(dir, "tls.crt"), Key: filepath.Join(dir, "tls.key"), ClientCA: filepath.Join(dir, "ca.crt")}
	a.write(t, f, name)
	return f
}

func (a authority) write(t *testing.T, f TLS, name string) {
	t.Helper()
	cert, key := a.issue(t, name, time.Now().Add(time.Hour))
	for path, b := range map[string][]byte{f.Cert: cert, f.Key: key, f.ClientCA: a.pem()} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// client returns one that trusts a, and shows a certificate of by; nil: it shows none.
func (a authority) client(t *testing.T, by *authority, until time.Time) *http.Client {
	t.Helper()
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "egret"}
	cfg.RootCAs.AddCert(a.cert)
	if by != nil {
		cert, key := by.issue(t, "prometheus", until)
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			t.Fatal(err)
		}
		// Whatever CA the server names.
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}, Timeout: 10 * time.Second}
}

func TestOthersReadMetricsByACertificateAndNothingElse(t *testing.T) {
	ca, another := newAuthority(t), newAuthority(t)
	address := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	s := New(Config{Remote: address, TLS: ca.files(t, "egret"), Metrics: newGatherer()})
	run(t, s)
	later := time.Now().Add(time.Hour)
	prometheus := ca.client(t, &ca, later)
	await(t, func() bool {
		code, _, err := ask(prometheus, "https://"+address+"/metrics")
		return err == nil && code == 200
	})
	for _, path := range []string{"/healthz", "/readyz", "/"} {
		if code, _, err := ask(prometheus, "https://"+address+path); err != nil || code != 404 {
			t.Errorf("GET %s: %d, %v; want 404", path, code, err)
		}
	}
	for name, c := range map[string]*http.Client{
		"no certificate":              ca.client(t, nil, later),
		"a certificate of another CA": ca.client(t, &another, later),
		"a certificate that is over":  ca.client(t, &ca, time.Now().Add(-time.Minute)),
	} {
		if code, body, err := ask(c, "https://"+address+"/metrics"); err == nil {
			t.Errorf("%s: it was answered with %d %q", name, code, body)
		}
	}
	if code, body, err := get(address, "/metrics"); err == nil && code == 200 {
		t.Errorf("without TLS: it was answered with %q", body)
	}
	old := ca.client(t, &ca, later)
	old.Transport.(*http.Transport).TLSClientConfig.MaxVersion = tls.VersionTLS12
	if _, _, err := ask(old, "https://"+address+"/metrics"); err == nil {
		t.Error("TLS 1.2 was answered")
	}
}

// A pod's argument is [$(HOST_IP)]:8481, whichever family the node's address is of.
func TestBracketsMayBeAroundAnyAddress(t *testing.T) {
	ca := newAuthority(t)
	for _, host := range []string{"[10.0.0.1]", "10.0.0.1", "[2001:db8::1]"} {
		if err := (Config{Remote: host + ":8481", TLS: ca.files(t, "egret")}).Validate(); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	at := port.Hold(t)
	run(t, New(Config{Remote: fmt.Sprintf("[127.0.0.1]:%d", at), TLS: ca.files(t, "egret"), Metrics: newGatherer()}))
	prometheus := ca.client(t, &ca, time.Now().Add(time.Hour))
	await(t, func() bool {
		code, _, err := ask(prometheus, fmt.Sprintf("https://127.0.0.1:%d/metrics", at))
		return err == nil && code == 200
	})
}

func TestHandshakesThatHangKeepNobodyFromMetrics(t *testing.T) {
	ca := newAuthority(t)
	address := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	run(t, New(Config{Remote: address, TLS: ca.files(t, "egret"), Metrics: newGatherer()}))
	prometheus := ca.client(t, &ca, time.Now().Add(time.Hour))
	await(t, func() bool { _, _, err := ask(prometheus, "https://"+address+"/metrics"); return err == nil })
	for range 5 * maxRemote {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	if code, _, err := ask(prometheus, "https://"+address+"/metrics"); err != nil || code != 200 {
		t.Errorf("beside handshakes that hang: %d, %v", code, err)
	}
}

func TestCertificatesAreReplacedWhileTheServerRuns(t *testing.T) {
	ca, next := newAuthority(t), newAuthority(t)
	c := &certificates{files: ca.files(t, "egret"), log: slog.New(slog.DiscardHandler)}
	old, err := c.config()
	if err != nil {
		t.Fatal(err)
	}
	next.write(t, c.files, "egret")
	if same, err := c.config(); err != nil || same != old {
		t.Errorf("files were read again at once: %v", err) // each handshake would read them
	}
	c.at = c.at.Add(-reloadAfter)
	if now, err := c.config(); err != nil || now == old {
		t.Errorf("files were not read again: %v", err)
	}
	if err := os.WriteFile(c.files.Cert, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.at = c.at.Add(-reloadAfter)
	if now, err := c.config(); err != nil || now == nil || now == old {
		t.Errorf("files that cannot be read take away what they held: %v", err)
	}
}
