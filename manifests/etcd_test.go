package manifests_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
)

// Two members that are to come to one begin as an etcd of their own, behind the Service of both.
func TestTheNumberOfMembersIsNotChanged(t *testing.T) {
	t.Parallel()
	cfg := kubetest.New(t)
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	file := kubeconfig(t, cfg)
	render := func(replicas int) (string, error) {
		values := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(values, fmt.Appendf(nil, "etcd: {bundled: {enabled: true, replicas: %d}}", replicas), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(manifests.Renderer(t), "-kubeconfig", file, "-values", values, "../charts/egret").CombinedOutput()
		return string(out), err
	}
	out, err := render(1)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var one appsv1.StatefulSet
	for _, doc := range strings.Split(out, "\n---\n") {
		if strings.Contains(doc, "kind: StatefulSet\n") {
			if err := yaml.UnmarshalStrict([]byte(doc), &one); err != nil {
				t.Fatal(err)
			}
		}
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: one.Namespace}}
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	none := int32(0)
	one.Spec.Replicas = &none // as while it is restored
	if _, err := kube.AppsV1().StatefulSets(one.Namespace).Create(t.Context(), &one, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if out, err := render(1); err != nil {
		t.Errorf("one member, as before: %v: %s", err, out)
	}
	if out, err := render(3); err == nil || !strings.Contains(out, "etcd.bundled.replicas") {
		t.Errorf("three members in place of one: %v: %s", err, out)
	}
}
