// Package kubelet tests Egret as its users have it: installed by its chart with kubectl, in a lab whose nodes have
// kubelets. It has nothing but tests.
package kubelet

import (
	"context"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/integration/lab"
	"github.com/egret-project/egret/internal/need"
)

var (
	image     = flag.String("image", "", "archive of Egret's image, as make image makes it")
	imageName = flag.String("image-name", "", "name and tag that the archive gives the image")
)

func TestMain(m *testing.M) {
	if status, ok := lab.Helper(os.Args); ok {
		os.Exit(status)
	}
	os.Exit(m.Run())
}

// The range of testdata/pods.yaml.
var first, last = netip.MustParseAddr("10.10.0.10"), netip.MustParseAddr("10.10.0.20")

func TestPodsOfADeploymentLeaveWithTheEgressIPOfAnInstalledEgret(t *testing.T) {
	need.Root(t)
	if *image == "" {
		t.Skip("no -image: run it with make test-kubelet")
	}
	l, err := lab.Up(t.Context(), lab.Config{Name: lab.OwnName("kubelet"), Nodes: 2, Kubelet: true, Images: []string{*image}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Errorf("removing the lab: %v", err)
		}
		if left, _ := filepath.Glob("/sys/fs/cgroup/*/egret-lab-" + lab.OwnName("kubelet")); len(left) > 0 {
			t.Errorf("cgroups after Down: got %q, want none", left)
		}
	})
	kubectl := func(args ...string) string {
		t.Helper()
		out, err := l.Kubectl(t.Context(), args...)
		if err != nil {
			t.Fatalf("kubectl %s: %v", strings.Join(args, " "), err)
		}
		return string(out)
	}
	_, tag, _ := strings.Cut(*imageName, ":")
	render := exec.CommandContext(t.Context(), "go", "run", "-C", "../../manifests/render", ".", "-values", abs(t, "testdata/values.yaml"),
		"-values", write(t, "image: {tag: "+tag+"}\n"), abs(t, "../../charts/egret"))
	render.Stderr = os.Stderr
	manifests, err := render.Output()
	if err != nil {
		t.Fatalf("rendering the chart: %v", err)
	}
	kubectl("apply", "-f", write(t, string(manifests)))
	kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
	kubectl("-n", "egret-system", "rollout", "status", "daemonset/egret-agent", "--timeout=120s")
	kubectl("-n", "egret-system", "rollout", "status", "deployment/egret-crdsync", "--timeout=120s")

	kubectl("apply", "-f", abs(t, "testdata/pods.yaml"))
	kubectl("rollout", "status", "deployment/web", "--timeout=60s")
	seen(t, l, kubectl)
	kubectl("-n", "egret-system", "rollout", "restart", "daemonset/egret-agent")
	kubectl("-n", "egret-system", "rollout", "status", "daemonset/egret-agent", "--timeout=120s")
	seen(t, l, kubectl)
}

// seen fails the test unless every pod of the Deployment is seen outside with an address of the pool.
func seen(t *testing.T, l *lab.Lab, kubectl func(...string) string) {
	t.Helper()
	pods := strings.Fields(kubectl("get", "pods", "-l", "app=web", "-o", "name"))
	if len(pods) == 0 {
		t.Fatal("the Deployment has no pods")
	}
	for _, pod := range pods {
		deadline := time.Now().Add(30 * time.Second)
		for {
			// the echo server says which address it sees
			out, err := l.Kubectl(t.Context(), "exec", pod, "--", "nc", lab.OutsideIP.String(), "7")
			seen, perr := netip.ParseAddrPort(strings.TrimSpace(string(out)))
			if err == nil && perr == nil && first.Compare(seen.Addr()) <= 0 && seen.Addr().Compare(last) <= 0 {
				t.Logf("%s is seen outside as %v", pod, seen)
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("source of %s outside: got %q, error %v, want an address of %v-%v", pod, out, err, first, last)
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
}

func abs(t *testing.T, path string) string {
	t.Helper()
	path, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
