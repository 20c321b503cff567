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
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

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
	return release{t, kube, kubeconfig(t, cfg)}
}

// kubeconfig returns a file by which Helm's lookup asks a cluster.
func kubeconfig(t *testing.T, cfg *rest.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	to := api.NewConfig()
	to.Clusters["c"] = &api.Cluster{Server: cfg.Host, CertificateAuthority: cfg.CAFile}
	to.AuthInfos["u"] = &api.AuthInfo{Token: cfg.BearerToken}
	to.Contexts["x"] = &api.Context{Cluster: "c", AuthInfo: "u"}
	to.CurrentContext = "x"
	if err := clientcmd.WriteToFile(*to, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// rendered renders the chart as helm upgrade does.
func (r release) rendered(values string) (string, error) {
	r.Helper()
	file := filepath.Join(r.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(values), 0o600); err != nil {
		r.Fatal(err)
	}
	out, err := exec.Command(manifests.Renderer(r), "-kubeconfig", r.kubeconfig, "-values", file, "../charts/egret").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return string(out), nil
}

const ownEtcd = `etcd: {endpoints: ["https://10.0.0.1:2379"]}`

// Agents are replaced one after the other, and those of two stores know nothing of each other's locks.
func TestAnUpgradeKeepsTheEtcd(t *testing.T) {
	t.Parallel()
	r := newRelease(t)
	const bundled = `etcd: {bundled: {enabled: true}}`
	configs := r.kube.CoreV1().ConfigMaps(system)
	for _, of := range []struct {
		values  string
		refused map[string]string // what the error has to name
	}{
		{ownEtcd, map[string]string{
			bundled: "etcd.bundled.enabled: this release uses the etcd at https://10.0.0.1:2379",
			`etcd: {endpoints: ["https://10.0.0.1:2379"], prefix: /other/}`: "etcd.prefix: this release has its keys at /egret/",
		}},
		{bundled, map[string]string{
			ownEtcd: "etcd.endpoints: this release runs an etcd of its own",
			`etcd: {prefix: /other/, bundled: {enabled: true}}`: "etcd.prefix: this release has its keys at /egret/",
		}},
	} {
		out, err := r.rendered(of.values)
		if err != nil {
			t.Fatalf("nothing is there: %v", err)
		}
		var config corev1.ConfigMap
		for _, doc := range strings.Split(out, "\n---\n") {
			if strings.Contains(doc, "kind: ConfigMap\n") {
				if err := yaml.UnmarshalStrict([]byte(doc), &config); err != nil {
					t.Fatal(err)
				}
			}
		}
		if _, err := configs.Create(t.Context(), &config, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.rendered(of.values); err != nil {
			t.Errorf("the same etcd: %v", err)
		}
		for values, want := range of.refused {
			if _, err := r.rendered(values); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("from %s to %s: %v, want it refused: %s", of.values, values, err, want)
			}
		}
		if err := configs.Delete(t.Context(), config.Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// Former versions of the chart made the Secret, so that Helm would delete it with the first revision that has none.
// Agents with two keys do not hear each other, and each would hold the others for dead.
func TestAnUpgradeDoesNotTakeTheKeyOfTheGossipAway(t *testing.T) {
	t.Parallel()
	r := newRelease(t)
	if _, err := r.rendered(ownEtcd); err != nil {
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
	if _, err := r.rendered(ownEtcd); err == nil || !strings.Contains(err.Error(), remedy) {
		t.Errorf("a Secret of Helm's: %v, want it refused, and said: %s", err, remedy)
	}
	s.Annotations = map[string]string{"helm.sh/resource-policy": "keep"}
	if _, err := secrets.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.rendered(ownEtcd); err != nil {
		t.Errorf("a Secret that stays: %v", err)
	}
}
