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
	// Peers are the other nodes: each has an FDB entry. Order and duplicates are of no meaning. A peer whose underlay
	// address is of another family than Overlay.Local cannot be reached, and is left out.
	Peers []Peer
	// Subnets are the ways out of this node other than by the main table. Their marks differ.
	Subnets []Subnet
	// Forwarded are the egress IPs of which other nodes have blocks of ports: what comes from outside for those is
	// routed by egress.ToNodeMark into the overlay, as what is for an egress.OverlaySource is, and by
	// egress.ToGatewayMark whatever this node's pods send to another gateway. Which node it goes to is not said by the
	// route: all of it has one next hop, whose MAC address the frames get is nobody's.
	Forwarded []netip.Addr
	// Sources are addresses of the node, other than those, one of each family, that ICMP errors about their packets
	// come from: the kernel would take the egress IP itself, or the overlay's address.
	Sources []netip.Addr
	// Addresses are the egress IPs that are addresses of the node, with the link that they are on: local for what
	// others send to them without a mark. The kernel's own route of that, which it makes with the address and looks at
	// before all marks, goes.
	Addresses map[netip.Addr]string
	// Pods are the addresses of this node's own pods, and maybe of others: no table for a mark leads elsewhere with
	// them. What the kernel itself sends to them may have the mark of what it answers (fwmark_reflect), and where it
	// looks whether a packet comes in where its source is, it may do so with the packet's mark (src_valid_mark).
	Pods []netip.Prefix
	// Keep keeps everything that is not in the State: a record could not be read, and an error never causes a delete.
	Keep bool
}

// Overlay is the overlay link of this node; all that is not here follows from Local or is the same on all nodes.
type Overlay struct {
	// Local is the node's underlay address: the source of what is sent to peers.
	Local netip.Addr
	// MTU is the uplink's without the bytes of the encapsulation: 50 over IPv4, 70 over IPv6. 0 leaves it to the
	// kernel.
	MTU int
}

// Peer is another node.
type Peer struct {
	Node     string // for people only
	Underlay netip.Addr
}

// Subnet sends the packets of one family that carry Mark out by a link that is there, or is about to be: to addresses
// of Prefix directly, to all others by Gateway. What cannot go that way goes nowhere.
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
	// overlaySources hold every egress.OverlaySource of the family.
	overlaySources netip.Prefix
	// metric is what the kernel takes when a route names none: 0 for IPv4, IP6_RT_PRIO_USER for IPv6
	// (uapi/linux/ipv6_route.h).
	metric int
	// off is the file that says whether new links are without the family; a kernel that does not know the family has no
	// such file. It follows net.ipv6.conf.all.disable_ipv6. "" when the family is always on.
	off string
}

var families = []family{
	{af: unix.AF_INET, option: "-4", any: netip.PrefixFrom(netip.IPv4Unspecified(), 0), overlaySources: egress.OverlaySources4},
	{af: unix.AF_INET6, option: "-6", any: netip.PrefixFrom(netip.IPv6Unspecified(), 0), overlaySources: egress.OverlaySources6, metric: 1024,
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

// noIPv4 is the address of an overlay link whose underlay is IPv6: a link without any IPv4 address drops every IPv4
// packet as soon as rp_filter is not 0. It is the dummy address of nodes that have no other (RFC 7600, section 4.8).
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
	for _, p := range s.Peers {
		if s.reaches(p) {
			es = append(es, fdbEntry(egress.OverlayMAC(p.Underlay), p.Underlay, netlink.NUD_PERMANENT))
		}
	}
	return es
}

// familyEntries returns what every family has.
func (s State) familyEntries(f family) []entry {
	closed := newRule(f, egress.ClosePriority, egress.IDBit, egress.IDBit)
	closed.IifName, closed.Table = egress.OverlayLink, egress.ClosedTable
	guard := newRule(f, egress.GuardPriority, 0, egress.RuleMask)
	guard.Goto = egress.LastPriority
	others := newRule(f, egress.OthersPriority, 0, egress.RoutingBit)
	others.Goto = egress.LastPriority
	toGateway := newRule(f, egress.ExitPriority, egress.ToGatewayMark, egress.RuleMask)
	toGateway.Table = egress.ToGatewayMark.Table()
	toNode := newRule(f, egress.LastPriority, egress.ToNodeMark, egress.RuleMask)
	toNode.Table = egress.ToNodeMark.Table()
	// Whatever the mark: the kernel looks for the way back to a packet's source without one, and answers with that of
	// what it answers (fwmark_reflect).
	sources := newRule(f, egress.SelfPriority, 0, 0)
	sources.Dst, sources.Table = ipNet(f.overlaySources), toNode.Table
	self, local := newRule(f, egress.SelfPriority, 0, egress.RoutingBit), newRule(f, egress.AddressPriority, 0, egress.RoutingBit)
	self.IifName, self.Table, local.Table = loopback, toNode.Table, egress.AddressTable
	es := []entry{addressEntry(f, f.address(s.Overlay.Local), egress.OverlayLink), ruleEntry(f, closed), ruleEntry(f, guard), ruleEntry(f, others),
		ruleEntry(f, toGateway), ruleEntry(f, toNode), ruleEntry(f, sources),
		routeEntry(f, noRoute(f, unix.RTN_BLACKHOLE, egress.ClosedTable, f.any, lastMetric), ""),
		neighbourEntry(f, f.anyNode(), nobody, netlink.NUD_PERMANENT),
		routeEntry(f, routeVia(f, toGateway.Table, f.any, f.anyNode()), egress.OverlayLink)}
	toNodes := []netip.Prefix{f.overlaySources}
	for _, ip := range s.Forwarded {
		if f.has(ip) {
			toNodes = append(toNodes, netip.PrefixFrom(ip, ip.BitLen()))
		}
	}
	for _, dst := range toNodes {
		r := routeVia(f, toNode.Table, dst, f.anyNode())
		if i := slices.IndexFunc(s.Sources, f.has); i >= 0 {
			r.Src = s.Sources[i].AsSlice()
		}
		es = append(es, routeEntry(f, r, egress.OverlayLink))
	}
	es = append(append(es, s.podsElsewhere(f, toGateway.Table)...), s.podsElsewhere(f, toNode.Table)...)
	for ip := range s.Addresses {
		if f.has(ip) {
			es = append(es, ruleEntry(f, self), ruleEntry(f, local), routeEntry(f, localRoute(f, egress.AddressTable, ip), loopback))
		}
	}
	for _, subnet := range s.Subnets {
		if !f.has(subnet.Gateway) {
			continue
		}
		r := newRule(f, egress.ExitPriority, subnet.Mark, egress.RuleMask)
		r.Table = subnet.Mark.Table()
		es = append(es, ruleEntry(f, r), routeEntry(f, onLink(f, r.Table, subnet.Prefix), subnet.Link),
			routeEntry(f, viaGateway(f, r.Table, subnet.Gateway), subnet.Link),
			routeEntry(f, noRoute(f, unix.RTN_UNREACHABLE, r.Table, f.any, lastMetric), ""))
		es = append(es, s.podsElsewhere(f, r.Table)...)
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

// reaches reports whether the overlay can carry packets to the peer.
func (s State) reaches(p Peer) bool {
	return p.Underlay.IsValid() && p.Underlay.Is4() == s.Overlay.Local.Is4()
}
