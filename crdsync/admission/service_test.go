package admission

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/manifests"
)

// service is the Service of the manifests, before a real API server that looks up its endpoints. The test is the
// endpoints' controller.
type service struct {
	*testing.T
	kube *kubernetes.Clientset
	dyn  dynamic.Interface
	ip   string // of this machine; a Service leads to no loopback address
	stop func() // the replica that answers
}

// flags are further ones of the API server.
func newService(t *testing.T, flags ...string) *service {
	t.Helper()
	cfg := kubetest.New(t, flags...)
	s := &service{T: t, stop: func() {}}
	t.Cleanup(func() { s.stop() })
	var err error
	if s.kube, err = kubernetes.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
	if s.dyn, err = dynamic.NewForConfig(cfg); err != nil {
		t.Fatal(err)
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.To4() != nil && ip.IsGlobalUnicast() {
			s.ip = ip.String()
		}
	}
	if s.ip == "" {
		t.Skip("needs an IPv4 address other than loopback")
	}
	return s
}

// apply applies the configuration and the Service of the manifest. What cannot be asked about is refused, to be seen.
func (s *service) apply() {
	s.Helper()
	ctx, all := s.Context(), metav1.CreateOptions{}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := s.kube.CoreV1().Namespaces().Create(ctx, ns, all); err != nil {
		s.Fatal(err)
	}
	b, err := manifests.FS.ReadFile("deploy/webhook.yaml")
	if err != nil {
		s.Fatal(err)
	}
	for _, doc := range bytes.Split(b, []byte("\n---\n")) {
		var w admissionregistrationv1.ValidatingWebhookConfiguration
		var svc corev1.Service
		switch {
		case yaml.UnmarshalStrict(doc, &w) == nil && w.Kind == "ValidatingWebhookConfiguration":
			fail := admissionregistrationv1.Fail
			w.Webhooks[0].FailurePolicy = &fail
			_, err = s.kube.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, &w, all)
		case yaml.UnmarshalStrict(doc, &svc) == nil && svc.Kind == "Service":
			_, err = s.kube.CoreV1().Services(namespace).Create(ctx, &svc, all)
		}
		if err != nil {
			s.Fatal(err)
		}
	}
}

// leadTo makes the Service lead to an address.
func (s *service) leadTo(address string) {
	s.Helper()
	host, text, err := net.SplitHostPort(address)
	if err != nil {
		s.Fatal(err)
	}
	n, err := strconv.ParseInt(text, 10, 32)
	if err != nil {
		s.Fatal(err)
	}
	port, name := int32(n), "webhook"
	slice := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: Name, Labels: map[string]string{discoveryv1.LabelServiceName: Name}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{host}}},
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
	}
	slices := s.kube.DiscoveryV1().EndpointSlices(namespace)
	_, err = slices.Create(s.Context(), slice, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = slices.Update(s.Context(), slice, metav1.UpdateOptions{})
	}
	if err != nil {
		s.Fatal(err)
	}
}

// replica is one crdsync, as far as the webhook goes.
type replica struct {
	*server
	asked atomic.Int32 // how often it was asked about a pool that is right by itself
}

func (s *service) replica() *replica {
	s.Helper()
	r := &replica{}
	r.server = &server{kube: s.kube, dynamic: s.dyn, Config: Config{
		Address: net.JoinHostPort(s.ip, fmt.Sprint(port.Hold(s))), Namespace: namespace, Log: slog.New(slog.NewTextHandler(s.Output(), nil)),
		InUse: func() ([]egress.Allocation, error) { r.asked.Add(1); return nil, nil },
	}}
	return r
}

// only lets one replica answer, and has the Service lead to it. An API server goes on with a connection that it has:
// all others end.
func (s *service) only(r *replica) {
	s.Helper()
	s.stop()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.serve(ctx) }()
	s.stop = func() {
		cancel()
		<-ended // says that it was closed
	}
	s.leadTo(r.Address)
}

// wantAnswers waits until a replica answers by way of the Service, both of what is right and of what is wrong.
func (s *service) wantAnswers(r *replica) {
	s.Helper()
	try := func(start, end string) error {
		u := &unstructured.Unstructured{Object: map[string]any{
			"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": map[string]any{"name": "p"},
			"spec": map[string]any{"ipRanges": []any{map[string]any{"start": start, "end": end}}, "nodeSelector": map[string]any{}},
		}}
		_, err := s.dyn.Resource(v1beta1.PoolResource).Create(s.Context(), u, metav1.CreateOptions{DryRun: []string{"All"}})
		return err
	}
	before := r.asked.Load()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := try("10.0.0.1", "10.0.0.9")
		if err == nil && r.asked.Load() > before {
			break
		}
		if time.Now().After(end) {
			s.Fatalf("the replica at %s is not asked: %v", r.Address, err)
		}
	}
	err := try("10.0.0.9", "10.0.0.1")
	if want := "start 10.0.0.9 is after end 10.0.0.1"; err == nil || !strings.Contains(err.Error(), want) || !apierrors.IsInvalid(err) {
		s.Errorf("got %v, want the webhook to say %q", err, want)
	}
}

func TestTheServiceLeadsToEveryReplicaAlsoWhenTheCAWasReplaced(t *testing.T) {
	s := newService(t)
	s.apply()
	ctx := t.Context()

	elder, err := newAuthority(time.Now().Add(-caLife*3/4), nil) // is due
	if err != nil {
		t.Fatal(err)
	}
	data, err := elder.secret()
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secretName}, Type: corev1.SecretTypeTLS, Data: data}
	if _, err := s.kube.CoreV1().Secrets(namespace).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := elder.publish(ctx, s.kube); err != nil {
		t.Fatal(err)
	}
	old, young := s.replica(), s.replica()
	names, ips := old.names()
	c, err := elder.serve(time.Now(), names, ips)
	if err != nil {
		t.Fatal(err)
	}
	old.current.Store(c) // it has not looked at the CA since that was due
	old.issuer = string(elder.cert.Raw)
	s.only(old)
	s.wantAnswers(old)

	if err := young.certify(ctx); err != nil {
		t.Fatal(err)
	}
	s.only(young)
	s.wantAnswers(young)
	if young.current.Load().Leaf.CheckSignatureFrom(elder.cert) == nil {
		t.Error("the CA was not replaced")
	}
	s.only(old) // it shows the certificate of the CA before
	s.wantAnswers(old)
	if err := old.certify(ctx); err != nil {
		t.Fatal(err)
	}
	if old.current.Load() == c {
		t.Error("the replica still shows the certificate of the CA before")
	}
	s.only(old) // a connection that is there asks for no certificate
	s.wantAnswers(old)

	// The Secret was deleted, with all that was trusted: what the replicas have done by the next look is enough.
	if err := s.kube.CoreV1().Secrets(namespace).Delete(ctx, secretName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*replica{old, young} {
		if err := r.certify(ctx); err != nil {
			t.Fatal(fmt.Errorf("the replica at %s: %w", r.Address, err))
		}
		s.only(r)
		s.wantAnswers(r)
	}
}
