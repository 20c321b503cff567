package operator

import (
	"fmt"
	"net/netip"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/store"
)

// leastIPv6MTU is the smallest MTU of a link that carries IPv6 (RFC 8200, section 5).
const leastIPv6MTU = 1280

// next is a next hop of a node, as its agent told it.
type next struct {
	egress.Hop
	node string // whose it is
	whom string // what Hop.To is, as "of node-2"
	hint string // what may be at fault where nobody answers; "": nothing is known
}

// step adds what is told of a next hop, and reports whether packets leave by it.
func (n next) step(what string, step adds) bool {
	ask := "NDP"
	if n.Via.Is4() {
		ask = "ARP"
	}
	whom := n.whom
	if n.Via != n.To {
		whom = "the router to " + n.To.String() + ", " + n.whom
	}
	silent := fmt.Sprintf("%s, %s, does not answer %s on link %s of %s, whose neighbour entry is %s%s", n.Via, whom, ask, n.Link, n.node, n.Neighbour, n.hint)
	switch {
	case n.Fault != "":
		step(what, stops, "%s has no route to %s, %s: %s", n.node, n.To, n.whom, n.Fault)
	case n.Down != "":
		step(what, stops, "link %s of %s, by which it sends to %s, %s, is %s", n.Link, n.node, n.To, n.whom, n.Down)
	case n.Silent && n.GaveUp():
		step(what, stops, "%s", silent)
	case n.Silent:
		step(what, doubts, "%s", silent)
	default:
		known := ""
		if n.Neighbour != "" {
			known = ", whose neighbour entry is " + n.Neighbour
		}
		step(what, "", "%s sends to %s, %s, by link %s of MTU %d%s", n.node, n.Via, whom, n.Link, n.MTU, known)
		return true
	}
	return false
}

// overlay adds what the kernels tell of the way between the pod's node and the gateway, in both directions.
func (k kernels) overlay(w store.Whole, pod netip.Addr, home, gateway string, step adds) {
	for _, d := range [][2]string{{home, gateway}, {gateway, home}} {
		from, to := d[0], d[1]
		have := k.said[from].Path
		if have.Unread != "" {
			step("tunnel", "", "the next hops of %s are not all known: %s", from, have.Unread)
		}
		if have.Diverted != "" && from == home {
			step("tunnel", stops, "%s sends what is for %s %s: an ip rule or a route of another program comes before Egret's", from, to, have.Diverted)
		}
		if have.Overlay == nil {
			continue
		}
		n := next{Hop: *have.Overlay, node: from, whom: "the underlay address of " + to}
		if n.Fault != "" && !n.To.IsValid() {
			step("tunnel", stops, "%s cannot send to %s: %s", from, to, n.Fault)
			continue
		}
		if n.step("tunnel", step) {
			k.fits(pod, from, to, step)
		}
	}
}

// fits adds what is too large for the way of a pod's packets in the overlay, from a node to another.
func (k kernels) fits(pod netip.Addr, from, to string, step adds) {
	sender, receiver := k.said[from].Path, k.said[to].Path
	most, overhead := sender.OverlayMTU, egress.OverlayOverhead(sender.Overlay.To)
	small := func(node string, h *egress.Hop) bool {
		if h == nil || h.Link == "" || most+overhead <= h.MTU {
			return false
		}
		step("tunnel", doubts, "the MTU is too small: %s puts packets of up to %d bytes into the overlay, which adds %d, and link %s of %s takes %d: "+
			"larger packets are lost", from, most, overhead, h.Link, node, h.MTU)
		return true
	}
	switch {
	case most == 0: // told by what the kernel lacks
	case pod.Is6() && most < leastIPv6MTU:
		step("tunnel", stops, "the MTU is too small: the overlay of %s takes %d bytes, and IPv6 needs %d", from, most, leastIPv6MTU)
	case small(from, sender.Overlay), small(to, receiver.Overlay):
	case sender.PodMTU > 0:
		step("tunnel", "", "the pod's link takes %d bytes, the overlay of %s %d", sender.PodMTU, from, most)
	}
}

// exit adds what the kernel of the gateway tells of the way out.
func (k kernels) exit(w store.Whole, a egress.Address, gateway string, step adds) {
	have := k.said[gateway].Path
	if have.Diverted != "" && have.Exit != nil {
		step("way out", stops, "%s sends what leaves %s: an ip rule or a route of another program comes before Egret's", gateway, have.Diverted)
		return
	}
	h := have.Exit
	if h == nil {
		return
	}
	n := next{Hop: *h, node: gateway, whom: "the way out"}
	if s := w.Pools[a.Pool].Subnet; a.Pool != "" && s != nil {
		if h.To == s.Gateway {
			n.whom = "the gateway of " + s.Prefix().String()
		}
		if s.VLAN != 0 {
			n.hint = fmt.Sprintf(": VLAN %d of the switch may not reach %s", s.VLAN, gateway)
		}
	}
	n.step("way out", step)
}
