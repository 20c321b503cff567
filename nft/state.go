package nft

import (
	"cmp"
	"encoding/binary"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
)

// State is what the tables hold. The zero State is valid: no pod is selected, no egress IP is hosted, no peer is known.
// Its maps and slices need no order, may hold duplicates, and are not changed.
type State struct {
	// Pods are the local selected pods and the id of their egress IP. ID 0: an egress without address; the new
	// connections of the pod are dropped.
	Pods map[netip.Addr]egress.ID
	// Unselected are the local pods that no egress selects.
	Unselected []netip.Addr
	// PodCIDRs are the ranges of the local pods' addresses. A source in them that is neither in Pods nor in Unselected
	// may be a selected pod that is not known yet: its new connections to the outside are dropped until
	// FirstPacketDelay after the first of them. 0: none is.
	PodCIDRs         []netip.Prefix
	FirstPacketDelay time.Duration
	// NextHops say where the connections of local pods go, by id. The packets of an id without entry are dropped and
	// counted.
	NextHops map[egress.ID]egress.Mark
	// Blocks are the ports of an egress IP that connections of this node's pods get on this node, by id. Other
	// protocols than those with ports, and ids without block, are translated by the gateway.
	Blocks map[egress.ID]egress.Block
	// Gateways are the Node.Index of the gateway of what leaves by egress.ToGatewayMark, by id.
	Gateways map[egress.ID]int
	// OverlaySources are what the source of a packet to such a gateway is translated to where no block says otherwise,
	// by id.
	OverlaySources map[egress.ID]netip.Addr
	// Ports are the blocks of other nodes at the egress IPs of Hosted: their packets leave with those, and what comes
	// for those goes to them.
	Ports []Port
	// Peers are the overlay endpoints of other nodes, by Node.Index. Where there are any, the overlay link has to be
	// there.
	Peers map[int]netip.Addr
	// Hosted are the ids that this node may send with: for its own pods, and for what comes over the overlay.
	Hosted map[egress.ID]Hosted
	// AddressGuard are the egress IPs of pools that this node has as an address, or is about to have: without a permit
	// they are not answered for, and they offer no service of the node.
	AddressGuard []netip.Addr
	// Except are the destinations to which no egress applies. They may overlap.
	Except []netip.Prefix
	// Self is the overlay endpoint of this node, and Nodes are those of the peers: VXLAN between others is dropped.
	Self  netip.Addr
	Nodes []netip.Addr
	// Senders are the other nodes that may send with the egress IPs of this node otherwise than by Ports. KeepSenders
	// keeps the Senders and Ports that the kernel has besides: not all are known yet.
	Senders     []Sender
	KeepSenders bool
	// Sources are all egress IPs of the cluster, and Pooled those of pools: nobody else may send with them. Others are
	// a node's own address.
	Sources, Pooled []netip.Addr
	// Carriers are the links on which neighbours ask for egress IPs that are on another link, by name.
	Carriers map[string]Carrier
	// OverlayMTU is the MTU of the overlay link. The MSS of TCP connections that come from the overlay is clamped to
	// it, for peers with a larger one; toward the overlay the kernel knows it. 0: no clamp of what comes.
	OverlayMTU int
	// RandomPorts takes the source port of every SNATed connection at random; else it stays the pod's where that is
	// free, as it has to for a connection that is to survive a move of its IP.
	RandomPorts bool
	// Renewal says how permits are renewed without a commit.
	Renewal Renewal
	// Keep keeps what is in the tables and not in the State: a record could not be read, and an error never causes a
	// delete. Of Pods it keeps none: who has a State says which of Observed.Pods stay.
	Keep bool
}

// Hosted is how connections leave this node: with which source address, by which routing mark, and how much of them.
type Hosted struct {
	IP   netip.Addr
	Mark egress.Mark
	// Shared says that nodes have blocks of the IP's ports: what this node translates for those without gets others.
	Shared bool
	Link   string // of the VLAN that the IP is on; empty: it is on none
	Limit  Limit  // of the request direction, all pods together
}

// Port is a block of another node.
type Port struct {
	egress.Block
	Index int        // of the node
	Node  netip.Addr // its overlay endpoint
}

// Sender is a node with pods of an egress, by its overlay endpoint, and what they have as their source in the overlay
// (egress.OverlaySource).
type Sender struct {
	Node, Source netip.Addr
	ID           egress.ID
}

// Carrier is a link on which ARP requests for egress IPs are answered, with a permit, before the kernel sees them.
type Carrier struct {
	MAC [6]byte      // of the link: where the IPs are
	IPs []netip.Addr // those of IPv6 are left out
}

// elements are the contents of a set: key to value, both in network byte order, so that their order as strings is the
// order of what they mean. Values are empty but in maps, and in interval sets, where key and value are the first and
// the last address of a range.
type elements map[string]string

// contents are the elements of sets, by the name of the set.
type contents map[string]elements

func (c contents) put(set, key, value string) {
	if c[set] == nil {
		c[set] = elements{}
	}
	c[set][key] = value
}

// putAddresses puts addresses into the set of their family.
func (c contents) putAddresses(set string, ips []netip.Addr) {
	for _, ip := range ips {
		if f, ip, ok := familyOf(ip); ok {
			c.put(set+f.digit, key(ip), "")
		}
	}
}

// elements returns the contents of all sets that a State fills. Those that have something for each node, or egress IP,
// of the cluster, are made by m. What it returns is not to be changed.
func (s State) elements(m *memo) contents {
	all := contents{}
	put := all.put
	for _, part := range []contents{
		m.sources.of(s.Sources, slices.Equal, slices.Clone, func(c contents, ips []netip.Addr) { c.putAddresses("source", ips) }),
		m.pooled.of(s.Pooled, slices.Equal, slices.Clone, func(c contents, ips []netip.Addr) { c.putAddresses("pooled", ips) }),
		m.nodes.of(append(s.Nodes[:len(s.Nodes):len(s.Nodes)], s.Self), slices.Equal, slices.Clone, putNodes),
		m.peers.of(s.Peers, maps.Equal, maps.Clone, func(c contents, peers map[int]netip.Addr) {
			for index, node := range peers {
				c.put("node", markKey(egress.PeerMark(index)), string(egress.OverlayMAC(node)))
			}
		}),
		m.except.of(s.Except, slices.Equal, slices.Clone, func(c contents, list []netip.Prefix) { c.putRanges("except", list) }),
	} {
		maps.Copy(all, part) // no two of them have one set
	}
	all.putRanges("podcidr", s.PodCIDRs)
	all.putAddresses("egressip", s.AddressGuard)
	all.putAddresses("known", s.Unselected)
	for ip, id := range s.Pods {
		if f, ip, ok := familyOf(ip); ok {
			put("pod"+f.digit, key(ip), markKey(id.ConnMark()))
			put("selected"+f.digit, key(ip), "")
		}
	}
	for id, m := range s.NextHops {
		put("nexthop", pairKey(id.ConnMark()), markKey(m))
	}
	// should two have one IP, the lowest counts
	for _, id := range slices.Backward(slices.Sorted(maps.Keys(s.Hosted))) {
		h := s.Hosted[id]
		if f, ip, ok := familyOf(h.IP); ok {
			put("hosted", pairKey(id.ConnMark()), markKey(h.Mark))
			put("snat"+f.digit, markKey(id.ConnMark()), key(ip))
			put("hostedip"+f.digit, key(ip), "")
			put("sentby"+f.digit, key(ip), "")
			if h.Shared {
				put("shared"+f.digit, markKey(id.ConnMark()), key(ip)+portKey(egress.StatefulPort)+key(ip)+portKey(egress.FirstBlockPort-1))
			}
			put("exit"+f.digit, key(ip), markKey(h.Mark))
			put("id"+f.digit, key(ip), markKey(id.ConnMark()))
			if h.Link != "" {
				put("vlanip"+f.digit, linkKey(h.Link)+key(ip), "")
			}
			if h.Limit != (Limit{}) {
				put("bandwidth", markKey(id.ConnMark()), h.Limit.value())
			}
		}
	}
	macs := map[netip.Addr]string{}
	mac := func(node netip.Addr) string {
		if _, ok := macs[node]; !ok {
			macs[node] = pad(string(egress.OverlayMAC(node)))
		}
		return macs[node]
	}
	for _, from := range s.Senders {
		if f, source, ok := familyOf(from.Source); ok {
			put("sender"+f.digit, mac(from.Node)+key(source)+markKey(from.ID.ConnMark()), "")
		}
	}
	for id, b := range s.Blocks {
		if f, ip, ok := familyOf(b.IP); ok {
			put("block"+f.digit, markKey(id.ConnMark()), key(ip)+portKey(b.First)+key(ip)+portKey(b.Last()))
		}
	}
	for id, ip := range s.OverlaySources {
		if f, ip, ok := familyOf(ip); ok {
			put("overlay"+f.digit, markKey(id.ConnMark()), key(ip))
		}
	}
	for id, index := range s.Gateways {
		put("gateway", markKey(id.ConnMark()), markKey(egress.PeerMark(index)|egress.Mark(id)))
	}
	for _, p := range s.Ports {
		f, ip, ok := familyOf(p.IP)
		for unit := 0; ok && unit < p.Size; unit += egress.MinBlock {
			at := key(ip) + portKey(p.First+uint16(unit))
			put("port"+f.digit, at, markKey(egress.PeerMark(p.Index)))
			put("origin"+f.digit, mac(p.Node)+at, "")
		}
	}
	for link, c := range s.Carriers {
		for _, ip := range c.IPs {
			if ip = ip.Unmap(); ip.Is4() {
				put("carried4", linkKey(link)+key(ip), "")
			}
		}
	}
	return all
}

// putNodes puts the overlay endpoints of the other nodes, and the last one, which is that of this node, into their
// sets.
func putNodes(c contents, nodes []netip.Addr) {
	c.putAddresses("node", nodes)
	for _, node := range nodes[:len(nodes)-1] {
		if f, node, ok := familyOf(node); ok {
			c.put("peer"+f.digit, key(node)+pad(string(egress.OverlayMAC(node))), "")
		}
	}
}

// putRanges puts the addresses of prefixes into the set of their family, as the fewest ranges.
func (c contents) putRanges(set string, prefixes []netip.Prefix) {
	for _, r := range merge(prefixes) {
		f, _, _ := familyOf(r.first)
		c.put(set+f.digit, key(r.first), key(r.last))
	}
}

// memo has what State.elements made last of what a cluster has thousands of, and which hardly ever changes. The zero
// memo is ready.
type memo struct {
	sources, pooled, nodes made[[]netip.Addr]
	peers                  made[map[int]netip.Addr]
	except                 made[[]netip.Prefix]
}

// made is the contents that were made of something.
type made[T any] struct {
	from T
	is   contents
}

// of returns the contents of something: those that there are, if it is equal to what they were made of.
func (m *made[T]) of(from T, equal func(a, b T) bool, clone func(T) T, fill func(contents, T)) contents {
	if m.is == nil || !equal(m.from, from) {
		m.from, m.is = clone(from), contents{} // whose it is may change it
		fill(m.is, from)
	}
	return m.is
}

// key returns an address in network byte order.
func key(ip netip.Addr) string { return string(ip.AsSlice()) }

// address returns the address of a key.
func address(key string) netip.Addr {
	ip, _ := netip.AddrFromSlice([]byte(key)) // the keys are addresses
	return ip
}

// markKey returns a mark in network byte order.
func markKey(m egress.Mark) string { return string(binary.BigEndian.AppendUint32(nil, uint32(m))) }

// portKey returns a port in network byte order, as part of a concatenation.
func portKey(p uint16) string { return pad(string(binary.BigEndian.AppendUint16(nil, p))) }

// pairKey returns the key of what holds for two marks that are equal.
func pairKey(m egress.Mark) string { return markKey(m) + markKey(m) }

// linkKey returns the name of a link as the kernel compares it.
func linkKey(name string) string {
	return name + strings.Repeat("\x00", max(unix.IFNAMSIZ-len(name), 0))
}

// span is a range of addresses of one family, both ends included.
type span struct{ first, last netip.Addr }

// merge returns the addresses of prefixes as the fewest ranges, in order: the kernel refuses ranges that overlap.
func merge(prefixes []netip.Prefix) []span {
	var all []span
	for _, p := range prefixes {
		a, bits := p.Addr().WithZone(""), p.Bits()
		if a.Is4In6() && bits >= 96 {
			a, bits = a.Unmap(), bits-96
		}
		if p = netip.PrefixFrom(a, bits).Masked(); p.IsValid() {
			all = append(all, span{p.Addr(), lastAddr(p)})
		}
	}
	return union(all)
}

// union returns the addresses of ranges as the fewest ranges, in order. It changes the order of all.
func union(all []span) []span {
	slices.SortFunc(all, func(a, b span) int { return cmp.Or(a.first.Compare(b.first), b.last.Compare(a.last)) })
	var out []span
	for _, s := range all {
		if n := len(out) - 1; n >= 0 && out[n].first.BitLen() == s.first.BitLen() {
			// Next of the last address there is, is the zero Addr: then everything after it is covered.
			if next := out[n].last.Next(); !next.IsValid() || !next.Less(s.first) {
				if out[n].last.Less(s.last) {
					out[n].last = s.last
				}
				continue
			}
		}
		out = append(out, s)
	}
	return out
}

func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// String prints a range as nft takes it: an address, a prefix where the range is one, else first-last.
func (s span) String() string {
	if s.first == s.last {
		return s.first.String()
	}
	for bits := 0; bits < s.first.BitLen(); bits++ {
		if p := netip.PrefixFrom(s.first, bits); p.Masked() == p && lastAddr(p) == s.last {
			return p.String()
		}
	}
	return s.first.String() + "-" + s.last.String()
}
