package manifests_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/kubetest"
)

var egresses = schema.GroupVersionResource{Group: "crd.antrea.io", Version: "v1beta1", Resource: "egresses"}

// tenants is an API server with the examples for tenants.
type tenants struct {
	*testing.T
	cfg *rest.Config
}

// as returns what a user of a group does with egresses.
func (s tenants) as(user string, groups ...string) dynamic.ResourceInterface {
	s.Helper()
	return s.client(rest.ImpersonationConfig{UserName: user, Groups: groups}).Resource(egresses)
}

func (s tenants) client(who rest.ImpersonationConfig) dynamic.Interface {
	s.Helper()
	cfg := rest.CopyConfig(s.cfg)
	cfg.Impersonate = who
	c, err := dynamic.NewForConfig(cfg)
	if err != nil {
		s.Fatal(err)
	}
	return c
}

// apply creates the objects of a YAML text, each field of which the server has to know.
func (s tenants) apply(text []byte) {
	s.Helper()
	d, err := discovery.NewDiscoveryClientForConfig(s.cfg)
	if err != nil {
		s.Fatal(err)
	}
	groups, err := restmapper.GetAPIGroupResources(d)
	if err != nil {
		s.Fatal(err)
	}
	mapper, admin := restmapper.NewDiscoveryRESTMapper(groups), s.client(rest.ImpersonationConfig{})
	for _, doc := range bytes.Split(text, []byte("\n---\n")) {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(doc, &o.Object); err != nil {
			s.Fatal(err)
		}
		m, err := mapper.RESTMapping(o.GroupVersionKind().GroupKind(), o.GroupVersionKind().Version)
		if err != nil {
			s.Fatal(err)
		}
		to := dynamic.ResourceInterface(admin.Resource(m.Resource))
		if m.Scope.Name() == meta.RESTScopeNameNamespace {
			to = admin.Resource(m.Resource).Namespace(o.GetNamespace())
		}
		if _, err := to.Create(s.Context(), o, metav1.CreateOptions{FieldValidation: metav1.FieldValidationStrict}); err != nil {
			s.Fatalf("creating %s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

func newEgress(name, spec string) *unstructured.Unstructured {
	o := &unstructured.Unstructured{}
	if err := yaml.Unmarshal(fmt.Appendf(nil, "{apiVersion: crd.antrea.io/v1beta1, kind: Egress, metadata: {name: %s}, spec: %s}", name, spec), &o.Object); err != nil {
		panic(err) // of the test's own text
	}
	return o
}

// of is the spec of an Egress for a namespace's pods, with IPs of pools.
func of(namespace, pools string) string {
	return fmt.Sprintf("{appliedTo: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}}, %s}", namespace, pools)
}

const (
	mine       = "externalIPPool: team-a"
	createOnly = "try"
)

// newTenants returns a server that holds to the policy already: it hears of it by a watch of its own.
func newTenants(t *testing.T) tenants {
	t.Helper()
	s := tenants{t, kubetest.New(t)}
	for _, file := range []string{"policy.yaml", "team.yaml"} {
		b, err := os.ReadFile("examples/tenancy/" + file)
		if err != nil {
			t.Fatal(err)
		}
		s.apply(b)
		if file == "team.yaml" { // another team beside it
			s.apply(bytes.ReplaceAll(b, []byte("team-a"), []byte("team-b")))
		}
	}
	const namespace = `apiVersion: v1
kind: Namespace
metadata: {name: TEAM}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: edit, namespace: TEAM}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: edit-pods}
subjects: [{kind: Group, apiGroup: rbac.authorization.k8s.io, name: TEAM}]`
	// In the place of the role edit: that one is put together by the controller-manager, which is not here.
	s.apply([]byte(`apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: edit-pods}
rules: [{apiGroups: [""], resources: [pods], verbs: [create, get, list]}]`))
	for _, team := range []string{"team-a", "team-b"} {
		s.apply([]byte(strings.ReplaceAll(namespace, "TEAM", team)))
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	deadline := time.Now().Add(30 * time.Second)
	for {
		_, good := s.as("alice", "team-a").Create(t.Context(), newEgress(createOnly, of("team-a", mine)), dry)
		_, bad := s.as("alice", "team-a").Create(t.Context(), newEgress(createOnly, of("team-b", mine)), dry)
		if good == nil && apierrors.IsForbidden(bad) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("the policy does not work: an Egress of the own namespace %v, of another's %v", good, bad)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestATenantTakesWhatIsHisAlone(t *testing.T) {
	t.Parallel()
	s := newTenants(t)
	ctx := t.Context()
	alice, admin := s.as("alice", "team-a"), s.as("root", "system:masters")
	for name, tt := range map[string]struct{ spec, want string }{
		"his namespace and pool":           {of("team-a", mine), ""},
		"an address of his pool":           {of("team-a", mine+", egressIP: 10.0.0.1"), ""},
		"his pool in a list":               {of("team-a", "externalIPPools: [team-a]"), ""},
		"some pods of his namespace":       {"{appliedTo: {podSelector: {matchLabels: {app: web}}, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: team-a, env: prod}}}, " + mine + "}", ""},
		"another namespace":                {of("team-b", mine), "namespace team-b"},
		"a namespace that is not there":    {of("team-c", mine), "namespace team-c"},
		"all namespaces, by no selector":   {"{appliedTo: {podSelector: {}}, " + mine + "}", "any namespace"},
		"all namespaces, by an empty one":  {"{appliedTo: {namespaceSelector: {}}, " + mine + "}", "any namespace"},
		"namespaces by another label":      {"{appliedTo: {namespaceSelector: {matchLabels: {env: prod}}}, " + mine + "}", "any namespace"},
		"namespaces by an expression":      {"{appliedTo: {namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [team-a, team-b]}]}}, " + mine + "}", "any namespace"},
		"a namespace without a name":       {of("''", mine), "any namespace"},
		"another's pool":                   {of("team-a", "externalIPPool: team-b"), "pool team-b"},
		"another's pool beside his":        {of("team-a", "externalIPPools: [team-a, team-b]"), "pool team-a and pool team-b"},
		"a node's own address":             {of("team-a", "egressIP: 10.0.0.1"), "no pool"},
		"a node's own address in a list":   {of("team-a", "egressIPs: [10.0.0.1]"), "no pool"},
		"a node's own address, empty pool": {of("team-a", "egressIP: 10.0.0.1, externalIPPool: ''"), "no pool"},
	} {
		_, err := alice.Create(ctx, newEgress(createOnly, tt.spec), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if tt.want == "" && err != nil || tt.want != "" && (!apierrors.IsForbidden(err) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		if _, err := admin.Create(ctx, newEgress(createOnly, tt.spec), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Errorf("%s: an administrator is refused: %v", name, err)
		}
	}
}

// What is there already, and is another's, is neither taken over, nor handed to him, nor deleted, in any of the ways
// that there are.
func TestATenantChangesNobodyElsesEgress(t *testing.T) {
	t.Parallel()
	s := newTenants(t)
	ctx := t.Context()
	alice, bob, admin := s.as("alice", "team-a"), s.as("bob", "team-b"), s.as("root", "system:masters")
	create := func(by dynamic.ResourceInterface, name, spec string) {
		t.Helper()
		if _, err := by.Create(ctx, newEgress(name, spec), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	create(alice, "a", of("team-a", mine))
	create(bob, "b", of("team-b", "externalIPPool: team-b"))
	create(admin, "all", "{appliedTo: {podSelector: {}}, egressIP: 10.0.0.1}")
	patch := func(name, text string) error {
		_, err := alice.Patch(ctx, name, types.MergePatchType, []byte(text), metav1.PatchOptions{})
		return err
	}
	take := `{"spec": {"externalIPPool": "team-a", "egressIP": null, "appliedTo": {"podSelector": null, "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team-a"}}}}}`
	for what, err := range map[string]error{
		"taking over an Egress of another":    patch("b", take),
		"taking over an Egress of the admin":  patch("all", take),
		"labelling another's":                 patch("b", `{"metadata": {"labels": {"a": "b"}}}`),
		"an owner that is gone for another's": patch("b", `{"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "none", "uid": "1"}]}}`),
		"giving his to another's pods":        patch("a", `{"spec": {"appliedTo": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "team-b"}}}}}`),
		"another's pool":                      patch("a", `{"spec": {"externalIPPool": "team-b"}}`),
		"a node's address":                    patch("a", `{"spec": {"externalIPPool": null, "egressIP": "10.0.0.1"}}`),
		"deleting another's":                  alice.Delete(ctx, "b", metav1.DeleteOptions{}),
		"deleting the admin's":                alice.Delete(ctx, "all", metav1.DeleteOptions{}),
		"deleting all":                        alice.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}),
	} {
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}
	// The status is crdsync's.
	o, err := alice.Get(ctx, "a", metav1.GetOptions{})
	if err == nil {
		_, err = alice.UpdateStatus(ctx, o, metav1.UpdateOptions{})
	}
	if !apierrors.IsForbidden(err) {
		t.Errorf("writing a status: %v, want it refused", err)
	}
	// What is his is his to change and to delete, what was done to it meanwhile included.
	if err := patch("a", `{"spec": {"appliedTo": {"podSelector": {"matchLabels": {"app": "web"}}}}}`); err != nil {
		t.Error(err)
	}
	if err := alice.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
	// The garbage collector is no tenant.
	collector := "system:serviceaccount:kube-system:generic-garbage-collector"
	if err := s.as(collector, "system:serviceaccounts", "system:authenticated").Delete(ctx, "b", metav1.DeleteOptions{}); err != nil {
		t.Errorf("the garbage collector is refused: %v", err)
	}
	left, err := admin.List(ctx, metav1.ListOptions{})
	if err == nil && len(left.Items) != 1 {
		err = fmt.Errorf("%d are left, want that of the administrator", len(left.Items))
	}
	if errors.Is(err, context.Canceled) || err != nil {
		t.Error(err)
	}
}
