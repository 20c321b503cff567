package operator

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// podAt is an address of a pod on a node, and the egress that has it.
type podAt struct {
	node   string
	ip     netip.Addr
	egress string   // or egress.Unselected
	also   []string // egress.Member.Also
}

// selected reports whether an egress has the address.
func (p podAt) selected() bool { return p.egress != egress.Unselected }

// same reports whether an egress has the same address, on the same node.
func (p podAt) same(o podAt) bool { return p.node == o.node && p.ip == o.ip && p.egress == o.egress }

// find returns the addresses of a pod, by egress; none: there is no such pod. While it changes its node, two have it.
func find(w store.Whole, pod string) (list []podAt) {
	look := func(m egress.Members) {
		for _, p := range m.Pods {
			if p.Pod != pod {
				continue
			}
			for _, ip := range p.IPs {
				list = append(list, podAt{m.Node, ip, m.Egress, p.Also})
			}
		}
	}
	for _, nodes := range w.ByEgress {
		for _, m := range nodes {
			look(m)
		}
	}
	for _, m := range w.Unselected {
		look(m)
	}
	slices.SortFunc(list, func(a, b podAt) int {
		return cmp.Or(cmp.Compare(a.egress, b.egress), a.ip.Compare(b.ip), cmp.Compare(a.node, b.node))
	})
	return list
}

// places says which addresses a pod has, and where.
func places(list []podAt) string {
	on := map[string][]netip.Addr{}
	for _, p := range list {
		on[p.node] = append(on[p.node], p.ip)
	}
	var texts []string
	for _, node := range slices.Sorted(maps.Keys(on)) {
		ips := slices.SortedFunc(slices.Values(on[node]), netip.Addr.Compare)
		texts = append(texts, join(slices.Compact(ips))+" on "+node)
	}
	return strings.Join(texts, " and ")
}
