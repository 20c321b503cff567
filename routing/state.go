package routing

import (
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// State is what the kernel has to hold.
type State struct {
	// Overlay is this node's end. With the zero Overlay there is none, and everything of ours is removed.
	Overlay Overlay
	// Peers are the other nodes: each has a permanent neighbour entry per family, and an FDB entry. Order and duplicates are of no
	// meaning. A peer whose underlay address is of another family than Overlay.Local cannot be reached, and is left out.
	Peers []Peer
	// NextHops are the gateways in use: each has a rule and a table per family. Every Via has to be the underlay address of a peer, or this
	// node's own: through the loop.
	NextHops []NextHop
	// Subnets are the ways out of this node other than by the main table. Their marks differ.
	Subnets []Subnet
	// Forwarded are the egress IPs of which other nodes have blocks of ports: what comes from outside for those is routed by egress.ToNodeMark
	// into the overlay, and so is, by egress.ToGatewayMark, whatever this node's pods send with a block of its own. Which node it goes to is
	// not said by the route: all of it has one next hop, whose MAC address the frames get is nobody's.
	Forwarded []netip.Addr
	// Sources are addresses of the node, other than those, one of each family, that ICMP errors about their packets come from: the kernel would
	// take the egress IP itself, or the overlay's address.
	Sources []netip.Addr
	// Addresses are the egress IPs that are addresses of the node, with the link that they are on: local for what others send to them without a
	// mark. The kernel's own route of that, which it makes with the address and looks at before all marks, goes.
	Addresses map[netip.Addr]string
	// Returns maps the IP of a pod to the underlay address of its node, which has to be a peer, or this node.
	Returns map[netip.Addr]netip.Addr
	// Pods are the addresses of this node's own pods, and maybe of others: no next hop leads there. What the kernel itself sends to them may have the mark of what it
	// answers (fwmark_reflect), and where it looks whether a packet comes in where its source is, it may do so with the packet's mark
	// (src_valid_mark).
	Pods []netip.Prefix
	// KeepReturns keeps the routes of Returns that are not in it: not all of them are known yet, and what is not known is never
	// deleted.
	KeepReturns bool
	// Keep keeps everything that is not in the State: a record could not be read, and an error never causes a delete.
	Keep bool
}

// Overlay is the overlay link and the loop of this node; all that is not here follows from Local or is the same on all nodes.
type Overlay struct {
	// Local is the node's underlay address: the source of what is sent to peers.
	Local netip.Addr
	// MTU is the uplink's without the bytes of the encapsulation: 50 over IPv4, 70 over IPv6. The loop has the same, so that a connection
	// finds no smaller one when its gateway moves. 0 leaves it to the kernel.
	MTU int
}

// Peer is another node.
type Peer struct {
	Node     string // for people only
	Underlay netip.Addr
}

// NextHop sends the packets that carry Mark to the node with the underlay address Via.
type NextHop struct {
	Mark egress.Mark
	Via  netip.Addr
}

// Subnet sends the packets of one family that carry Mark out by a link that is there, or is about to be: to addresses of Prefix directly, to
// all others by Gateway. What cannot go that way goes nowhere.
type Subnet struct {
	Mark    egress.Mark
	Link    string
	Prefix  netip.Prefix
	Gateway netip.Addr
}

// family is an IP family, as this package needs it.
type family struct {
	af     int
	option string // of ip(8)
	any    netip.Prefix
	// metric is what the kernel takes when a route names none: 0 for IPv4, IP6_RT_PRIO_USER for IPv6 (uapi/linux/ipv6_route.h).
	metric int
	// off is the file that says whether new links are without the family; a kernel that does not know the family has no such file.
	// It follows net.ipv6.conf.all.disable_ipv6. "" when the family is always on.
	off string
}

var families = []family{
	{af: unix.AF_INET, option: "-4", any: netip.PrefixFrom(netip.IPv4Unspecified(), 0)},
	{af: unix.AF_INET6, option: "-6", any: netip.PrefixFrom(netip.IPv6Unspecified(), 0), metric: 1024,
		off: "/proc/sys/net/ipv6/conf/default/disable_ipv6"},
}

// familyOf returns the family of an address; the zero family for the zero Addr.
func familyOf(ip netip.Addr) family {
	for _, f := range families {
		if f.has(ip) {
			return f
		}
	}
	return family{}
}

// has reports whether ip is of the family.
func (f family) has(ip netip.Addr) bool { return ip.BitLen() == f.any.Addr().BitLen() }

// support reports whether the kernel knows the family, and whether the operator has it on.
func (f family) support() (known, on bool) {
	if f.off == "" {
		return true, true
	}
	b, err := os.ReadFile(f.off)
	return err == nil, err == nil && strings.TrimSpace(string(b)) == "0"
}

// gateway returns the next hop of the family's packets toward the node with the given underlay address: that address itself for IPv4
// over IPv4, else the node's IPv6 link-local address on the overlay (for IPv4 packets: RTA_VIA, RFC 5549, Linux 5.2).
func (f family) gateway(underlay netip.Addr) netip.Addr {
	if f.af == unix.AF_INET && underlay.Is4() {
		return underlay
	}
	return egress.OverlayLinkLocal(underlay)
}

// noIPv4 is the address of an overlay link whose underlay is IPv6, and of the loop: a link without any IPv4 address drops every IPv4 packet as soon as
// rp_filter is not 0. It is the dummy address of nodes that have no other (RFC 7600, section 4.8).
var noIPv4 = netip.AddrFrom4([4]byte{192, 0, 0, 8})

// address returns the address of the family on the overlay link of the node with the given underlay address.
func (f family) address(local netip.Addr) netip.Prefix {
	switch {
	case f.af == unix.AF_INET6:
		return netip.PrefixFrom(egress.OverlayLinkLocal(local), 64)
	case local.Is4():
		return netip.PrefixFrom(local, 32)
	default:
		return netip.PrefixFrom(noIPv4, 32)
	}
}

// entries returns what the state has on and beside the overlay link, in no order, without the families that are off.
func (s State) entries(off map[int]bool) []entry {
	if !s.Overlay.Local.IsValid() {
		return nil
	}
	var es []entry
	for _, f := range families {
		if !off[f.af] {
			es = append(es, s.familyEntries(f)...)
		}
	}
	for pod, via := range s.Returns {
		if f := familyOf(pod); f.af != 0 && !off[f.af] {
			es = append(es, s.toNode(f, egress.ReturnTable, netip.PrefixFrom(pod, pod.BitLen()), via))
		}
	}
	for _, p := range s.Peers {
		if s.reaches(p) {
			es = append(es, fdbEntry(egress.OverlayMAC(p.Underlay), p.Underlay, netlink.NUD_PERMANENT))
		}
	}
	return es
}

// familyEntries returns what every family has.
func (s State) familyEntries(f family) []entry {
	guard := newRule(f, egress.GuardPriority, 0, egress.MarkMask)
	guard.Goto = egress.ReturnPriority
	others := newRule(f, egress.OthersPriority, 0, egress.RoutingBit)
	others.Goto = egress.ReturnPriority
	back := newRule(f, egress.ReturnPriority, egress.ReturnMark, egress.MarkMask)
	back.Table = egress.ReturnTable
	es := []entry{addressEntry(f, f.address(s.Overlay.Local), egress.OverlayLink), ruleEntry(f, guard), ruleEntry(f, others), ruleEntry(f, back),
		routeEntry(f, noRoute(f, unix.RTN_BLACKHOLE, egress.ClosedTable, f.any, lastMetric), "")}
	for _, link := range []string{egress.OverlayLink, egress.LoopIn} {
		r := newRule(f, egress.ClosePriority, 0, egress.RoutingBit)
		r.IifName, r.Table = link, egress.ClosedTable
		es = append(es, ruleEntry(f, r))
	}
	if f.af == unix.AF_INET {
		es = append(es, addressEntry(f, netip.PrefixFrom(noIPv4, 32), egress.LoopIn))
	}
	es = append(es, neighbourEntry(f, f.anyNode(), nobody, netlink.NUD_PERMANENT))
	for _, m := range []egress.Mark{egress.ToGatewayMark, egress.ToNodeMark} {
		r := newRule(f, egress.NextHopPriority, m, egress.MarkMask)
		r.Table = m.Table()
		es = append(es, ruleEntry(f, r))
	}
	es = append(es, routeEntry(f, routeVia(f, egress.ToGatewayMark.Table(), f.any, f.anyNode()), egress.OverlayLink))
	es = append(es, s.podsElsewhere(f, egress.ToGatewayMark.Table())...)
	for _, ip := range s.Forwarded {
		if f.has(ip) {
			r := routeVia(f, egress.ToNodeMark.Table(), netip.PrefixFrom(ip, ip.BitLen()), f.anyNode())
			if i := slices.IndexFunc(s.Sources, f.has); i >= 0 {
				r.Src = s.Sources[i].AsSlice()
			}
			es = append(es, routeEntry(f, r, egress.OverlayLink))
		}
	}
	self, local := newRule(f, egress.SelfPriority, 0, egress.RoutingBit), newRule(f, egress.AddressPriority, 0, egress.RoutingBit)
	self.IifName, self.Table, local.Table = loopback, egress.ToNodeMark.Table(), egress.AddressTable
	for ip := range s.Addresses {
		if f.has(ip) {
			es = append(es, ruleEntry(f, self), ruleEntry(f, local), routeEntry(f, localRoute(f, egress.AddressTable, ip), loopback))
		}
	}
	for _, h := range s.NextHops {
		r := newRule(f, egress.NextHopPriority, h.Mark, egress.MarkMask)
		r.Table = h.Mark.Table()
		es = append(es, ruleEntry(f, r), s.toNode(f, r.Table, f.any, h.Via))
		es = append(es, s.podsElsewhere(f, r.Table)...)
	}
	for _, s := range s.Subnets {
		if !f.has(s.Gateway) {
			continue
		}
		r := newRule(f, egress.NextHopPriority, s.Mark, egress.MarkMask)
		r.Table = s.Mark.Table()
		es = append(es, ruleEntry(f, r), routeEntry(f, onLink(f, r.Table, s.Prefix), s.Link),
			routeEntry(f, viaGateway(f, r.Table, s.Gateway), s.Link), routeEntry(f, noRoute(f, unix.RTN_UNREACHABLE, r.Table, f.any, lastMetric), ""))
	}
	for _, p := range s.Peers {
		// With an IPv6 underlay, IPv4 packets need the link-local neighbours only.
		if gw := f.gateway(p.Underlay); s.reaches(p) && f.has(gw) {
			es = append(es, neighbourEntry(f, gw, egress.OverlayMAC(p.Underlay), netlink.NUD_PERMANENT))
		}
	}
	return es
}

// podsElsewhere returns what ends a table for the addresses of the node's own pods.
func (s State) podsElsewhere(f family, table int) (es []entry) {
	for _, p := range s.Pods {
		if f.has(p.Addr()) {
			es = append(es, routeEntry(f, noRoute(f, unix.RTN_THROW, table, p, f.metric), ""))
		}
	}
	return es
}

// toNode returns the route to the node with the given underlay address: over the overlay, or through the loop when it is this node.
func (s State) toNode(f family, table int, dst netip.Prefix, underlay netip.Addr) entry {
	if underlay == s.Overlay.Local {
		return routeEntry(f, routeVia(f, table, dst, f.loopGateway()), egress.LoopOut)
	}
	return routeEntry(f, newRoute(f, table, dst, underlay), egress.OverlayLink)
}

// reaches reports whether the overlay can carry packets to the peer.
func (s State) reaches(p Peer) bool {
	return p.Underlay.IsValid() && p.Underlay.Is4() == s.Overlay.Local.Is4()
}
