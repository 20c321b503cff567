package crdsync

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	operator "k8s.io/apimachinery/pkg/selection"

	"github.com/egret-project/egret/egress"
)

// selector is an appliedTo: a pod is selected when both match.
type selector struct {
	namespaces, pods labels.Selector
}

// pod is what matters of a pod that counts.
type pod struct {
	name      string // namespace/name
	namespace string
	node      string
	labels    map[string]string
	ips       []netip.Addr // sorted
	created   time.Time
	ending    bool // it is being deleted
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
		ips: slices.Compact(ips), created: p.CreationTimestamp.UTC(), ending: p.DeletionTimestamp != nil,
	}
	return out, len(ips) > 0
}

// holder returns the pod that an IP belongs to among all that list it: the IP was given anew. One that is being deleted has lost it to
// one that is not, and the older to the newer.
func holder(pods []pod) pod {
	return slices.MaxFunc(pods, func(a, b pod) int {
		switch {
		case a.ending && !b.ending:
			return -1
		case b.ending && !a.ending:
			return 1
		}
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
	label     label // that every pod that it selects has; zero: not known
}

type label struct{ key, value string }

// requiredLabel returns a label that everything has that a selector matches; the zero label when there is none.
func requiredLabel(s labels.Selector) label {
	requirements, _ := s.Requirements()
	for _, r := range requirements {
		if values := r.Values(); len(values) == 1 && (r.Operator() == operator.Equals || r.Operator() == operator.In) {
			return label{r.Key(), values.UnsortedList()[0]}
		}
	}
	return label{}
}

// selection says which egress a pod belongs to.
type selection struct {
	claimants  []claimant                          // in order of precedence
	namespaces func(string) (labels.Set, bool)     // the labels of a namespace; false: it is not seen yet
	listed     func(egressName string, p pod) bool // whether etcd lists a pod as one of an egress
	candidates map[string]map[label][]int          // namespace -> label -> which claimants may select such pods; filled as needed
	losses     map[string]map[pair]loss            // node -> what is lost there; filled by group
}

func newSelection(claimants []claimant, namespaces func(string) (labels.Set, bool), listed func(string, pod) bool) *selection {
	return &selection{claimants, namespaces, listed, map[string]map[label][]int{}, map[string]map[pair]loss{}}
}

// owner returns the egress that an IP of a pod belongs to: the first that selects the pod and takes IPs of the family; else
// egress.Unselected. losers are the others that do so. While the pod's namespace is not seen, it is what etcd has; "" when it has nothing.
func (s *selection) owner(p pod, f family) (name string, losers []string) {
	candidates, ok := s.candidates[p.namespace]
	if !ok {
		set, seen := s.namespaces(p.namespace)
		if !seen {
			return s.former(p, f), nil
		}
		candidates = map[label][]int{}
		for i, c := range s.claimants {
			if c.namespace(set) {
				candidates[c.label] = append(candidates[c.label], i)
			}
		}
		s.candidates[p.namespace] = candidates
	}
	possible := slices.Clone(candidates[label{}])
	for key, value := range p.labels {
		possible = append(possible, candidates[label{key, value}]...)
	}
	slices.Sort(possible)
	for _, i := range possible {
		c := s.claimants[i]
		switch {
		case !slices.Contains(c.families, f) || !c.pod(p):
		case name == "":
			name = c.name
		default:
			losers = append(losers, c.name)
		}
	}
	return cmp.Or(name, egress.Unselected), losers
}

func (s *selection) former(p pod, f family) string {
	for _, c := range s.claimants {
		if slices.Contains(c.families, f) && s.listed(c.name, p) {
			return c.name
		}
	}
	if s.listed(egress.Unselected, p) {
		return egress.Unselected
	}
	return ""
}

// pair is two egresses that select the same pods.
type pair struct{ loser, winner string }

// loss is how many pods a loser does not get, and the first of them by name.
type loss struct {
	pods    int
	example string
}

func (l loss) plus(o loss) loss {
	if l.example == "" || o.example < l.example {
		l.example = o.example
	}
	l.pods += o.pods
	return l
}

// overlaps says of each egress that loses pods which ones, and to whom.
func (s *selection) overlaps() map[string]string {
	total := map[pair]loss{}
	for _, lost := range s.losses {
		for between, l := range lost {
			total[between] = total[between].plus(l)
		}
	}
	byLoser := map[string][]pair{}
	for between := range total {
		byLoser[between.loser] = append(byLoser[between.loser], between)
	}
	out := map[string]string{}
	for loser, pairs := range byLoser {
		slices.SortFunc(pairs, func(a, b pair) int { return cmp.Compare(a.winner, b.winner) })
		var said []string
		for _, between := range pairs[:min(len(pairs), maxNamed)] {
			what := "pod " + total[between].example + " is"
			if n := total[between].pods; n > 1 {
				what = fmt.Sprintf("%d pods, such as %s, are", n, total[between].example)
			}
			said = append(said, fmt.Sprintf("%s selected by egress %s too, which comes first", what, between.winner))
		}
		if more := len(pairs) - len(said); more > 0 {
			said = append(said, fmt.Sprintf("and %d more egresses have pods of it", more))
		}
		out[loser] = strings.Join(said, "; ")
	}
	return out
}

// group divides the pods of one node among the egresses. owns reports whether an IP that a pod lists is the pod's.
func (s *selection) group(node string, pods []pod, owns func(pod, netip.Addr) bool) map[string]egress.Members {
	ips := map[string]map[string][]netip.Addr{} // egress -> pod -> IPs
	lost := map[pair]loss{}
	for _, p := range pods {
		pairs := map[pair]bool{} // a pod is lost once, not once for each family
		for _, ip := range p.ips {
			if !owns(p, ip) {
				continue
			}
			name, losers := s.owner(p, familyOf(ip))
			if name == "" {
				continue
			}
			for _, loser := range losers {
				pairs[pair{loser, name}] = true
			}
			if ips[name] == nil {
				ips[name] = map[string][]netip.Addr{}
			}
			ips[name][p.name] = append(ips[name][p.name], ip)
		}
		for between := range pairs {
			lost[between] = lost[between].plus(loss{1, p.name})
		}
	}
	s.losses[node] = lost
	if len(lost) == 0 {
		delete(s.losses, node)
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
