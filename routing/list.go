package routing

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// String returns what there is, a line for each link, address, neighbour, FDB entry, route and rule, in the words of
// ip(8) and bridge(8).
func (o Observed) String() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(o.links)) {
		if l := o.links[name]; l.exists() {
			fmt.Fprintf(&b, "ip link %s %s mtu %d address %s up %t # rp_filter %d, accept_local %d\n", name, l.made, l.mtu, l.mac, l.up, l.rpFilter, l.acceptLocal)
		}
	}
	for _, e := range sorted(o.entries) {
		fmt.Fprintln(&b, e.key())
	}
	for _, name := range slices.Sorted(maps.Keys(o.filters)) {
		fmt.Fprintf(&b, "net.ipv4.conf.%s.rp_filter = %d\n", name, o.filters[name])
	}
	return b.String()
}
