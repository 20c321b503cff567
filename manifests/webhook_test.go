package manifests_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/crdsync/admission"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/internal/port"
)

// crdsync has the rights that the manifests give it, and no other: it writes the caBundle, and whoever has its token no
// more than that.
func TestCrdsyncChangesNothingOfItsWebhookButTheCABundle(t *testing.T) {
	t.Parallel()
	s := tenants{t, kubetest.New(t)}
	admin, err := kubernetes.NewForConfig(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "egret-system"}}
	if _, err := admin.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	manifest, err := os.ReadFile("deploy/webhook.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s.apply(manifest)
	as := rest.CopyConfig(s.cfg)
	as.Impersonate.UserName = "system:serviceaccount:egret-system:egret-crdsync"
	stolen, err := kubernetes.NewForConfig(as)
	if err != nil {
		t.Fatal(err)
	}
	configurations := stolen.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	// RBAC has no patch for it; an update with all of the object is what there is.
	try := func(change string) error {
		t.Helper()
		now, err := configurations.Get(t.Context(), admission.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		patched, err := admin.AdmissionregistrationV1().ValidatingWebhookConfigurations().Patch(t.Context(), admission.Name, types.JSONPatchType,
			[]byte(change), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		if err != nil {
			t.Fatalf("%s: %v", change, err) // of the test
		}
		patched.ResourceVersion = now.ResourceVersion
		_, err = configurations.Update(t.Context(), patched, metav1.UpdateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	set := func(path, value string) string {
		return fmt.Sprintf(`[{"op": "add", "path": %q, "value": %s}]`, path, value)
	}
	const first = "/webhooks/0/"
	for end := time.Now().Add(time.Minute); try(set(first+"failurePolicy", `"Fail"`)) == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the policy does not work") // the server hears of it by a watch of its own
		}
	}

	const rule = `{"apiGroups": [""], "apiVersions": ["v1"], "resources": ["secrets"], "operations": ["CREATE"], "scope": "*"}`
	const condition = `{"name": "none", "expression": "false"}`
	for what, change := range map[string]string{
		"a rule for Secrets, to read them":   set(first+"rules/-", rule),
		"another rule in place of its own":   `[{"op": "replace", "path": "/webhooks/0/rules/0", "value": ` + rule + `}]`,
		"no rule":                            set(first+"rules", "[]"),
		"all of the cluster's writes fail":   set(first+"failurePolicy", `"Fail"`),
		"a server elsewhere":                 `[{"op": "remove", "path": "/webhooks/0/clientConfig/service"}, {"op": "add", "path": "/webhooks/0/clientConfig/url", "value": "https://192.0.2.1/"}]`,
		"another Service":                    set(first+"clientConfig/service/name", `"kubernetes"`),
		"a Service of another namespace":     set(first+"clientConfig/service/namespace", `"default"`),
		"another path":                       set(first+"clientConfig/service/path", `"/elsewhere"`),
		"another port":                       set(first+"clientConfig/service/port", "6443"),
		"more patience":                      set(first+"timeoutSeconds", "30"),
		"another match":                      set(first+"matchPolicy", `"Exact"`),
		"side effects":                       set(first+"sideEffects", `"NoneOnDryRun"`),
		"other versions of reviews":          set(first+"admissionReviewVersions", `["v1", "v1beta1"]`),
		"some namespaces alone":              set(first+"namespaceSelector", `{"matchLabels": {"a": "b"}}`),
		"some objects alone":                 set(first+"objectSelector", `{"matchLabels": {"a": "b"}}`),
		"no request, by a condition":         set(first+"matchConditions", "["+condition+"]"),
		"another name":                       set(first+"name", `"x.crd.antrea.io"`),
		"no webhook":                         set("/webhooks", "[]"),
		"a label":                            set("/metadata/labels", `{"a": "b"}`),
		"an annotation":                      set("/metadata/annotations", `{"a": "b"}`),
		"a finalizer":                        set("/metadata/finalizers", `["example.com/x"]`),
		"an owner, with which it would go":   set("/metadata/ownerReferences", `[{"apiVersion": "v1", "kind": "Namespace", "name": "default", "uid": "1"}]`),
		"one webhook more, of the same sort": `[{"op": "copy", "from": "/webhooks/0", "path": "/webhooks/-"}, {"op": "add", "path": "/webhooks/1/name", "value": "x.crd.antrea.io"}, {"op": "add", "path": "/webhooks/1/rules", "value": [` + rule + `]}]`,
	} {
		if err := try(change); !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) {
			t.Errorf("%s: %v, want it refused", what, err)
		} else if !strings.Contains(err.Error(), "crdsync writes the caBundle") {
			t.Errorf("%s: it is not the policy that refuses: %v", what, err)
		}
	}
	if err := configurations.Delete(t.Context(), admission.Name, metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("deleting it: %v, want it refused", err)
	}
	// The policy is about crdsync: an administrator changes what he likes.
	if _, err := admin.AdmissionregistrationV1().ValidatingWebhookConfigurations().Patch(t.Context(), admission.Name, types.JSONPatchType,
		[]byte(set(first+"timeoutSeconds", "7")), metav1.PatchOptions{}); err != nil {
		t.Errorf("an administrator: %v", err)
	}

	// What crdsync itself does is allowed: it publishes its CA.
	ctx, stop := context.WithCancel(t.Context())
	certified := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- admission.Run(ctx, admission.Config{
			Kube: as, Address: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), Namespace: ns.Name, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
			InUse:   func() ([]egress.Allocation, error) { return nil, nil },
			Answers: func() { certified <- struct{}{} },
		})
	}()
	defer func() {
		stop()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	select {
	case <-certified:
	case <-time.After(time.Minute):
		t.Fatal("there is no certificate")
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		now, err := admin.AdmissionregistrationV1().ValidatingWebhookConfigurations().Get(t.Context(), admission.Name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		c := now.Webhooks[0]
		if len(c.ClientConfig.CABundle) > 0 && *c.TimeoutSeconds == 7 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("the caBundle is %q, the timeout %d; want a CA, and the administrator's 7", c.ClientConfig.CABundle, *c.TimeoutSeconds)
		}
	}
}
