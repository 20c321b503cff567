package kubetest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensions "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/manifests"
)

const (
	token = "kubetest-admin"
	// startTimeout is how long the server may take to get ready: 5 s is usual, the rest is for a busy machine.
	startTimeout = 3 * time.Minute
)

// New starts an API server that runs until the test ends, with Egret's CRDs and with these flags beside its own, and
// returns how to reach it as an administrator. It needs a kube-apiserver (need.KubeProgram).
func New(t testing.TB, flags ...string) *rest.Config {
	t.Helper()
	bin := need.KubeProgram(t, "kube-apiserver")
	dir := t.TempDir()
	etcd := etcdtest.New(t)
	writeFile(t, filepath.Join(dir, "tokens.csv"), []byte(token+",admin,1,system:masters\n"))
	writeFile(t, filepath.Join(dir, "sa.key"), newKey(t))
	port := port.Hold(t)
	cfg := &rest.Config{
		Host: fmt.Sprintf("https://127.0.0.1:%d", port), BearerToken: token, QPS: -1, // no limit: the server is ours
		TLSClientConfig: rest.TLSClientConfig{CAFile: filepath.Join(dir, "certs", "apiserver.crt")},
		Timeout:         time.Minute, // of one request: on a busy machine some took more than 10 s
	}
	log := &bytes.Buffer{}
	c := exec.Command(bin, append(arguments(dir, etcd.URL(), port), flags...)...)
	c.Stdout, c.Stderr = log, log
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // a test that is killed cleans up nothing
	if err := c.Start(); err != nil {
		t.Fatalf("starting kube-apiserver: %v", err)
	}
	ended := make(chan struct{})
	go func() {
		_ = c.Wait() // its log says why
		close(ended)
	}()
	t.Cleanup(func() {
		_ = c.Process.Kill() // fails when it has ended
		<-ended
		if t.Failed() {
			t.Logf("kube-apiserver's last words:\n%s", tail(log.Bytes()))
		}
	})
	waitReady(t, cfg, ended)
	createCRDs(t, cfg)
	return cfg
}

func arguments(dir, etcd string, port int) []string {
	sa := filepath.Join(dir, "sa.key")
	return []string{
		"--etcd-servers=" + etcd, "--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port), "--cert-dir=" + filepath.Join(dir, "certs"),
		"--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
		"--authorization-mode=RBAC", "--token-auth-file=" + filepath.Join(dir, "tokens.csv"), "--service-account-issuer=https://127.0.0.1",
		"--service-account-key-file=" + sa, "--service-account-signing-key-file=" + sa, "--enable-priority-and-fairness=false",
		// No kube-proxy leads from a Service to its endpoints: the server looks them up.
		"--enable-aggregator-routing=true",
		// No controller makes service accounts, and none takes the taint of a new node away.
		"--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
	}
}

// Kubectl returns the path of kubectl: the machine's, or the one that `make kube` built.
func Kubectl(t testing.TB) string {
	t.Helper()
	if path, err := exec.LookPath("kubectl"); err == nil {
		return path
	}
	return need.KubeProgram(t, "kubectl")
}

func waitReady(t testing.TB, cfg *rest.Config, ended <-chan struct{}) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	for {
		err := ready(ctx, cfg)
		if err == nil {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ended:
			t.Fatal("kube-apiserver ended")
		case <-ctx.Done():
			t.Fatalf("kube-apiserver did not get ready within %v: %v", startTimeout, err)
		}
	}
}

func ready(ctx context.Context, cfg *rest.Config) error {
	if _, err := os.Stat(cfg.CAFile); err != nil {
		return err // it makes its certificate first
	}
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return err
	}
	return c.RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
}

func createCRDs(t testing.TB, cfg *rest.Config) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	client, err := apiextensions.NewForConfig(cfg)
	if err != nil {
		t.Fatalf("making a client of kube-apiserver: %v", err)
	}
	crds := client.ApiextensionsV1().CustomResourceDefinitions()
	files, err := fs.Glob(manifests.FS, "crds/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("listing the CRDs: %v, %v", files, err)
	}
	for _, file := range files {
		b, err := fs.ReadFile(manifests.FS, file)
		if err != nil {
			t.Fatal(err)
		}
		crd := &apiextensionsv1.CustomResourceDefinition{}
		if err := yaml.UnmarshalStrict(b, crd); err != nil {
			t.Fatalf("reading %s: %v", file, err)
		}
		if _, err := crds.Create(ctx, crd, metav1.CreateOptions{}); err != nil {
			t.Fatalf("creating CRD %s: %v", crd.Name, err)
		}
		for !established(ctx, t, crds.Get, crd.Name) {
			time.Sleep(50 * time.Millisecond)
		}
	}
}

type getCRD func(context.Context, string, metav1.GetOptions) (*apiextensionsv1.CustomResourceDefinition, error)

func established(ctx context.Context, t testing.TB, get getCRD, name string) bool {
	t.Helper()
	crd, err := get(ctx, name, metav1.GetOptions{})
	if err != nil {
		t.Fatalf("waiting for CRD %s: %v", name, err)
	}
	for _, c := range crd.Status.Conditions {
		if c.Type == apiextensionsv1.Established {
			return c.Status == apiextensionsv1.ConditionTrue
		}
	}
	return false
}

func newKey(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatalf("making a key: %v", err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatalf("writing a key: %v", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func writeFile(t testing.TB, path string, b []byte) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func tail(b []byte) []byte { return b[max(0, len(b)-4000):] }
