package lab

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// The processes that a lab with kubelets has in addition. A node's is PID 1 of the node (see node in node.go),
// kubelet-<node>.
const (
	managerProc   = "kube-controller-manager"
	schedulerProc = "kube-scheduler"
)

func kubeletProc(node string) string { return "kubelet-" + node }

// ctrTimeout bounds a command of containerd's client. To import an image of 28 MB on three nodes takes 4 s, and was
// more than a minute beside builds that had the processors.
const ctrTimeout = 5 * time.Minute

// containerdSocket is where containerd listens in the mount namespace of its node.
const containerdSocket = "/run/containerd/containerd.sock"

// pauseImage is what the sandboxes of the pods run, and what pods of tests can run: busybox, made by pauseArchive.
const pauseImage = "egret.test/busybox:1"

// kubeletPrograms returns what a lab with kubelets runs beside kube-apiserver, below KubeBin: integration/kube/build
// kubelet makes it.
func kubeletPrograms() []string {
	return []string{
		managerProc, schedulerProc, "kubelet", "kube-proxy", "cni/bridge", "cni/host-local", "cni/loopback",
		"debian/usr/bin/containerd", "debian/usr/bin/containerd-shim-runc-v2", "debian/usr/bin/ctr", "debian/usr/sbin/runc",
	}
}

// kubelet is the process of a node: its PID namespace, in which containerd, kubelet and kube-proxy run.
func (l *Lab) kubelet(node string) component {
	return component{proc: kubeletProc(node), argv: []string{l.cfg.Self, "node", l.cfg.Name, node}}
}

// controllers are the processes of the control host that act on the objects of the API.
func (l *Lab) controllers() []component {
	common := []string{"--kubeconfig=" + l.path("kubeconfig.control"), "--leader-elect=false", "--bind-address=127.0.0.1"}
	manager := append([]string{
		filepath.Join(l.cfg.KubeBin, managerProc), "--use-service-account-credentials",
		"--service-account-private-key-file=" + l.path("sa.key"), "--root-ca-file=" + l.path("ca.crt"),
		"--service-cluster-ip-range=" + serviceCIDRs, "--node-monitor-grace-period=16s", "--cert-dir=" + l.path("certs"),
	}, common...)
	scheduler := append([]string{filepath.Join(l.cfg.KubeBin, schedulerProc), "--cert-dir=" + l.path("certs")}, common...)
	return []component{
		{proc: managerProc, netns: control.name, argv: manager}, {proc: schedulerProc, netns: control.name, argv: scheduler},
	}
}

// startKubelet boots the node n: its cgroups, its files, its process.
func (l *Lab) startKubelet(s *state, n int) error {
	node := NodeName(n)
	if err := errors.Join(l.makeCgroups(node), l.writeNodeFiles(n)); err != nil {
		return err
	}
	return l.start(s, l.kubelet(node))
}

// writeNodeFiles writes the configuration of what runs on node n, into the node's folder.
func (l *Lab) writeNodeFiles(n int) error {
	node := NodeName(n)
	var ranges [][]map[string]string
	var routes []map[string]string
	for _, f := range families() {
		ranges = append(ranges, []map[string]string{{"subnet": f.podCIDR(n).String()}})
		routes = append(routes, map[string]string{"dst": defaultRoute(f.outside).String()})
	}
	cni, err := json.MarshalIndent(map[string]any{
		"cniVersion": "1.0.0", "name": "lab", "plugins": []any{map[string]any{
			// the node's bridge is there, with the gateway's addresses
			"type": "bridge", "bridge": cniLink, "isGateway": true, "ipMasq": false,
			"ipam": map[string]any{"type": "host-local", "dataDir": "/var/lib/cni", "ranges": ranges, "routes": routes},
		}},
	}, "", "  ")
	if err != nil {
		return err
	}
	bin, conf := l.cniFolders(node)
	containerd := fmt.Sprintf(`version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = %q
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  # where root has no CAP_SYS_RESOURCE, runc could start nothing else
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = %q
    conf_dir = %q
`, containerdSocket, pauseImage, bin, conf)
	kubelet := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /%s
failSwapOn: false
containerRuntimeEndpoint: unix://%s
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %s}}
authorization: {mode: Webhook}
resolvConf: %s
clusterDomain: %s
clusterDNS: [%s]
nodeStatusUpdateFrequency: 4s
volumePluginDir: /var/lib/kubelet/volume-plugins
evictionHard: {memory.available: 100Mi}
imageGCHighThresholdPercent: 100
`, l.cgroup(node), containerdSocket, l.path("ca.crt"), l.path(node, "resolv.conf"), clusterDomain, ControlIP)
	if err := os.MkdirAll(l.path(node, "cni"), 0o700); err != nil {
		return err
	}
	for name, b := range map[string][]byte{
		"cni/10-lab.conflist": cni, "containerd.toml": []byte(containerd), "kubelet.yaml": []byte(kubelet),
		"resolv.conf": nil,
	} {
		err = errors.Join(err, os.WriteFile(l.path(node, name), b, 0o600))
	}
	return err
}

// ConfigureKubelet adds lines to the file of settings (KubeletConfiguration) of a node's kubelet, which reads it when
// it starts.
func (l *Lab) ConfigureKubelet(node, lines string) error {
	f, err := os.OpenFile(l.path(node, "kubelet.yaml"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(lines)
	return errors.Join(err, f.Close())
}

// nodeTokens makes what each kubelet shows the API server, writes a kubeconfig with it into the node's folder, and
// returns the lines of the API server's token file.
func (l *Lab) nodeTokens(ca []byte) ([]byte, error) {
	var lines []byte
	for _, n := range l.nodes() {
		node, token := NodeName(n), rand.Text()
		kubeconfig, err := l.kubeconfigFile(apiURL(), token, ca)
		if err == nil {
			err = os.MkdirAll(l.path(node), 0o700)
		}
		if err == nil {
			err = os.WriteFile(l.path(node, "kubeconfig"), kubeconfig, 0o600)
		}
		if err != nil {
			return nil, fmt.Errorf("writing the kubeconfig of %s: %w", node, err)
		}
		lines = fmt.Appendf(lines, "%s,system:node:%s,%s,system:nodes\n", token, node, node)
	}
	return lines, nil
}

func apiURL() string { return "https://" + netip.AddrPortFrom(ControlIP, apiPort).String() }

// waitKubelets returns when containerd of every node has the images of the lab, and every kubelet says that it is
// ready.
func (l *Lab) waitKubelets(ctx context.Context) error {
	procs := []string{apiProc, managerProc, schedulerProc}
	for _, n := range l.nodes() {
		procs = append(procs, kubeletProc(NodeName(n)))
	}
	err := l.wait(ctx, "containerd", readyTimeout, procs, func(ctx context.Context) error {
		var errs []error
		for _, n := range l.nodes() {
			_, err := l.ctr(ctx, NodeName(n), "version")
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
	if err != nil {
		return err
	}
	pause := l.path("busybox.tar")
	if err := pauseArchive(pause); err != nil {
		return err
	}
	if err := l.loadImage(ctx, append([]string{pause}, l.cfg.Images...)...); err != nil {
		return err
	}
	timeout := readyTimeout
	if l.cfg.flannel() {
		timeout += flannelTimeout
		if err := l.startFlannel(ctx); err != nil {
			return err
		}
	}
	return l.wait(ctx, "the kubelets", timeout, procs, func(ctx context.Context) error {
		return l.kube(func(c *kubernetes.Clientset) error {
			nodes, err := c.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
			if err != nil {
				return fmt.Errorf("listing nodes: %w", err)
			}
			ready := 0
			for _, node := range nodes.Items {
				for _, cond := range node.Status.Conditions {
					if cond.Type == corev1.NodeReady && cond.Status == corev1.ConditionTrue {
						ready++
					}
				}
			}
			if ready < l.cfg.Nodes {
				return fmt.Errorf("%d of %d nodes are ready", ready, l.cfg.Nodes)
			}
			return nil
		})
	})
}

// LoadImage gives an image to containerd of every node of a lab with kubelets: an archive of an OCI layout that names
// it.
func (l *Lab) LoadImage(ctx context.Context, archive string) error {
	return l.change(ctx, func(*state) error { return l.loadImage(ctx, archive) })
}

// loadImage loads archives into all nodes at the same time: each has a containerd of its own, which waits for the disk,
// too.
func (l *Lab) loadImage(ctx context.Context, archives ...string) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, n := range l.nodes() {
		g.Go(func() error {
			for _, archive := range archives {
				if out, err := l.ctr(ctx, NodeName(n), "--namespace", "k8s.io", "images", "import", archive); err != nil {
					return fmt.Errorf("importing %s on %s: %w: %s", archive, NodeName(n), err, out)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// ctr runs containerd's client with the socket of a node.
func (l *Lab) ctr(ctx context.Context, node string, args ...string) ([]byte, error) {
	pid, err := l.nodeInit(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, ctrTimeout)
	defer cancel()
	args = append([]string{"--address", fmt.Sprintf("/proc/%d/root%s", pid, containerdSocket)}, args...)
	return exec.CommandContext(ctx, filepath.Join(l.cfg.KubeBin, "debian/usr/bin/ctr"), args...).CombinedOutput()
}

// sandbox returns the path of the network namespace of a pod (namespace/name) that a kubelet runs, as containerd's CNI
// library has it on record in the pod's node.
func (l *Lab) sandbox(pod string) (string, error) {
	namespace, name, _ := strings.Cut(pod, "/")
	for _, n := range l.nodes() {
		init, err := l.nodeInit(NodeName(n))
		if err != nil {
			return "", err
		}
		root := fmt.Sprintf("/proc/%d/root", init)
		records, err := filepath.Glob(root + "/var/lib/cni/results/*")
		if err != nil {
			return "", err
		}
		for _, record := range records {
			var r struct {
				Args   [][2]string `json:"cniArgs"`
				Result struct {
					Interfaces []struct{ Sandbox string }
				}
			}
			b, err := os.ReadFile(record)
			if err != nil || json.Unmarshal(b, &r) != nil {
				continue // of a pod that goes or comes
			}
			if !slices.Contains(r.Args, [2]string{"K8S_POD_NAMESPACE", namespace}) || !slices.Contains(r.Args, [2]string{"K8S_POD_NAME", name}) {
				continue
			}
			for _, link := range r.Result.Interfaces {
				if link.Sandbox != "" {
					return filepath.Join(root, netnsDir, filepath.Base(link.Sandbox)), nil
				}
			}
		}
	}
	return "", fmt.Errorf("pod %q: no node of lab %q runs it with a network of its own, want namespace/name", pod, l.cfg.Name)
}
