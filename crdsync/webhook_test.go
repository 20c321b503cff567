package crdsync

import (
	"bytes"
	"context"
	"fmt"
	"strings"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/crdsync/admission"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/manifests"
)

// applyWebhook applies the manifest of the webhook until the test ends, but for the Service: the API server has no
// network of pods here, and asks at the address. What it cannot ask about it refuses.
func (c *cluster) applyWebhook(address string) {
	c.Helper()
	ctx, all := c.Context(), metav1.CreateOptions{}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "egret-system"}}
	if _, err := c.core.CoreV1().Namespaces().Create(ctx, ns, all); err != nil && !apierrors.IsAlreadyExists(err) {
		c.Fatal(err)
	}
	b, err := manifests.FS.ReadFile("deploy/webhook.yaml")
	if err != nil {
		c.Fatal(err)
	}
	configurations := c.core.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	for _, doc := range bytes.Split(b, []byte("\n---\n")) {
		var kind metav1.TypeMeta
		err := yaml.Unmarshal(doc, &kind)
		into := func(o any) any {
			err = yaml.UnmarshalStrict(doc, o)
			return o
		}
		switch kind.Kind {
		case "ValidatingWebhookConfiguration":
			o := into(&admissionregistrationv1.ValidatingWebhookConfiguration{}).(*admissionregistrationv1.ValidatingWebhookConfiguration)
			url, fail := "https://"+address+*o.Webhooks[0].ClientConfig.Service.Path, admissionregistrationv1.Fail
			o.Webhooks[0].ClientConfig = admissionregistrationv1.WebhookClientConfig{URL: &url}
			o.Webhooks[0].FailurePolicy = &fail
			_, err = configurations.Create(ctx, o, all)
			c.Cleanup(func() {
				if err := configurations.Delete(context.Background(), o.Name, metav1.DeleteOptions{}); err != nil {
					c.Error(err)
				}
			})
		case "Role":
			_, err = c.core.RbacV1().Roles("egret-system").Create(ctx, into(&rbacv1.Role{}).(*rbacv1.Role), all)
		case "RoleBinding":
			_, err = c.core.RbacV1().RoleBindings("egret-system").Create(ctx, into(&rbacv1.RoleBinding{}).(*rbacv1.RoleBinding), all)
		case "ClusterRole":
			_, err = c.core.RbacV1().ClusterRoles().Create(ctx, into(&rbacv1.ClusterRole{}).(*rbacv1.ClusterRole), all)
		case "ClusterRoleBinding":
			_, err = c.core.RbacV1().ClusterRoleBindings().Create(ctx, into(&rbacv1.ClusterRoleBinding{}).(*rbacv1.ClusterRoleBinding), all)
		}
		if err != nil {
			c.Fatal(err)
		}
	}
}

// object returns an object of its kind, name and spec.
func (c *cluster) object(kind, name, spec string) *unstructured.Unstructured {
	c.Helper()
	u := &unstructured.Unstructured{}
	text := fmt.Sprintf("{apiVersion: crd.antrea.io/v1beta1, kind: %s, metadata: {name: %s}, spec: %s}", kind, name, spec)
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		c.Fatal(err)
	}
	return u
}

// wantAnswer wants an answer of the webhook: err is a part of the refusal, or empty.
func (c *cluster) wantAnswer(name string, err error, want string) {
	c.Helper()
	switch {
	case want == "" && err != nil:
		c.Errorf("%s: refused: %v", name, err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `admission webhook "validate.crd.antrea.io"`)):
		c.Errorf("%s: got %v, want the webhook to say %q", name, err, want)
	}
}

func testWebhook(c *cluster) {
	c.webhook = &Webhook{Address: fmt.Sprint("127.0.0.1:", port.Hold(c)), Namespace: "egret-system"}
	c.applyWebhook(c.webhook.Address)
	c.run(c.kube)
	try := func(kind, name, spec string) error {
		_, err := c.dyn.Resource(resourceOf(kind)).Create(c.Context(), c.object(kind, name, spec), metav1.CreateOptions{DryRun: []string{"All"}})
		return err
	}
	// there is a certificate, and it is trusted
	c.eventually(func() error { return try("Egress", "first", "{appliedTo: {}, externalIPPool: p}") })

	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: p}, spec: {nodeSelector: {},
  ipRanges: [{start: 10.10.0.11, end: 10.10.0.20}, {cidr: 10.10.1.0/28}]}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: ExternalIPPool, metadata: {name: q}, spec: {ipRanges: [{cidr: 10.10.2.0/28}], nodeSelector: {}}}`)
	c.create(`{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: web}, spec: {externalIPPool: p, appliedTo: {}}}`)
	c.wantRecords("allocations/*", map[string]string{"allocations/10.10.0.11": "p/1 web"})

	for name, tt := range map[string]struct{ kind, spec, err string }{
		"of the pool":            {"Egress", "{appliedTo: {}, externalIPPool: p, egressIP: 10.10.0.20}", ""},
		"outside of the pool":    {"Egress", "{appliedTo: {}, externalIPPool: p, egressIP: 10.10.0.21}", "egressIP 10.10.0.21 is not an address of pool p: want a pool that has it, or no egressIP"},
		"of a pool to come":      {"Egress", "{appliedTo: {}, externalIPPool: none}", ""},
		"an IP of none":          {"Egress", "{appliedTo: {}, externalIPPool: none, egressIP: 10.10.0.20}", "pool none does not exist"},
		"static":                 {"Egress", "{appliedTo: {}, egressIP: 192.0.2.7}", ""},
		"dual stack of one":      {"Egress", "{appliedTo: {}, externalIPPools: [p, q]}", "externalIPPools p and q are of one IP family: want at most one of each"},
		"a key of a label":       {"Egress", "{appliedTo: {podSelector: {matchLabels: {'a b': c}}}, egressIP: 192.0.2.7}", `appliedTo.podSelector.matchLabels: key "a b": want the name of a label, like app or example.com/app`},
		"a pool apart":           {"ExternalIPPool", "{ipRanges: [{start: 10.10.0.21, end: 10.10.0.30}], nodeSelector: {}}", ""},
		"a pool that overlaps":   {"ExternalIPPool", "{ipRanges: [{start: 10.10.0.20, end: 10.10.0.30}], nodeSelector: {}}", "ipRanges: 10.10.0.20-10.10.0.30 overlaps with another pool: want each address in one pool"},
		"an inverted range":      {"ExternalIPPool", "{ipRanges: [{start: 10.10.5.9, end: 10.10.5.1}], nodeSelector: {}}", "ipRanges[0]: start 10.10.5.9 is after end 10.10.5.1: want them the other way round"},
		"of two families":        {"ExternalIPPool", "{ipRanges: [{start: 10.10.5.9, end: 'fd00::1'}], nodeSelector: {}}", "start 10.10.5.9 and end fd00::1: want addresses of one family"},
		"overlapping itself":     {"ExternalIPPool", "{ipRanges: [{cidr: 10.10.5.0/28}, {start: 10.10.5.14, end: 10.10.5.20}], nodeSelector: {}}", "ipRanges: 10.10.5.14-10.10.5.20 overlaps with 10.10.5.0/28 of the same pool"},
		"outside of its subnet":  {"ExternalIPPool", "{ipRanges: [{cidr: 10.10.5.0/28}], subnetInfo: {gateway: 10.10.6.1, prefixLength: 24}, nodeSelector: {}}", "is not inside of the pool's subnet: want addresses of 10.10.6.0/24"},
		"of its gateway's other": {"ExternalIPPool", "{ipRanges: [{cidr: 10.10.5.0/28}], subnetInfo: {gateway: 'fd00::1', prefixLength: 64}, nodeSelector: {}}", "gateway fd00::1 is not of the IP family"},
	} {
		c.wantAnswer(name, try(tt.kind, "x", tt.spec), tt.err)
	}

	for _, tt := range []struct{ name, kind, object, patch, err string }{
		{"a range in use", "ExternalIPPool", "p", `{"spec":{"ipRanges":[{"cidr":"10.10.1.0/28"}]}}`,
			"ipRanges: an address is in use: want its range 10.10.0.11-10.10.0.20 kept"},
		{"an address in use", "ExternalIPPool", "p", `{"spec":{"ipRanges":[{"start":"10.10.0.12","end":"10.10.0.20"}]}}`, "ipRanges: an address is in use: want its range 10.10.0.11-10.10.0.20 kept"},
		{"the gateway is in use", "ExternalIPPool", "p", `{"spec":{"subnetInfo":{"gateway":"10.10.0.11","prefixLength":16}}}`,
			"subnetInfo: gateway 10.10.0.11 is in use: want another gateway"},
		{"the same in other words", "ExternalIPPool", "p",
			`{"spec":{"ipRanges":[{"start":"10.10.1.1","end":"10.10.1.14"},{"start":"10.10.0.11","end":"10.10.0.15"},{"start":"10.10.0.16","end":"10.10.0.20"}]}}`, ""},
		{"an unused range", "ExternalIPPool", "p", `{"spec":{"ipRanges":[{"start":"10.10.0.11","end":"10.10.0.20"}]}}`, ""},
		{"a range of another pool", "ExternalIPPool", "q", `{"spec":{"ipRanges":[{"cidr":"10.10.0.0/26"}]}}`, "10.10.0.0/26 overlaps with another pool"},
		{"an address outside of the pool", "Egress", "web", `{"spec":{"egressIP":"10.10.9.9"}}`, "egressIP 10.10.9.9 is not an address of pool p"},
		{"another address of it", "Egress", "web", `{"spec":{"egressIP":"10.10.0.12"}}`, ""},
	} {
		_, err := c.dyn.Resource(resourceOf(tt.kind)).Patch(c.Context(), tt.object, types.MergePatchType, []byte(tt.patch), metav1.PatchOptions{})
		c.wantAnswer(tt.name, err, tt.err)
	}

	// What came past the webhook can still be labelled, and does not keep others from being written.
	configurations := c.core.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	w, err := configurations.Get(c.Context(), admission.Name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	rules := w.Webhooks[0].Rules
	set := func(rules []admissionregistrationv1.RuleWithOperations, spec, want string) {
		w.Webhooks[0].Rules = rules
		if w, err = configurations.Update(c.Context(), w, metav1.UpdateOptions{}); err != nil {
			c.Fatal(err)
		}
		c.eventually(func() error {
			if err := try("ExternalIPPool", "z", spec); (err != nil) != (want != "") {
				return fmt.Errorf("got %v, want %q", err, want)
			}
			return nil
		})
	}
	bad := "{ipRanges: [{start: 10.10.0.20, end: 10.10.0.30}], nodeSelector: {}}"
	set(nil, bad, "")
	if _, err := c.dyn.Resource(resourceOf("ExternalIPPool")).Create(c.Context(), c.object("ExternalIPPool", "past", bad), metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
	set(rules, bad, "overlaps")
	for name, patch := range map[string]string{
		"a label": `{"metadata":{"labels":{"a":"b"}}}`, "a selector": `{"spec":{"nodeSelector":{"matchLabels":{"a":"b"}}}}`,
		"a range apart": `{"spec":{"ipRanges":[{"start":"10.10.0.20","end":"10.10.0.30"},{"cidr":"10.10.7.0/28"}]}}`,
	} {
		_, err := c.dyn.Resource(resourceOf("ExternalIPPool")).Patch(c.Context(), "past", types.MergePatchType, []byte(patch), metav1.PatchOptions{})
		c.wantAnswer(name+" of a pool that overlaps already", err, "")
	}
	c.wantAnswer("an egress of another pool", try("Egress", "x", "{appliedTo: {}, externalIPPool: q, egressIP: 10.10.2.3}"), "")
}
