package crdsync

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/egret-project/egret/egress"
)

// selector is an appliedTo: a pod is selected when both match.
type selector struct {
	namespaces, pods labels.Selector
}

// pod is what is used of a pod that an egress can select.
type pod struct {
	name      string // namespace/name
	namespace string
	node      string
	labels    labelSet
	ips       []netip.Addr // sorted
	created   time.Time
	ending    bool // it is being deleted
}

// readPod reads a pod. ok is false for one that no egress can select: it shares its node's network, has no IP or no
// node yet, or has ended. One that is being deleted can be selected until it has ended: it may still send.
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
		name: p.Namespace + "/" + p.Name, namespace: p.Namespace, node: p.Spec.NodeName, labels: newLabelSet(p.Labels),
		ips: slices.Compact(ips), created: p.CreationTimestamp.UTC(), ending: p.DeletionTimestamp != nil,
	}
	return out, len(ips) > 0
}

// holder returns the pod that an IP belongs to among all that list it: the IP was given anew. One that is being deleted
// has lost it to one that is not, and the older to the newer.
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
	applied  selector
	// frozen takes the place of a selector that cannot be read: whether the pod is one that the egress has.
	frozen func(pod) bool
}

// selection says which egress a pod belongs to.
type selection struct {
	claimants  []claimant                          // in order of precedence
	namespaces func(string) (labels.Set, bool)     // the labels of a namespace; false: it is not seen yet
	listed     func(egressName string, p pod) bool // whether etcd lists a pod as one of an egress
	index      index                               // of the claimants, by their namespaceSelectors
	// namespace -> those that may select pods of it, by their podSelectors; filled as needed
	candidates map[string]index
	// namespace -> results of owner, so that a pod's event evaluates no egress for other pods
	known  map[string]map[labelFamily]known
	unseen map[string]bool          // namespaces of whose pods owner was asked before they were seen
	losses map[string]map[pair]loss // node -> pods there that several egresses select; filled by group
}

// labelFamily is all of a pod, beside its namespace, that the result of owner depends on: those of a Deployment share
// one.
type labelFamily struct {
	labels labelSet
	family family
}

// maxKnown is how many results are kept of a namespace: those of Jobs have labels of their own, and come and go.
const maxKnown = 20_000

// known is a result of owner.
type known struct {
	owner  string
	losers []string
}

func newSelection(claimants []claimant, namespaces func(string) (labels.Set, bool), listed func(string, pod) bool) *selection {
	s := &selection{
		claimants: claimants, namespaces: namespaces, listed: listed, candidates: map[string]index{}, known: map[string]map[labelFamily]known{},
		unseen: map[string]bool{}, losses: map[string]map[pair]loss{},
	}
	all := map[int]labels.Selector{}
	for i, c := range claimants {
		all[i] = c.applied.namespaces
		if c.frozen != nil {
			all[i] = labels.Everything()
		}
	}
	s.index = newIndex(all)
	return s
}

// owner returns the egress that an IP of a pod belongs to: the first that selects the pod and takes IPs of the family;
// else egress.Unselected. losers are the others that select it. While the namespace is not known, it is the egress that
// etcd has for the pod; "" for none.
func (s *selection) owner(p pod, f family) (name string, losers []string) {
	if k, ok := s.known[p.namespace][labelFamily{p.labels, f}]; ok {
		return k.owner, k.losers
	}
	candidates, seen := s.candidatesOf(p.namespace)
	if !seen {
		s.unseen[p.namespace] = true
		return s.former(p, f), nil
	}
	certain, set := true, p.labels.set()
	for _, i := range candidates.mayMatch(set) {
		c := s.claimants[i]
		if !slices.Contains(c.families, f) {
			continue
		}
		certain = certain && c.frozen == nil // what etcd has may be another thing the next time
		switch selected := c.frozen != nil && c.frozen(p) || c.frozen == nil && c.applied.pods.Matches(set); {
		case !selected:
		case name == "":
			name = c.name
		default:
			losers = append(losers, c.name)
		}
	}
	name = cmp.Or(name, egress.Unselected)
	if certain {
		if s.known[p.namespace] == nil || len(s.known[p.namespace]) >= maxKnown {
			s.known[p.namespace] = map[labelFamily]known{}
		}
		s.known[p.namespace][labelFamily{p.labels, f}] = known{name, losers}
	}
	return name, losers
}

// relabelled takes in the labels that a namespace has now, and returns the nodes of its pods that get another egress by
// them.
func (s *selection) relabelled(namespace string, pods []pod) (nodes []string) {
	before := s.known[namespace]
	if s.unseen[namespace] { // a pod has what it had before, and another one with its labels may have a result since
		before = nil
	}
	delete(s.unseen, namespace)
	delete(s.known, namespace)
	delete(s.candidates, namespace)
	for _, p := range pods {
		for _, ip := range p.ips {
			k, ok := before[labelFamily{p.labels, familyOf(ip)}]
			if name, losers := s.owner(p, familyOf(ip)); !ok || name != k.owner || !slices.Equal(losers, k.losers) {
				nodes = append(nodes, p.node)
			}
		}
	}
	return nodes
}

// candidatesOf returns those that may select pods of a namespace; false while it is not seen.
func (s *selection) candidatesOf(namespace string) (index, bool) {
	if x, ok := s.candidates[namespace]; ok {
		return x, true
	}
	set, seen := s.namespaces(namespace)
	if !seen {
		return index{}, false
	}
	found := map[int]labels.Selector{}
	for _, i := range s.index.mayMatch(set) {
		switch c := s.claimants[i]; {
		case c.frozen != nil:
			found[i] = labels.Everything()
		case c.applied.namespaces.Matches(set):
			found[i] = c.applied.pods
		}
	}
	x := newIndex(found)
	s.candidates[namespace] = x
	return x, true
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
				what = fmt.Sprintf("%s pods, such as %s, are", roughly(n), total[between].example)
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

// roughly returns a number above 9 as the power of ten below: the status is not written anew with each pod that comes
// or goes.
func roughly(n int) string {
	if n < 10 {
		return strconv.Itoa(n)
	}
	power := 10
	for power <= n/10 {
		power *= 10
	}
	return fmt.Sprintf("%d or more", power)
}

// group divides the pods of one node among the egresses. owns reports whether an IP that a pod lists is the pod's.
func (s *selection) group(node string, pods []pod, owns func(pod, netip.Addr) bool) map[string]egress.Members {
	members := map[string]map[string]*egress.Member{} // egress -> pod
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
			if members[name] == nil {
				members[name] = map[string]*egress.Member{}
			}
			m := members[name][p.name]
			if m == nil {
				m = &egress.Member{Pod: p.name}
				members[name][p.name] = m
			}
			m.IPs = append(m.IPs, ip)
			for _, loser := range losers {
				pairs[pair{loser, name}] = true
				if len(m.Also) < egress.MaxAlso && !slices.Contains(m.Also, loser) {
					m.Also = append(m.Also, loser)
				}
			}
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
	for name, byPod := range members {
		m := egress.Members{Egress: name, Node: node}
		for _, p := range byPod {
			m.Pods = append(m.Pods, *p)
		}
		slices.SortFunc(m.Pods, func(a, b egress.Member) int { return cmp.Compare(a.Pod, b.Pod) })
		out[name] = m
	}
	return out
}
