package lab

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"
)

// KubeVersion is the version of the API server that a lab runs, as integration/kube/go.mod pins it.
const KubeVersion = "1.36.3"

// The defaults of a Config.
const (
	DefaultName     = "lab"
	DefaultNodes    = 3
	DefaultLeaseTTL = 3 * time.Second
	DefaultMembers  = 1
)

// maxNodes keeps the nodes' addresses, 10.10.0.101 and up, below that of the outside host.
const maxNodes = 98

// Config says what Up builds. The zero value of each field means its default.
type Config struct {
	// Name tells several labs on one machine apart: lower-case letters, digits and dashes, at most 30.
	Name string
	// Nodes is their number, 1..98.
	Nodes int
	// Etcd is the program of each member, called with its name, the folder of its data, its URLs for clients and for
	// members, and all members as --initial-cluster has them. Default: what EGRET_LAB_ETCD names, or else the etcd that
	// this program is linked with.
	Etcd string
	// EtcdMembers is how many servers Egret's etcd has, 1..5.
	EtcdMembers int
	// LeaseTTL is passed to every agent.
	LeaseTTL time.Duration
	// AgentFlags are further flags of every agent, and SyncFlags of crdsync.
	AgentFlags, SyncFlags []string
	// IPv6Nodes makes the nodes' only InternalIP that of IPv6, so that the overlay goes over IPv6. Pods stay dual
	// stack.
	IPv6Nodes bool
	// WithoutPodCIDRs leaves out spec.podCIDRs of the first so many nodes, as a CNI does that keeps its own book of
	// addresses.
	WithoutPodCIDRs int
	// NoWebhook leaves the webhook out, which an installation has.
	NoWebhook bool
	// Bare leaves crdsync and the agents out: the cluster as it is without Egret.
	Bare bool
	// Kubelet makes it a cluster that runs pods: a controller manager and a scheduler, and on each node containerd, a
	// kubelet, kube-proxy and a CNI. It is Bare, and without the CRDs: Egret is installed as in any cluster, with
	// kubectl.
	Kubelet bool
	// CNI is one of CNIs, where there are kubelets. Default: CNIBridge.
	CNI string
	// Images are the archives of OCI layouts that containerd of each node has from the start, where there are kubelets.
	Images []string

	// Self is a program whose main calls Helper; the lab's own background processes are started from it. Default: the
	// running one.
	Self string
	// Egret is the program egret. Default: beside Self's program, or in bin/ of the module around the working
	// directory.
	Egret string
	// KubeBin is the folder of kube-apiserver, and of kubectl where the machine has none. Default: k8s-<KubeVersion>
	// beside Egret.
	KubeBin string

	// Log says what is being built, a line a step. Default: nothing is logged.
	Log *slog.Logger `json:"-"`
}

var validName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?$`)

// withDefaults returns the configuration with every default put in.
func (c Config) withDefaults() (Config, error) {
	c.Name = cmp.Or(c.Name, DefaultName)
	c.Nodes = cmp.Or(c.Nodes, DefaultNodes)
	c.EtcdMembers = cmp.Or(c.EtcdMembers, DefaultMembers)
	c.LeaseTTL = cmp.Or(c.LeaseTTL, DefaultLeaseTTL)
	c.Bare = c.Bare || c.Kubelet
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Self == "" {
		self, err := os.Executable()
		if err != nil {
			return c, fmt.Errorf("finding the running program: %w", err)
		}
		c.Self = self
	}
	c.Egret = cmp.Or(c.Egret, program("egret"))
	c.Etcd = cmp.Or(c.Etcd, os.Getenv("EGRET_LAB_ETCD"))
	c.KubeBin = cmp.Or(c.KubeBin, program("k8s-"+KubeVersion))
	for _, path := range []*string{&c.Self, &c.Egret, &c.KubeBin, &c.Etcd} {
		if *path == "" {
			continue
		}
		abs, err := filepath.Abs(*path)
		if err != nil {
			return c, err
		}
		*path = abs
	}
	return c, nil
}

// program returns where a built program is: beside the running one, or in bin/ of the module in which the working
// directory is.
func program(name string) string {
	var dirs []string
	if self, err := os.Executable(); err == nil {
		dirs = append(dirs, filepath.Dir(self))
	}
	if dir, err := os.Getwd(); err == nil {
		for ; dir != "/"; dir = filepath.Dir(dir) {
			if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
				dirs = append(dirs, filepath.Join(dir, "bin"))
			}
		}
	}
	for _, dir := range dirs {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			return filepath.Join(dir, name)
		}
	}
	return filepath.Join("bin", name)
}

// Validate reports every fault of a configuration at once. A zero field is not one.
func (c Config) Validate() error {
	var errs []error
	if c.Name != "" {
		errs = append(errs, checkName(c.Name))
	}
	if c.Nodes < 0 || c.Nodes > maxNodes {
		errs = append(errs, fmt.Errorf("nodes %d: want 1 to %d", c.Nodes, maxNodes))
	}
	if c.EtcdMembers < 0 || c.EtcdMembers > 5 {
		errs = append(errs, fmt.Errorf("etcd members %d: want 1 to 5", c.EtcdMembers))
	}
	if c.LeaseTTL != 0 && (c.LeaseTTL < 2*time.Second || c.LeaseTTL%time.Second != 0) {
		errs = append(errs, fmt.Errorf("lease TTL %v: want whole seconds, 2s or more, as etcd does", c.LeaseTTL))
	}
	if len(c.Images) > 0 && !c.Kubelet {
		errs = append(errs, errors.New("images: without kubelets nothing runs them"))
	}
	if c.CNI != "" && !slices.Contains(CNIs(), c.CNI) {
		errs = append(errs, fmt.Errorf("CNI %q: want one of %q", c.CNI, CNIs()))
	}
	if c.CNI != "" && c.CNI != CNIBridge && !c.Kubelet {
		errs = append(errs, fmt.Errorf("CNI %s: without kubelets nothing runs it", c.CNI))
	}
	return errors.Join(errs...)
}

// OwnName returns a name for a lab that only this process has: what, and the process's number. A lab of the name that a
// killed process left behind is in nobody's way.
func OwnName(what string) string { return fmt.Sprintf("%s-%d", what, os.Getpid()) }

// checkName refuses what must not become a part of paths.
func checkName(name string) error {
	if !validName.MatchString(name) {
		return fmt.Errorf("name %q: want at most 30 lower-case letters, digits and dashes", name)
	}
	return nil
}

// prerequisites reports everything that the machine lacks for this lab.
func (c Config) prerequisites() error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("root is needed, for network namespaces"))
	}
	want := map[string]string{filepath.Join(c.KubeBin, "kube-apiserver"): "build it with integration/kube/build"}
	if !c.Bare {
		want[c.Egret] = "build it with go build -o bin/ ./cmd/egret"
	}
	if c.Kubelet {
		for _, program := range kubeletPrograms() {
			want[filepath.Join(c.KubeBin, program)] = "build it with integration/kube/build kubelet"
		}
		if c.flannel() {
			for _, file := range flannelFiles() {
				want[filepath.Join(c.KubeBin, "flannel", file)] = "build it with integration/kube/flannel/build"
			}
		}
		_, err := hierarchies()
		errs = append(errs, err)
	}
	for path, how := range want {
		if info, err := os.Stat(path); err != nil {
			errs = append(errs, fmt.Errorf("%w: %s", err, how))
		} else if info.IsDir() || info.Mode()&0o111 == 0 && filepath.Base(path) != flannelManifest {
			errs = append(errs, fmt.Errorf("%s is no program", path))
		}
	}
	return errors.Join(errs...)
}
