package crdsync

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/internal/etcdtest"
	"github.com/egret-project/egret/manifests"
	"github.com/egret-project/egret/store"
)

// deadline bounds every wait of these tests: what they wait for takes milliseconds, the rest is for a busy machine.
const deadline = time.Minute

// cluster is a Kubernetes API and an etcd for crdsync, with what a test does to them.
type cluster struct {
	*testing.T
	kube  *rest.Config
	core  *kubernetes.Clientset
	dyn   dynamic.Interface
	etcd  *etcdtest.Server
	store *store.Client
	root  *store.Client // nil: etcd has no users
	log   *slog.Logger
	// webhook is what run serves; nil: none
	webhook *Webhook
	// housekeeping is how often run looks after etcd; 0: never
	housekeeping time.Duration
	// blockSize and blockRest are as in Config.
	blockSize int
	blockRest time.Duration
}

// newCluster returns a cluster over an API server without objects: it removes those that it finds, as a test leaves
// them that does not come to its end, and the test's own when that ends.
func newCluster(t *testing.T, kube *rest.Config) *cluster {
	t.Helper()
	c := connect(t, kube)
	c.removeObjects()
	t.Cleanup(c.removeObjects)
	return c
}

// connect returns a cluster over an API server as it is, and an empty etcd.
func connect(t *testing.T, kube *rest.Config) *cluster {
	t.Helper()
	c := &cluster{T: t, kube: kube, etcd: etcdtest.New(t), log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	var err error
	if c.core, err = kubernetes.NewForConfig(kube); err != nil {
		t.Fatal(err)
	}
	if c.dyn, err = dynamic.NewForConfig(kube); err != nil {
		t.Fatal(err)
	}
	if c.store, err = store.Dial(t.Context(), store.Config{Endpoints: []string{c.etcd.Endpoint()}}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.store.Close() })
	return c
}

func (c *cluster) removeObjects() {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	defer cancel()
	now := int64(0)
	opts := metav1.DeleteOptions{GracePeriodSeconds: &now}
	all := metav1.ListOptions{}
	namespaces, err := c.core.CoreV1().Namespaces().List(ctx, all)
	if err != nil {
		c.Errorf("removing objects: %v", err)
		return
	}
	for _, n := range namespaces.Items {
		err = errors.Join(err, c.core.CoreV1().Pods(n.Name).DeleteCollection(ctx, opts, all))
		if _, labelled := n.Labels["env"]; labelled { // the namespaces stay: nobody here removes what is in them
			_, labelErr := c.core.CoreV1().Namespaces().Patch(ctx, n.Name, types.MergePatchType, []byte(`{"metadata": {"labels": {"env": null}}}`), metav1.PatchOptions{})
			err = errors.Join(err, labelErr)
		}
	}
	err = errors.Join(err, c.core.CoreV1().Nodes().DeleteCollection(ctx, opts, all),
		c.dyn.Resource(v1beta1.EgressResource).DeleteCollection(ctx, opts, all), c.dyn.Resource(v1beta1.PoolResource).DeleteCollection(ctx, opts, all))
	if err != nil {
		c.Errorf("removing objects: %v", err)
	}
}

// underItsRole has etcd hold crdsync to its role.
func (c *cluster) underItsRole() *cluster {
	c.Helper()
	role := store.Role{Name: "egret-crdsync", Users: []string{"crdsync"}, Grants: store.CrdsyncGrants}
	changes, _, err := c.store.DiffRoles(c.Context(), []store.Role{role})
	etcd := c.store.Etcd()
	for _, user := range []string{"crdsync", "root"} {
		_, added := etcd.UserAdd(c.Context(), user, "secret") // else they would have no password
		err = errors.Join(err, added)
	}
	err = errors.Join(err, c.store.ChangeRoles(c.Context(), changes), c.store.EnableAuth(c.Context(), "root"))
	if err != nil {
		c.Fatal(err)
	}
	c.store.Close()
	for user, client := range map[string]**store.Client{"crdsync": &c.store, "root": &c.root} {
		// A password takes etcd a while to check.
		cfg := store.Config{Endpoints: []string{c.etcd.Endpoint()}, Username: user, Password: "secret", DialTimeout: deadline}
		dialled, err := store.Dial(c.Context(), cfg)
		if err != nil {
			c.Fatal(err)
		}
		*client = dialled
	}
	c.Cleanup(func() { c.root.Close() })
	return c
}

// direct returns a client that may do everything.
func (c *cluster) direct() *clientv3.Client {
	if c.root != nil {
		return c.root.Etcd()
	}
	return c.etcd.Client()
}

// run starts crdsync, as the service account of the manifests, and returns what stops it.
func (c *cluster) run(kube *rest.Config) (stop func()) {
	c.Helper()
	kube = rest.CopyConfig(kube)
	kube.Impersonate.UserName = cmp.Or(kube.Impersonate.UserName, "system:serviceaccount:egret-system:egret-crdsync")
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		cfg := Config{Kube: kube, Store: c.store, ID: "test", ElectionTTL: 10 * time.Second, Webhook: c.webhook, Log: c.log, BlockSize: c.blockSize, BlockRest: c.blockRest, BlockHistory: 24 * time.Hour}
		if c.housekeeping != 0 {
			cfg.CompactAfter, cfg.Defragment, cfg.HousekeepingInterval = time.Hour, true, c.housekeeping
		}
		done <- Run(ctx, cfg)
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			c.Errorf("crdsync ended: %v", err)
		}
	})
	c.Cleanup(stop)
	return stop
}

// applyRBAC applies the roles of the manifests.
func applyRBAC(t *testing.T, kube *rest.Config) {
	t.Helper()
	core, err := kubernetes.NewForConfig(kube)
	if err != nil {
		t.Fatal(err)
	}
	b, err := manifests.FS.ReadFile("deploy/crdsync.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range strings.Split(string(b), "\n---\n") {
		var role rbacv1.ClusterRole
		var binding rbacv1.ClusterRoleBinding
		switch {
		case yaml.UnmarshalStrict([]byte(doc), &role) == nil && role.Kind == "ClusterRole":
			_, err = core.RbacV1().ClusterRoles().Create(t.Context(), &role, metav1.CreateOptions{})
		case yaml.UnmarshalStrict([]byte(doc), &binding) == nil && binding.Kind == "ClusterRoleBinding":
			_, err = core.RbacV1().ClusterRoleBindings().Create(t.Context(), &binding, metav1.CreateOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// outage makes the API server unreachable for those who dial through it.
type outage struct {
	mu    sync.Mutex // guards what follows
	down  bool
	conns []net.Conn
}

func (o *outage) dial(ctx context.Context, network, address string) (net.Conn, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.down {
		return nil, errors.New("the network is down")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	if err == nil {
		o.conns = append(o.conns, conn)
	}
	return conn, err
}

func (o *outage) set(down bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.down = down
	for _, conn := range o.conns {
		conn.Close()
	}
	o.conns = nil
}

// The objects.

func (c *cluster) node(name, ip string) {
	c.Helper()
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.244.0.0/24"}, PodCIDR: "10.244.0.0/24"}}
	n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}
	if _, err := c.core.CoreV1().Nodes().Create(c.Context(), n, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) pod(namespace, name, node, ip, app string) {
	c.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}
	if _, err := c.core.CoreV1().Namespaces().Create(c.Context(), ns, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		c.Fatal(err)
	}
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": app}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "none.invalid"}}},
	}
	pods := c.core.CoreV1().Pods(namespace)
	p, err := pods.Create(c.Context(), p, metav1.CreateOptions{})
	if err != nil {
		c.Fatal(err)
	}
	if ip == "" { // it was not started yet
		return
	}
	p.Status = corev1.PodStatus{Phase: corev1.PodRunning, PodIP: ip, PodIPs: []corev1.PodIP{{IP: ip}}}
	if _, err := pods.UpdateStatus(c.Context(), p, metav1.UpdateOptions{}); err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) patchPod(namespace, name, patch string, subresources ...string) {
	c.Helper()
	_, err := c.core.CoreV1().Pods(namespace).Patch(c.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, subresources...)
	if err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) patchNamespace(name, patch string) {
	c.Helper()
	if _, err := c.core.CoreV1().Namespaces().Patch(c.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) deletePod(namespace, name string, grace int64) {
	c.Helper()
	if err := c.core.CoreV1().Pods(namespace).Delete(c.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		c.Fatal(err)
	}
}

// create creates an Egress or ExternalIPPool from YAML.
func (c *cluster) create(text string) {
	c.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		c.Fatal(err)
	}
	if _, err := c.dyn.Resource(resourceOf(u.GetKind())).Create(c.Context(), u, metav1.CreateOptions{}); err != nil {
		c.Fatal(err)
	}
}

func resourceOf(kind string) schema.GroupVersionResource {
	if kind == "ExternalIPPool" {
		return v1beta1.PoolResource
	}
	return v1beta1.EgressResource
}

func (c *cluster) patch(kind, name, patch string) {
	c.Helper()
	if _, err := c.dyn.Resource(resourceOf(kind)).Patch(c.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		c.Fatal(err)
	}
}

func (c *cluster) remove(kind, name string) {
	c.Helper()
	if err := c.dyn.Resource(resourceOf(kind)).Delete(c.Context(), name, metav1.DeleteOptions{}); err != nil {
		c.Fatal(err)
	}
}

// example creates the guide's example: a pool and two egresses.
func (c *cluster) example() {
	c.Helper()
	files, err := fs.Glob(manifests.FS, "examples/*.yaml")
	if err != nil || len(files) != 3 {
		c.Fatalf("examples: %v, %v", files, err)
	}
	// in the order of kubectl apply: the pool first, since an egress without one is warned of
	for _, file := range files {
		b, err := fs.ReadFile(manifests.FS, file)
		if err != nil {
			c.Fatal(err)
		}
		c.create(string(b))
	}
}
