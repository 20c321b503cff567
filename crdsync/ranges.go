package crdsync

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// ranges return what pods/<node> has to be; nil: there is to be no record. They are the pods' very addresses: in a
// cluster whose pods have addresses of the network around them, the next one may be a database, to which an egress
// applies.
func (m *mirror) ranges(node string, pods []pod) any {
	if node == egress.AllNodes {
		if len(m.clusterCIDRs) == 0 {
			return nil
		}
		return egress.PodRanges{Node: node, CIDRs: m.clusterCIDRs}
	}
	n, exists := m.nodes[node]
	known := slices.Concat(n.PodCIDRs, m.clusterCIDRs)
	var addrs []netip.Addr
	for _, p := range pods {
		for _, ip := range p.ips {
			// Who may write the status of a pod may write anything there.
			if ip.IsGlobalUnicast() && !slices.ContainsFunc(known, func(c netip.Prefix) bool { return c.Contains(ip) }) {
				addrs = append(addrs, ip)
			}
		}
	}
	if len(addrs) == 0 && (!exists || len(n.PodCIDRs) > 0) {
		return nil
	}
	return egress.PodRanges{Node: node, CIDRs: cover(addrs)}
}

// rangeDifference returns what makes the record of a node's ranges that of its pods.
func (m *mirror) rangeDifference(now view, node string, pods []pod) ([]unit, error) {
	op, ok, err := difference(now, store.PodKey(node), m.ranges(node, pods))
	if !ok {
		return nil, err
	}
	return []unit{{op}}, err
}

// nodesWithRanges returns all names that may have a record of ranges, or have to have one.
func (m *mirror) nodesWithRanges() []string {
	return append(slices.Collect(maps.Keys(m.nodes)), listedRanges(m.cache)...)
}

// listedRanges returns all names that may have a record of ranges in etcd.
func listedRanges(cache *store.Cache) []string {
	out := []string{egress.AllNodes}
	for key := range cache.List(store.PodPrefix) {
		out = append(out, strings.TrimPrefix(key, store.PodPrefix))
	}
	return out
}

// nodesChanged takes in the nodes as they are now, and adds those whose pod CIDRs are others.
func (m *mirror) nodesChanged(w *work) {
	before := m.nodes
	m.nodes = map[string]egress.Node{}
	for _, n := range m.objects.nodes {
		m.nodes[n.Name] = n
		if old, ok := before[n.Name]; !ok || !slices.Equal(old.PodCIDRs, n.PodCIDRs) {
			w.addPods(n.Name)
		}
		delete(before, n.Name)
	}
	for gone := range before {
		w.addPods(gone)
	}
}

// cover returns the fewest prefixes that hold the addresses and no others, sorted.
func cover(addrs []netip.Addr) []netip.Prefix {
	out := []netip.Prefix{} // in JSON [], not null
	slices.SortFunc(addrs, netip.Addr.Compare)
	for _, a := range slices.Compact(addrs) {
		p := netip.PrefixFrom(a, a.BitLen())
		for n := len(out) - 1; n >= 0; n-- { // two halves are one
			whole := netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
			if out[n].Bits() != p.Bits() || !whole.Contains(out[n].Addr()) {
				break
			}
			p, out = whole, out[:n]
		}
		out = append(out, p)
	}
	return out
}
