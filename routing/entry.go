package routing

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"reflect"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// kind orders entries: each needs only what is of a kind before its own.
type kind int

const (
	address kind = iota
	neighbour
	fdb
	route
	rule
)

// entry is one address, neighbour, FDB entry, route or rule of ours, wanted or observed.
type entry struct {
	kind
	command string // of ip(8) or bridge(8), without its verb
	words   string // what follows the verb: two entries are equal when command and words are
	// slot is what the kernel finds the entry by when it is to be deleted, if that is less than all of its words: where
	// an entry with the same slot is wanted, adding that one replaces this one.
	slot string
	// place is shared by routes that take each other's place: same table and destination.
	place string
	bound string      // the link of ours that it goes with
	local netip.Addr  // what the route makes local, whatever its table
	exit  egress.Mark // of the subnet that a route or rule is for; 0: it is for none
	add   func(w *writer, verb string) error
	del   func(w *writer) error
}

func (e entry) key() string { return e.command + " " + e.words }

// exitOf returns the mark of the subnet that a table is for; 0: it is for none.
func exitOf(table int) egress.Mark {
	if m := egress.RoutingBit + egress.Mark(table-egress.FirstTable); m.IsSubnet() {
		return m
	}
	return 0
}

// newRule returns the part that all rules of ours have in common.
func newRule(f family, priority int, mark, mask egress.Mark) netlink.Rule {
	r := netlink.NewRule()
	m := uint32(mask)
	r.Family, r.Priority, r.Mark, r.Mask, r.Protocol = f.af, priority, uint32(mark), &m, egress.RouteProtocol
	return *r
}

// ruleEntry returns the entry of any rule. What our own rules never have is in words, too, so that such a rule equals
// none of them.
func ruleEntry(f family, r netlink.Rule) entry {
	e := entry{kind: rule, command: "ip " + f.option + " rule", exit: exitOf(r.Table)}
	var mask uint32
	if r.Mask != nil {
		mask = *r.Mask
	}
	e.words = fmt.Sprintf("pref %d", r.Priority)
	plain := newRule(f, r.Priority, egress.Mark(r.Mark), egress.Mark(mask))
	plain.Protocol, plain.IifName, plain.Dst = r.Protocol, r.IifName, r.Dst
	if r.Dst != nil {
		e.words += " to " + prefixOf(r.Dst).String()
	}
	if r.IifName != "" {
		e.words += " iif " + r.IifName
	}
	if r.Mark|mask != 0 {
		e.words += fmt.Sprintf(" fwmark %s/%s", hex(r.Mark), hex(mask))
	} else {
		r.Mask, plain.Mask = nil, nil
	}
	if r.Goto >= 0 {
		e.words += fmt.Sprintf(" goto %d", r.Goto)
		plain.Goto = r.Goto
	} else {
		e.words += fmt.Sprintf(" lookup %d", r.Table)
	}
	plain.Table = r.Table
	e.words += fmt.Sprintf(" protocol %d", r.Protocol)
	if !reflect.DeepEqual(plain, r) {
		e.words += " # with more selectors: " + r.String()
	}
	e.add = func(w *writer, _ string) error { return w.handle.RuleAdd(&r) }
	e.del = func(w *writer) error { return w.handle.RuleDel(&r) }
	return e
}

// anyNode is the next hop on the overlay of what goes to a node that the route does not say: for IPv4 an end of tunnels
// (RFC 6333, section 5.7).
func (f family) anyNode() netip.Addr {
	if f.af == unix.AF_INET {
		return netip.AddrFrom4([4]byte{192, 0, 0, 2})
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: 2})
}

// nobody is the MAC address of no node: a frame that is sent to it goes nowhere.
var nobody = net.HardwareAddr{0x02, 0xe9, 0, 0, 0, 0}

// routeVia returns a route of ours by a next hop on a link whose subnets that is not of.
func routeVia(f family, table int, dst netip.Prefix, gateway netip.Addr) netlink.Route {
	r := netlink.Route{
		Family: f.af, Table: table, Dst: ipNet(dst), Type: unix.RTN_UNICAST, Protocol: egress.RouteProtocol, Priority: f.metric,
		Gw: gateway.AsSlice(),
	}
	if f.af == unix.AF_INET {
		r.Flags = int(netlink.FLAG_ONLINK)
	}
	return r
}

// loopback is the link of routes to the node itself.
const loopback = "lo"

// localRoute returns the route by which an address is the node's own.
func localRoute(f family, table int, ip netip.Addr) netlink.Route {
	r := netlink.Route{
		Family: f.af, Table: table, Dst: ipNet(netip.PrefixFrom(ip, ip.BitLen())), Type: unix.RTN_LOCAL, Protocol: egress.RouteProtocol,
		Priority: f.metric,
	}
	if f.af == unix.AF_INET {
		r.Scope = netlink.SCOPE_HOST
	}
	return r
}

// localAfter is within what time the kernel makes the local route of a new IPv6 address, which a worker of its does
// (linux: addrconf_dad_work).
const localAfter = 50 * time.Millisecond

// removeLocal removes the route that the kernel makes with an address. One that is about to be made is waited for:
// until it is gone, answers to the pods of other nodes end here.
func removeLocal(f family, ip netip.Addr, link string) op {
	r := localRoute(f, unix.RT_TABLE_LOCAL, ip)
	r.Protocol, r.Priority = 0, 0 // whatever they are
	return op{fmt.Sprintf("ip %s route del local %s dev %s table local", f.option, ip, link), func(w *writer) (err error) {
		if r.LinkIndex, err = w.index(link); err != nil {
			return absent(err)
		}
		for end := time.Now().Add(localAfter); ; time.Sleep(time.Millisecond) {
			if err = w.handle.RouteDel(&r); !errors.Is(err, unix.ESRCH) || f.af == unix.AF_INET || time.Now().After(end) {
				return absent(err)
			}
		}
	}, 0}
}

// onLink returns the route to the addresses of a subnet.
func onLink(f family, table int, dst netip.Prefix) netlink.Route {
	r := netlink.Route{
		Family: f.af, Table: table, Dst: ipNet(dst), Type: unix.RTN_UNICAST, Protocol: egress.RouteProtocol, Priority: f.metric,
	}
	if f.af == unix.AF_INET { // as without a gateway it has to be
		r.Scope = netlink.SCOPE_LINK
	}
	return r
}

// viaGateway returns the route to everywhere by a gateway that no other route need lead to.
func viaGateway(f family, table int, gateway netip.Addr) netlink.Route {
	return netlink.Route{
		Family: f.af, Table: table, Dst: ipNet(f.any), Type: unix.RTN_UNICAST, Protocol: egress.RouteProtocol, Priority: f.metric,
		Gw: gateway.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}
}

// lastMetric is the largest there is: the route counts when no other does.
const lastMetric = math.MaxUint32

// noRoute returns a route without a link. One that is unreachable is left when the link of the others is gone: without
// it, the packets would leave by the main table. One that throws ends the table: the rules after it decide.
func noRoute(f family, kind, table int, dst netip.Prefix, metric int) netlink.Route {
	return netlink.Route{Family: f.af, Table: table, Dst: ipNet(dst), Type: kind, Protocol: egress.RouteProtocol, Priority: metric}
}

// linkless are the words for the kinds of routes that have no link.
var linkless = map[int]string{unix.RTN_UNREACHABLE: "unreachable ", unix.RTN_BLACKHOLE: "blackhole ", unix.RTN_THROW: "throw "}

// routeEntry returns the entry of any route; dev is the name of its link. See ruleEntry.
func routeEntry(f family, r netlink.Route, dev string) entry {
	dst := prefixOf(r.Dst)
	e := entry{kind: route, command: "ip " + f.option + " route", bound: dev, exit: exitOf(r.Table)}
	e.place = fmt.Sprintf("%s %s table %d", f.option, dst, r.Table)
	e.words = dst.String()
	if dst == f.any {
		e.words = "default"
	}
	if kind := linkless[r.Type]; kind != "" {
		e.words = kind + e.words
		r.LinkIndex, dev = 0, "" // IPv6 says lo
		e.place += " " + kind    // it takes no other's place
	}
	if r.Type == unix.RTN_LOCAL {
		e.words, e.local = "local "+e.words, dst.Addr()
	}
	plain := netlink.Route{Family: r.Family, Table: r.Table, Dst: r.Dst, Type: r.Type, Protocol: r.Protocol, Priority: r.Priority, Scope: r.Scope}
	// The kernel adds flags of its own, as for a link without carrier.
	r.Flags &= int(netlink.FLAG_ONLINK)
	plain.Flags, plain.Gw, plain.LinkIndex, plain.Src = r.Flags, r.Gw, r.LinkIndex, r.Src
	if r.Gw != nil {
		e.words += " via " + addrOf(r.Gw).String()
	}
	if dev != "" {
		e.words += " dev " + dev
	}
	slot := len(e.words)
	if r.Src != nil {
		e.words += " src " + addrOf(r.Src).String()
	}
	rest := len(e.words)
	if r.Scope == netlink.SCOPE_LINK {
		e.words += " scope link"
	}
	if r.Flags != 0 {
		e.words += " onlink"
	}
	e.words += fmt.Sprintf(" table %d protocol %d", r.Table, int(r.Protocol))
	if r.Priority != f.metric {
		e.words += fmt.Sprintf(" metric %d", r.Priority)
	}
	// with another source it is the same route: IPv6 has no two that differ in nothing else
	e.slot = e.words[:slot] + e.words[rest:]
	if !reflect.DeepEqual(plain, r) {
		e.words += " # with more attributes: " + r.String()
	}
	e.add = func(w *writer, verb string) error { return w.addRoute(e, r, dev, verb) }
	e.del = func(w *writer) error { return w.handle.RouteDel(&r) }
	return e
}

// neighbourEntry returns the entry of a neighbour on the overlay link.
func neighbourEntry(f family, ip netip.Addr, mac net.HardwareAddr, state int) entry {
	e := entry{kind: neighbour, command: "ip " + f.option + " neigh", slot: ip.String(), bound: egress.OverlayLink}
	e.words = fmt.Sprintf("%s lladdr %s dev %s nud %s", ip, mac, egress.OverlayLink, nud(state))
	n := netlink.Neigh{Family: f.af, IP: ip.AsSlice(), HardwareAddr: mac, State: state}
	return e.onLink(n)
}

// fdbEntry returns an entry of the overlay link's forwarding database: frames to mac go to the node with the underlay
// address dst.
func fdbEntry(mac net.HardwareAddr, dst netip.Addr, state int) entry {
	// One place for each MAC: "append" does nothing, and says nothing, when a unicast MAC has another destination
	// already.
	e := entry{kind: fdb, command: "bridge fdb", slot: mac.String(), bound: egress.OverlayLink}
	e.words = fmt.Sprintf("%s dev %s dst %s", mac, egress.OverlayLink, dst)
	if state := nud(state); state != "permanent" {
		e.words += " " + state
	}
	n := netlink.Neigh{Family: unix.AF_BRIDGE, Flags: netlink.NTF_SELF, IP: dst.AsSlice(), HardwareAddr: mac, State: state}
	return e.onLink(n)
}

// onLink adds how a neighbour or FDB entry is written.
func (e entry) onLink(n netlink.Neigh) entry {
	e.add = func(w *writer, _ string) error {
		var err error
		if n.LinkIndex, err = w.index(egress.OverlayLink); err != nil {
			return err
		}
		return w.handle.NeighSet(&n)
	}
	e.del = func(w *writer) error {
		var err error
		if n.LinkIndex, err = w.index(egress.OverlayLink); err != nil {
			return err
		}
		return w.handle.NeighDel(&n)
	}
	return e
}

// addressEntry returns the entry of an address on a link of ours.
func addressEntry(f family, p netip.Prefix, dev string) entry {
	e := entry{kind: address, command: "ip " + f.option + " addr", slot: p.String() + " " + dev, bound: dev}
	e.words = fmt.Sprintf("%s dev %s", p, dev)
	// Of link scope, so that no packet to elsewhere takes it for its source. Nobody else has an address made from our
	// own.
	a := netlink.Addr{IPNet: ipNet(p), Scope: int(netlink.SCOPE_LINK), Flags: unix.IFA_F_NODAD}
	if f.af == unix.AF_INET {
		e.words += " scope link noprefixroute"
		a.Flags = unix.IFA_F_NOPREFIXROUTE
	} else {
		e.words += " nodad"
	}
	write := func(w *writer, do func(netlink.Link, *netlink.Addr) error) error {
		var err error
		if a.LinkIndex, err = w.index(dev); err != nil {
			return err
		}
		return do(nil, &a)
	}
	e.add = func(w *writer, _ string) error { return write(w, w.handle.AddrAdd) }
	e.del = func(w *writer) error { return write(w, w.handle.AddrDel) }
	return e
}

// hex prints a mark as ip(8) does.
func hex(v uint32) string {
	if v == 0 {
		return "0"
	}
	return egress.Mark(v).String()
}

// nud prints the state of a neighbour as ip(8) takes it, as far as this package cares. bridge(8) sets other bits
// besides.
func nud(state int) string {
	if state&netlink.NUD_PERMANENT != 0 {
		return "permanent"
	}
	return fmt.Sprintf("0x%x", state)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf returns the zero Prefix for nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addrOf(n.IP), bits)
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
