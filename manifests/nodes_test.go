package manifests

import (
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// goes reports whether the scheduler may put a pod on a node, by its labels and taints.
func goes(t *testing.T, pod corev1.PodSpec, on map[string]string, taints ...corev1.Taint) bool {
	t.Helper()
	selector := labels.SelectorFromSet(pod.NodeSelector)
	if a := pod.Affinity; a != nil && a.NodeAffinity != nil {
		terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
		if len(terms) != 1 {
			t.Fatalf("node affinity %+v, want one term", terms)
		}
		for _, e := range terms[0].MatchExpressions {
			r, err := labels.NewRequirement(e.Key, selection.Operator(strings.ToLower(string(e.Operator))), e.Values)
			if err != nil {
				t.Fatal(err)
			}
			selector = selector.Add(*r)
		}
	}
	if !selector.Matches(labels.Set(on)) {
		return false
	}
	for _, taint := range taints {
		tolerated := false
		for _, o := range pod.Tolerations {
			tolerated = tolerated || (o.Key == "" || o.Key == taint.Key) && o.Operator == corev1.TolerationOpExists && (o.Effect == "" || o.Effect == taint.Effect)
		}
		if !tolerated {
			return false
		}
	}
	return true
}

// Distributions give the nodes of the control plane one label with values of their own, and a label that the values
// name is instead of it, not beside it.
func TestTheBundledEtcdIsOnTheControlPlaneOrOnTheNodesThatAreNamed(t *testing.T) {
	t.Parallel()
	const controlPlane = "node-role.kubernetes.io/control-plane"
	taint := func(key string) []corev1.Taint {
		return []corev1.Taint{{Key: key, Effect: corev1.TaintEffectNoSchedule}}
	}
	nodes := map[string]struct {
		labels map[string]string
		taints []corev1.Taint
	}{
		"kubeadm":   {map[string]string{controlPlane: ""}, taint(controlPlane)},
		"OpenShift": {map[string]string{controlPlane: "", "node-role.kubernetes.io/master": ""}, taint("node-role.kubernetes.io/master")},
		"k3s":       {map[string]string{controlPlane: "true"}, nil},
		"a worker":  {map[string]string{"node-role.kubernetes.io/worker": ""}, nil},
		"named":     {map[string]string{"egret/etcd": ""}, nil},
	}
	for values, want := range map[string][]string{
		variants["bundled etcd"]: {"kubeadm", "OpenShift", "k3s"},
		`etcd: {bundled: {enabled: true, nodeSelector: {egret/etcd: ""}}}`: {"named"},
	} {
		pods := podsOf(decoded(t, values))
		for _, command := range []string{"run", "snapshot", "etcd-rbac", "credentials"} {
			for name, on := range nodes {
				may := slices.Contains(want, name)
				if got := goes(t, pods[command], on.labels, on.taints...); got != may {
					t.Errorf("%s: %s goes to a node of %s: %v, want %v", strings.TrimSpace(values), command, name, got, may)
				}
			}
		}
	}
}
