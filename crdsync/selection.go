package crdsync

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
)

// selector is an appliedTo: a pod is selected when both match.
type selector struct {
	namespaces, pods labels.Selector
}

func readAppliedTo(a v1beta1.AppliedTo) (selector, error) {
	if a.PodSelector == nil && a.NamespaceSelector == nil {
		return selector{labels.Nothing(), labels.Nothing()}, nil
	}
	namespaces, nsErr := orEverything("namespaceSelector", a.NamespaceSelector)
	pods, podErr := orEverything("podSelector", a.PodSelector)
	return selector{namespaces, pods}, errors.Join(nsErr, podErr)
}

func orEverything(field string, s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return out, nil
}

// pod is what matters of a pod that counts.
type pod struct {
	name      string // namespace/name
	namespace string
	node      string
	labels    map[string]string
	ips       []netip.Addr // sorted
	created   time.Time
}

// readPod returns what matters of a pod. ok is false for one that no egress is about: it shares its node's network, has no IP or no
// node yet, or has ended. One that is being deleted counts until it has ended: it may still send.
func readPod(p *corev1.Pod) (out pod, ok bool) {
	if p.Spec.HostNetwork || p.Spec.NodeName == "" || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
		return pod{}, false
	}
	texts := []string{p.Status.PodIP}
	for _, ip := range p.Status.PodIPs {
		texts = append(texts, ip.IP)
	}
	var ips []netip.Addr
	for _, text := range texts {
		if ip, err := netip.ParseAddr(text); err == nil && ip.Zone() == "" {
			ips = append(ips, ip.Unmap())
		}
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	out = pod{
		name: p.Namespace + "/" + p.Name, namespace: p.Namespace, node: p.Spec.NodeName, labels: p.Labels,
		ips: slices.Compact(ips), created: p.CreationTimestamp.UTC(),
	}
	return out, len(ips) > 0
}

// holder returns the pod that an IP belongs to among all that list it. The newer wins: the IP was given anew, and the older pod is on
// its way out.
func holder(pods []pod) pod {
	return slices.MaxFunc(pods, func(a, b pod) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name, b.name))
	})
}

// claimant is an egress as far as it selects pods.
type claimant struct {
	name     string
	families []family // of the pod IPs that it takes
	// namespace and pod say whether it selects pods of a namespace with these labels, and which.
	namespace func(labels.Set) bool
	pod       func(pod) bool
}

// selection says which egress a pod belongs to.
type selection struct {
	claimants  []claimant              // in order of precedence
	namespaces func(string) labels.Set // the labels of a namespace
	candidates map[string][]claimant   // namespace -> those that may select pods of it; filled as needed
}

func newSelection(claimants []claimant, namespaces func(string) labels.Set) *selection {
	return &selection{claimants, namespaces, map[string][]claimant{}}
}

// owner returns the egress that an IP of a pod belongs to: the first that selects the pod and takes IPs of the family; else
// egress.Unselected.
func (s *selection) owner(p pod, f family) string {
	candidates, ok := s.candidates[p.namespace]
	if !ok {
		set := s.namespaces(p.namespace)
		for _, c := range s.claimants {
			if c.namespace(set) {
				candidates = append(candidates, c)
			}
		}
		s.candidates[p.namespace] = candidates
	}
	for _, c := range candidates {
		if slices.Contains(c.families, f) && c.pod(p) {
			return c.name
		}
	}
	return egress.Unselected
}

// group divides the pods of one node among the egresses. owns reports whether an IP that a pod lists is the pod's.
func (s *selection) group(node string, pods []pod, owns func(pod, netip.Addr) bool) map[string]egress.Members {
	ips := map[string]map[string][]netip.Addr{} // egress -> pod -> IPs
	for _, p := range pods {
		for _, ip := range p.ips {
			if !owns(p, ip) {
				continue
			}
			name := s.owner(p, familyOf(ip))
			if ips[name] == nil {
				ips[name] = map[string][]netip.Addr{}
			}
			ips[name][p.name] = append(ips[name][p.name], ip)
		}
	}
	out := map[string]egress.Members{}
	for name, byPod := range ips {
		m := egress.Members{Egress: name, Node: node}
		for p, ips := range byPod {
			m.Pods = append(m.Pods, egress.Member{Pod: p, IPs: ips})
		}
		slices.SortFunc(m.Pods, func(a, b egress.Member) int { return cmp.Compare(a.Pod, b.Pod) })
		out[name] = m
	}
	return out
}
