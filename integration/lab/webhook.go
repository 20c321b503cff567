package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/manifests"
)

const (
	webhookNamespace = "egret-system"
	webhookName      = "egret-crdsync"
	webhookPort      = 9443
)

// createWebhook applies the manifest of the webhook, but for the roles: the lab's crdsync is an administrator. The
// Service leads to crdsync on the control host.
func (l *Lab) createWebhook(ctx context.Context) error {
	return l.kube(func(c *kubernetes.Clientset) error {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: webhookNamespace}}
		_, err := c.CoreV1().Namespaces().Create(ctx, ns, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("creating namespace %s: %w", ns.Name, err)
		}
		b, err := manifests.FS.ReadFile("deploy/webhook.yaml")
		if err != nil {
			return err
		}
		made := 0
		for _, doc := range bytes.Split(b, []byte("\n---\n")) {
			var kind metav1.TypeMeta
			err := yaml.Unmarshal(doc, &kind)
			var w admissionregistrationv1.ValidatingWebhookConfiguration
			var s corev1.Service
			switch {
			case err != nil:
			case kind.Kind == "ValidatingWebhookConfiguration":
				if err = yaml.UnmarshalStrict(doc, &w); err == nil {
					_, err = c.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, &w, metav1.CreateOptions{})
				}
				made++
			case kind.Kind == "Service":
				if err = yaml.UnmarshalStrict(doc, &s); err == nil {
					_, err = c.CoreV1().Services(webhookNamespace).Create(ctx, &s, metav1.CreateOptions{})
				}
				made++
			}
			if err != nil {
				return fmt.Errorf("creating %s of the webhook: %w", kind.Kind, err)
			}
		}
		if made != 2 {
			return fmt.Errorf("deploy/webhook.yaml: %d objects, want a configuration and a Service", made)
		}
		name, port := "webhook", int32(webhookPort)
		_, err = c.DiscoveryV1().EndpointSlices(webhookNamespace).Create(ctx, &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: webhookName, Labels: map[string]string{discoveryv1.LabelServiceName: webhookName}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints:   []discoveryv1.Endpoint{{Addresses: []string{ControlIP.String()}}},
			Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
		}, metav1.CreateOptions{})
		if err != nil {
			return fmt.Errorf("creating the endpoint of the webhook: %w", err)
		}
		return nil
	})
}

// faulty is a pool in which nothing but the webhook finds a fault.
var faulty = &unstructured.Unstructured{Object: map[string]any{
	"apiVersion": "crd.antrea.io/v1beta1", "kind": "ExternalIPPool", "metadata": map[string]any{"name": "is-the-webhook-there"},
	"spec": map[string]any{"nodeSelector": map[string]any{}, "ipRanges": []any{map[string]any{"start": "192.0.2.2", "end": "192.0.2.1"}}},
}}

// waitWebhook returns when the API server asks crdsync.
func (l *Lab) waitWebhook(ctx context.Context) error {
	c, err := dynamic.NewForConfig(l.cluster.rest())
	if err != nil {
		return fmt.Errorf("making a client of the API server: %w", err)
	}
	return l.wait(ctx, "the webhook", readyTimeout, []string{apiProc, crdsyncProc}, func(ctx context.Context) error {
		_, err := c.Resource(v1beta1.PoolResource).Create(ctx, faulty, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		switch {
		case err == nil:
			return errors.New("a faulty pool is not refused")
		case !strings.Contains(err.Error(), "admission webhook"):
			return err
		}
		return nil
	})
}
