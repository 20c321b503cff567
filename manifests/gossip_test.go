package manifests_test

import (
	"encoding/base64"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
)

// helm upgrade renders everything anew. Agents with two keys do not hear each other, so each would hold the others for
// dead.
func TestGossipKeyIsMadeOnceAndKept(t *testing.T) {
	t.Parallel()
	cfg := kubetest.New(t)
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "kubeconfig")
	to := api.NewConfig()
	to.Clusters["c"] = &api.Cluster{Server: cfg.Host, CertificateAuthority: cfg.CAFile}
	to.AuthInfos["u"] = &api.AuthInfo{Token: cfg.BearerToken}
	to.Contexts["x"] = &api.Context{Cluster: "c", AuthInfo: "u"}
	to.CurrentContext = "x"
	if err := clientcmd.WriteToFile(*to, file); err != nil {
		t.Fatal(err)
	}
	render := func() *corev1.Secret {
		t.Helper()
		values := filepath.Join(t.TempDir(), "values.yaml")
		if err := os.WriteFile(values, []byte(`etcd: {endpoints: ["https://10.0.0.1:2379"]}`), 0o600); err != nil {
			t.Fatal(err)
		}
		c := exec.Command(manifests.Renderer(t), "-kubeconfig", file, "-values", values, "../charts/egret")
		c.Stderr = os.Stderr
		out, err := c.Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, doc := range strings.Split(string(out), "\n---\n") {
			var s corev1.Secret
			if strings.Contains(doc, "name: egret-gossip\n") && yaml.UnmarshalStrict([]byte(doc), &s) == nil && s.Kind == "Secret" {
				return &s
			}
		}
		t.Fatal("the chart makes no Secret egret-gossip")
		return nil
	}
	one, other := render(), render()
	if string(one.Data["key"]) == string(other.Data["key"]) {
		t.Error("two clusters have one key")
	}
	if key, err := base64.StdEncoding.DecodeString(string(one.Data["key"])); err != nil || len(key) != 32 {
		t.Errorf("the key is %q: want 32 bytes in base64", one.Data["key"])
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: one.Namespace}}
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := kube.CoreV1().Secrets(one.Namespace).Create(t.Context(), one, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if kept := render(); string(kept.Data["key"]) != string(one.Data["key"]) {
		t.Error("an upgrade has another key")
	}
}
