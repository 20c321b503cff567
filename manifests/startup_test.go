package manifests_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/crdsync"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
	"github.com/egret-project/egret/store"
)

const startupTaint = "egret/agent-not-ready"

// rightsOfTheChart returns what the chart makes of who may do what, with a start-up taint.
func rightsOfTheChart(t *testing.T) string {
	t.Helper()
	values := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(values, []byte(`{startupTaint: `+startupTaint+`, webhook: {enabled: false}, etcd: {endpoints: ["https://10.0.0.1:2379"]}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	c := exec.Command(manifests.Renderer(t), "-values", values, "../charts/egret")
	c.Stderr = os.Stderr
	out, err := c.Output()
	if err != nil {
		t.Fatal(err)
	}
	docs := slices.DeleteFunc(strings.Split(string(out), "\n---\n"), func(doc string) bool {
		return !slices.ContainsFunc([]string{"ClusterRole", "ClusterRoleBinding", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}, func(kind string) bool {
			return strings.Contains("\n"+doc, "\nkind: "+kind+"\n")
		})
	})
	if len(docs) < 6 {
		t.Fatalf("the chart has %d roles and policies alone", len(docs))
	}
	return strings.Join(docs, "\n---\n")
}

// crdsync runs with the rights that the chart gives it, and no other.
func TestTheStartupTaintGoesWhenTheAgentOfTheNodeIsReady(t *testing.T) {
	t.Parallel()
	s := tenants{t, kubetest.New(t)}
	s.apply([]byte(rightsOfTheChart(t)))
	admin, err := kubernetes.NewForConfig(s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	as := rest.CopyConfig(s.cfg)
	as.Impersonate.UserName = "system:serviceaccount:egret-system:egret-crdsync"
	etcd := etcdtest.New(t)
	client, err := store.Dial(t.Context(), store.Config{Endpoints: []string{etcd.Endpoint()}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- crdsync.Run(ctx, crdsync.Config{
			Kube: as, Store: client, ID: "test", ElectionTTL: 10 * time.Second, StartupTaint: startupTaint, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		})
	}()
	defer func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()

	ours := corev1.Taint{Key: startupTaint, Effect: corev1.TaintEffectNoSchedule}
	other := corev1.Taint{Key: "example.com/gpu", Value: "yes", Effect: corev1.TaintEffectNoExecute}
	node := func(name string, taints ...corev1.Taint) {
		t.Helper()
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"a": "b"}}, Spec: corev1.NodeSpec{Taints: taints}}
		if _, err := admin.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	taints := func(name string) string {
		t.Helper()
		n, err := admin.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, taint := range n.Spec.Taints {
			out = append(out, taint.ToString())
		}
		return strings.Join(out, " ")
	}
	agent := func(name string, a egress.Agent) {
		t.Helper()
		b, err := store.Encode(a)
		if err == nil {
			_, err = client.Etcd().Put(t.Context(), "/egret/"+store.AgentKey(name), string(b))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	becomes := func(name, want string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); taints(name) != want; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("the taints of %s are %q, want %q", name, taints(name), want)
			}
		}
	}
	both := other.ToString() + " " + ours.ToString()
	stays := func(name string) { // is looked at before another node, whose taint has gone by now
		t.Helper()
		if got := taints(name); !strings.Contains(got, startupTaint) {
			t.Errorf("the taints of %s are %q", name, got)
		}
	}

	node("a-down", ours)
	node("a-starting", other, ours)
	node("a-stopping", ours)
	agent("a-starting", egress.Agent{Node: "a-starting"})
	agent("a-stopping", egress.Agent{Node: "a-stopping", Ready: true, Restarting: true})
	agent("ready", egress.Agent{Node: "ready", Ready: true})
	node("ready", ours, other, corev1.Taint{Key: startupTaint, Effect: corev1.TaintEffectNoExecute})
	becomes("ready", other.ToString())
	for _, name := range []string{"a-down", "a-starting", "a-stopping"} {
		stays(name)
	}
	becomes("a-starting", both)
	agent("a-starting", egress.Agent{Node: "a-starting", Ready: true})
	becomes("a-starting", other.ToString())
	// One that comes anew, beside an agent that is there, has it taken off; one whose agent has gone keeps it.
	if _, err := client.Etcd().Delete(t.Context(), "/egret/"+store.AgentKey("a-starting")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a-starting", "ready"} {
		if err := admin.CoreV1().Nodes().Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		node(name, ours)
	}
	becomes("ready", "")
	stays("a-starting")

	// Whoever has crdsync's token changes nothing else of a node.
	stolen, err := kubernetes.NewForConfig(as)
	if err != nil {
		t.Fatal(err)
	}
	patch := func(name, text string) error {
		_, err := stolen.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(text), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	node("held", other, ours)
	node("free", other) // the taint that is left does not refuse what is tried there
	gone := fmt.Sprintf(`{"spec": {"taints": [{"key": %q, "value": %q, "effect": %q}]}`, other.Key, other.Value, other.Effect)
	for end := time.Now().Add(30 * time.Second); patch("held", `{"metadata": {"labels": {"a": "c"}}}`) == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the policy does not work") // the server hears of it by a watch of its own
		}
	}
	if err := patch("held", gone+"}"); err != nil {
		t.Errorf("taking the start-up taint off: %v", err)
	}
	for what, text := range map[string]string{
		"another's taint":          `{"spec": {"taints": null}}`,
		"all taints by an empty":   `{"spec": {"taints": []}}`,
		"another one for it":       `{"spec": {"taints": [{"key": "a/b", "effect": "NoExecute"}]}}`,
		"a label":                  `{"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}`,
		"a label beside the taint": gone + `, "metadata": {"labels": {"a": null}}}`,
		"an annotation":            `{"metadata": {"annotations": {"a": "c"}}}`,
		"an owner":                 `{"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "x", "uid": "1"}]}}`,
		"a finalizer":              `{"metadata": {"finalizers": ["example.com/x"]}}`,
		"a cordon":                 `{"spec": {"unschedulable": true}}`,
		"a podCIDR":                `{"spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}}`,
		"a providerID":             `{"spec": {"providerID": "aws:///x"}}`,
	} {
		for _, name := range []string{"held", "free"} {
			if err := patch(name, text); !apierrors.IsForbidden(err) && !apierrors.IsInvalid(err) {
				t.Errorf("%s, on node %s: %v, want it refused", what, name, err)
			}
		}
	}
	if err := stolen.CoreV1().Nodes().Delete(t.Context(), "held", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("deleting a node: %v", err)
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		t.Error("it ended before the test did")
	}
}
