package scale

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/integration/lab"
)

// Cluster says how large a cluster is. Node 1 is the lab's; the first gateways nodes are gateways, and the first of the
// egresses are of a pool that node 1 and node 2 alone may serve.
type Cluster struct {
	Nodes    int
	Gateways int
	Egresses int // each has an IPv4 and an IPv6 address
	Pods     int
	TakeOver int // how many IPs node 2 holds
}

// The pools, each one a family, and the label by which they select their nodes.
const (
	pairPool  = "pair"
	fleetPool = "fleet"
	poolLabel = "scale.egret/pool"
)

const namespaces = 20

// pairs is how many egresses are of the pool of nodes 1 and 2.
func (c Cluster) pairs() int { return c.TakeOver / 2 }

func (c Cluster) namespace(pod int) string { return fmt.Sprintf("scale-%02d", pod%namespaces) }

// apps is how many labels app there are in a namespace with an egress each. A sixth of the pods has another.
func (c Cluster) apps() int { return (c.Egresses + namespaces - 1) / namespaces }

func (c Cluster) app(pod int) int { return pod / namespaces % (c.apps() + max(1, c.apps()/5)) }

func (c Cluster) pod(i int) string { return fmt.Sprintf("p-%06d", i) }

// node returns the number of a pod's node.
func (c Cluster) node(pod int) int { return 1 + pod*7919%c.Nodes }

// egress returns the egress of the pods of an app in the namespace of a pod; "": none.
func (c Cluster) egress(pod, app int) string {
	if e := app*namespaces + pod%namespaces; app < c.apps() && e < c.Egresses {
		return fmt.Sprintf("e-%05d", e)
	}
	return ""
}

// members returns how many records members/by-node there are in etcd.
func (c Cluster) members() int {
	all := map[string]bool{}
	for i := range c.Pods {
		all[fmt.Sprint(c.node(i), c.egress(i, c.app(i)))] = true
	}
	return len(all)
}

// podIPs returns the addresses of a pod.
func (c Cluster) podIPs(pod int) []netip.Addr {
	n, host := c.node(pod), 2+pod/c.Nodes // no node has two pods of one turn
	if n == 1 {
		return []netip.Addr{netip.AddrFrom4([4]byte{10, 244, 1, byte(host)}), netip.MustParseAddr(fmt.Sprintf("fd44:1::%d", host))}
	}
	return []netip.Addr{after(podRange(n).Addr(), host), netip.MustParseAddr(fmt.Sprintf("fd44:%d::%d", n, host))}
}

// podRange returns the IPv4 range of the pods of a node that is not the lab's.
func podRange(n int) netip.Prefix {
	return netip.PrefixFrom(after(netip.MustParseAddr("10.64.0.0"), n*64), 26)
}

// nodeIP returns the address of a node. Those of the fleet's gateways are the control host's, on the LAN; those of
// other nodes are nobody's.
func (c Cluster) nodeIP(n int) netip.Addr {
	if n <= c.Gateways {
		return lab.NodeIP(n)
	}
	return after(silent.Addr(), n)
}

// silent are the addresses of nodes that do not gossip. What is sent there comes to nothing, without an error.
var silent = netip.MustParsePrefix("10.11.0.0/16")

// after returns the IPv4 address n places after another one.
func after(ip netip.Addr, n int) netip.Addr {
	b := ip.As4()
	v := int(b[0])<<24 | int(b[1])<<16 | int(b[2])<<8 | int(b[3])
	v += n
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

// Load writes all objects but node 1 into the API server's etcd.
func (c Cluster) Load(ctx context.Context, etcd *clientv3.Client) error {
	w := &writer{etcd: etcd, codec: protobuf.NewSerializer(scheme.Scheme, scheme.Scheme), now: metav1.NewTime(time.Now().Truncate(time.Second))}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(64)
	w.g, w.ctx = g, ctx
	for i := range namespaces {
		name := c.namespace(i)
		w.object("namespaces/"+name, &corev1.Namespace{
			TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, Status: corev1.NamespaceStatus{Phase: corev1.NamespaceActive},
			ObjectMeta: w.meta("", name, map[string]string{corev1.LabelMetadataName: name}),
		})
	}
	w.pool(pairPool, "4", "10.12.0.1", "10.12.255.254")
	w.pool(pairPool, "6", "fd12::1", "fd12::fffe")
	w.pool(fleetPool, "4", "10.13.0.1", "10.13.255.254")
	w.pool(fleetPool, "6", "fd13::1", "fd13::fffe")
	for n := 2; n <= c.Nodes; n++ {
		w.object("minions/"+lab.NodeName(n), c.nodeObject(w, n))
	}
	for e := range c.Egresses {
		w.egress(c, e)
	}
	for i := range c.Pods {
		w.object("pods/"+c.namespace(i)+"/"+c.pod(i), c.podObject(w, i))
	}
	return g.Wait()
}

func (c Cluster) nodeObject(w *writer, n int) *corev1.Node {
	name := lab.NodeName(n)
	labels := map[string]string{corev1.LabelHostname: name, corev1.LabelOSStable: "linux"}
	if n == 2 {
		labels[poolLabel] = pairPool
	} else if n <= c.Gateways {
		labels[poolLabel] = fleetPool
	}
	node := &corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: w.meta("", name, labels)}
	node.Spec.PodCIDRs = []string{podRange(n).String(), fmt.Sprintf("fd44:%d::/64", n)}
	node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	node.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeHostName, Address: name}, {Type: corev1.NodeInternalIP, Address: c.nodeIP(n).String()},
		{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("fd11::%d", n)},
	}
	node.Status.Conditions = []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: w.now, LastTransitionTime: w.now,
	}}
	return node
}

func (c Cluster) podObject(w *writer, i int) *corev1.Pod {
	p := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: w.meta(c.namespace(i), c.pod(i), map[string]string{"app": fmt.Sprint(c.app(i))}),
		Spec: corev1.PodSpec{
			NodeName: lab.NodeName(c.node(i)), Containers: []corev1.Container{{Name: "main", Image: "lab.invalid/none"}},
			RestartPolicy: corev1.RestartPolicyAlways, DNSPolicy: corev1.DNSClusterFirst,
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &w.now},
	}
	for _, ip := range c.podIPs(i) {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: ip.String()})
	}
	p.Status.PodIP = p.Status.PodIPs[0].IP
	return p
}

// writer writes objects as the API server does, many at a time. Its group tells the first fault.
type writer struct {
	etcd  *clientv3.Client
	codec *protobuf.Serializer
	now   metav1.Time
	ctx   context.Context // of g
	g     *errgroup.Group
}

func (w *writer) meta(namespace, name string, labels map[string]string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, UID: uuid.NewUUID(), CreationTimestamp: w.now, Labels: labels, Generation: 1}
}

func (w *writer) object(key string, o runtime.Object) {
	var b bytes.Buffer
	if err := w.codec.Encode(o, &b); err != nil {
		w.g.Go(func() error { return fmt.Errorf("encoding %s: %w", key, err) })
		return
	}
	w.put(key, b.String())
}

// put writes one key a transaction, as the API server does: it takes objects of one revision for one, and may list some
// of them without the others.
func (w *writer) put(key, value string) {
	w.g.Go(func() error {
		if _, err := w.etcd.Put(w.ctx, "/registry/"+key, value); err != nil {
			return fmt.Errorf("writing %s: %w", key, err)
		}
		return nil
	})
}

// custom writes an object of Egret's: JSON, as the API server keeps it.
func (w *writer) custom(resource, kind, name string, spec map[string]any) {
	b, err := json.Marshal(map[string]any{
		"apiVersion": "crd.antrea.io/v1beta1", "kind": kind, "metadata": w.meta("", name, nil), "spec": spec,
	})
	if err != nil {
		w.g.Go(func() error { return fmt.Errorf("encoding %s %s: %w", kind, name, err) })
		return
	}
	w.put("crd.antrea.io/"+resource+"/"+name, string(b))
}

func (w *writer) pool(name, family, start, end string) {
	w.custom("externalippools", "ExternalIPPool", name+"-"+family, map[string]any{
		"ipRanges":     []any{map[string]any{"start": start, "end": end}},
		"nodeSelector": map[string]any{"matchLabels": map[string]any{poolLabel: name}},
	})
}

func (w *writer) egress(c Cluster, e int) {
	pool := fleetPool
	if e < c.pairs() {
		pool = pairPool
	}
	match := func(k, v string) map[string]any { return map[string]any{"matchLabels": map[string]any{k: v}} }
	w.custom("egresses", "Egress", c.egress(e%namespaces, e/namespaces), map[string]any{
		"externalIPPools": []any{pool + "-4", pool + "-6"},
		"appliedTo": map[string]any{
			"namespaceSelector": match(corev1.LabelMetadataName, c.namespace(e)), "podSelector": match("app", fmt.Sprint(e/namespaces)),
		},
	})
}

// isPair reports whether an egress is of the pools of nodes 1 and 2.
func isPair(p egress.Policy) bool {
	return len(p.Addresses) > 0 && strings.HasPrefix(p.Addresses[0].Pool, pairPool)
}
