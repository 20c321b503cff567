package crdsync

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// labelSet is the labels of a pod. Equal ones are one in memory, however many pods have them, and are compared at the
// cost of a pointer. The zero labelSet has no labels.
type labelSet struct{ text unique.Handle[string] }

// newLabelSet returns the labelSet of labels, whose keys and values the API server allows no NUL.
func newLabelSet(m map[string]string) labelSet {
	if len(m) == 0 {
		return labelSet{}
	}
	parts := make([]string, 0, 2*len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		parts = append(parts, k, m[k])
	}
	return labelSet{unique.Make(strings.Join(parts, "\x00"))}
}

// set returns the labels.
func (l labelSet) set() labels.Set {
	out := labels.Set{}
	if l == (labelSet{}) {
		return out
	}
	parts := strings.Split(l.text.Value(), "\x00")
	for i := 0; i+1 < len(parts); i += 2 {
		out[parts[i]] = parts[i+1]
	}
	return out
}

// keptPod is what the informer keeps of a Pod, in a fifth of the memory of one that is trimmed: there may be 100,000.
// It is not changed.
type keptPod struct {
	name    string                // namespace/name
	slash   int                   // where in it
	node    unique.Handle[string] // one in memory
	labels  labelSet
	ips     []netip.Addr
	created time.Time
	version string // the resourceVersion, by which the informer tells an update from an object that it has sent
	counts  bool   // as readPod says
	ending  bool
}

func keepPod(o *corev1.Pod) *keptPod {
	k := &keptPod{name: o.Namespace + "/" + o.Name, slash: len(o.Namespace), version: o.ResourceVersion}
	var p pod
	if p, k.counts = readPod(o); k.counts {
		k.node, k.labels, k.ips, k.created, k.ending = unique.Make(p.node), p.labels, slices.Clip(p.ips), p.created, p.ending
	}
	return k
}

// read returns the pod; false: it is one that readPod does not count.
func (k *keptPod) read() (pod, bool) {
	if !k.counts {
		return pod{}, false
	}
	return pod{
		name: k.name, namespace: k.name[:k.slash], node: k.node.Value(), labels: k.labels, ips: k.ips, created: k.created, ending: k.ending,
	}, true
}

// GetObjectMeta returns what the informer asks of an object.
func (k *keptPod) GetObjectMeta() metav1.Object {
	return &metav1.ObjectMeta{Namespace: k.name[:k.slash], Name: k.name[k.slash+1:], ResourceVersion: k.version}
}

// neighbourhood returns the key of byIP: a range of 16 addresses, since an entry for each address would take more
// memory than the pods.
func neighbourhood(ip netip.Addr) string {
	p, _ := ip.Prefix(ip.BitLen() - 4) // it fails for no address without a zone
	return string(p.Addr().AsSlice())
}
