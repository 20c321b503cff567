package manifests_test

import (
	"fmt"
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

	"github.com/egret-project/egret/internal/kubetest"
	"github.com/egret-project/egret/manifests"
)

const system = "egret-system"

// release is a cluster in which the chart is installed, as far as it looks for what is there.
type release struct {
	*testing.T
	kube       kubernetes.Interface
	kubeconfig string
}

func newRelease(t *testing.T) release {
	t.Helper()
	cfg := kubetest.New(t)
	kube, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: system}}
	if _, err := kube.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
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
	return release{t, kube, file}
}

// upgrade renders the chart as helm upgrade does.
func (r release) upgrade(values string) error {
	r.Helper()
	file := filepath.Join(r.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		r.Fatal(err)
	}
	out, err := exec.Command(manifests.Renderer(r), "-kubeconfig", r.kubeconfig, "-values", file, "../charts/egret").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

const ownEtcd = `etcd: {endpoints: ["https://10.0.0.1:2379"]}`

// Former versions of the chart made the Secret, so that Helm would delete it with the first revision that has none.
// Agents with two keys do not hear each other, and each would hold the others for dead.
func TestAnUpgradeDoesNotTakeTheKeyOfTheGossipAway(t *testing.T) {
	t.Parallel()
	r := newRelease(t)
	if err := r.upgrade(ownEtcd); err != nil {
		t.Fatalf("nothing is there: %v", err)
	}
	secrets := r.kube.CoreV1().Secrets(system)
	s := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "egret-gossip", Labels: map[string]string{"app.kubernetes.io/managed-by": "Helm"}},
		StringData: map[string]string{"key": "k"},
	}
	s, err := secrets.Create(t.Context(), s, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const remedy = "kubectl -n egret-system annotate secret egret-gossip helm.sh/resource-policy=keep"
	if err := r.upgrade(ownEtcd); err == nil || !strings.Contains(err.Error(), remedy) {
		t.Errorf("a Secret of Helm's: %v, want it refused, and said: %s", err, remedy)
	}
	s.Annotations = map[string]string{"helm.sh/resource-policy": "keep"}
	if _, err := secrets.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := r.upgrade(ownEtcd); err != nil {
		t.Errorf("a Secret that stays: %v", err)
	}
}
