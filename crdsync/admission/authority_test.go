package admission

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"sync"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/egret-project/egret/internal/kubetest"
)

const namespace = "egret-system"

// configuration creates what the API server would read, without a rule: nobody asks in these tests.
func configuration(t *testing.T, kube kubernetes.Interface) {
	t.Helper()
	none, url := admissionregistrationv1.SideEffectClassNone, "https://127.0.0.1:1/"
	c := &admissionregistrationv1.ValidatingWebhookConfiguration{
		ObjectMeta: metav1.ObjectMeta{Name: Name},
		Webhooks: []admissionregistrationv1.ValidatingWebhook{{
			Name: "validate.crd.antrea.io", SideEffects: &none, AdmissionReviewVersions: []string{"v1"},
			ClientConfig: admissionregistrationv1.WebhookClientConfig{URL: &url},
		}},
	}
	if _, err := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// bundle returns what the API server trusts.
func bundle(t *testing.T, kube kubernetes.Interface) []byte {
	t.Helper()
	c, err := kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(t.Context(), Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return c.Webhooks[0].ClientConfig.CABundle
}

// verify checks a certificate as the API server does.
func verify(t *testing.T, c *tls.Certificate, bundle []byte) {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(bundle)
	for _, name := range []string{"egret-crdsync.egret-system.svc", "127.0.0.1"} {
		if _, err := c.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: roots}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCertificates(t *testing.T) {
	cfg := kubetest.New(t)
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := kube.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	replica := func() *server {
		return &server{Config: Config{Address: "127.0.0.1:0", Namespace: namespace, Log: slog.New(slog.DiscardHandler)}, kube: kube}
	}
	lone := replica()
	if err := lone.certify(ctx); err == nil || lone.current.Load() == nil {
		t.Errorf("without a configuration: error %v, certificate %v; want both", err, lone.current.Load())
	}
	if err := kube.CoreV1().Secrets(namespace).Delete(ctx, secretName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	configuration(t, kube)

	// Replicas that start together agree on one CA.
	replicas := []*server{replica(), replica(), replica(), replica()}
	certifyAll := func() {
		var wg sync.WaitGroup
		for _, s := range replicas {
			wg.Go(func() {
				for s.certify(ctx) != nil && ctx.Err() == nil { // a conflict about the configuration
				}
			})
		}
		wg.Wait()
	}
	certifyAll()
	trusted := bundle(t, kube)
	for _, s := range replicas {
		verify(t, s.current.Load(), trusted)
	}

	// A certificate that is due is replaced, one that is not stays.
	s := replicas[0]
	a, err := loadAuthority(ctx, kube, namespace, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	fresh := s.current.Load()
	if err := s.certify(ctx); err != nil || s.current.Load() != fresh {
		t.Errorf("a fresh certificate was replaced, or %v", err)
	}
	old, err := a.serve(time.Now().Add(-servingLife*3/4), []string{"x"}, []net.IP{net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	s.current.Store(old)
	if err := s.certify(ctx); err != nil || s.current.Load() == old {
		t.Errorf("a certificate that is due was not replaced, or %v", err)
	}

	// A CA that is due is replaced; what the one before signed is trusted on.
	elder, err := newAuthority(time.Now().Add(-caLife*3/4), nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := elder.secret()
	if err != nil {
		t.Fatal(err)
	}
	keep := func(data map[string][]byte) {
		secret, err := kube.CoreV1().Secrets(namespace).Get(ctx, secretName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		secret.Data = data
		if _, err := kube.CoreV1().Secrets(namespace).Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	keep(data)
	names, ips := s.names()
	before, err := elder.serve(time.Now(), names, ips)
	if err != nil {
		t.Fatal(err)
	}
	certifyAll()
	trusted = bundle(t, kube)
	verify(t, before, trusted)
	for _, s := range replicas {
		verify(t, s.current.Load(), trusted)
	}
	if a, err = loadAuthority(ctx, kube, namespace, time.Now()); err != nil || a.cert.Equal(elder.cert) {
		t.Errorf("the CA was not replaced, or %v", err)
	}

	// A CA that was spoiled is made anew.
	data[corev1.TLSPrivateKeyKey] = []byte("spoiled")
	keep(data)
	certifyAll()
	for _, s := range replicas {
		verify(t, s.current.Load(), bundle(t, kube))
	}
}

func TestAPortThatIsTakenIsTriedAgainAndNobodyIsToldThatItAnswersMeanwhile(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	answers := make(chan struct{}, 9)
	s := &server{Config: Config{Address: l.Addr().String(), Log: slog.New(slog.DiscardHandler), Answers: func() { answers <- struct{}{} }}}
	if err := s.serve(t.Context()); err == nil {
		t.Error("served at a port that is taken")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.every(ctx, "test", s.serve, nil); err != context.Canceled {
		t.Errorf("got %v, want the context's end", err)
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
	s.answers() // as certify does
	if len(answers) > 0 {
		t.Error("said to answer at a port that is taken")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.serve(ctx) }()
	select {
	case <-answers:
	case err := <-ended:
		t.Fatalf("not served at a free port: %v", err)
	case <-time.After(20 * time.Second):
		t.Error("not said to answer, with a certificate and a port")
	}
	cancel()
	<-ended // says that it was closed
}
